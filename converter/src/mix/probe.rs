//! How sensitive the model is to errors in each group of modules: text is run through the model once as it is, and once
//! for each group with that group alone quantized, all of it side by side, layer by layer.
//!
//! Small errors that do not depend on each other add up in the divergence of the output's distributions, which is of
//! second order in them: the divergence of a mix is about the sum of what its groups do alone.

use std::time::Instant;

use kernels::mx::Scheme;
use kernels::{Backend, Device};
use models::checkpoint::{LinearTensor, MxLinear};
use models::staged::{Ends, LOGIT_ROWS, Parameters, Stage, StagedLayer, Stager, WindowState};
use rayon::prelude::*;

use super::Group;
use super::measure::Measurement;
use crate::calibrate::{CalibrationError, Inputs, Sums, streams};
use crate::error::ConvertError;
use crate::eval::kl_divergence;
use crate::quantize::Quantized;

/// Most memory for the activations of all copies of the text. Where it is too little for a copy for each group, the
/// layers are read several times.
const MAX_COPIES_BYTES: usize = 1 << 30;

/// Logits are compared at every position of this many: most of what they cost, hardly any of what they tell.
const POSITION_STRIDE: usize = 2;

/// The text on its way through the model with one group quantized.
struct Probe {
    /// Index of the group.
    group: usize,
    states: Vec<WindowState>,
}

/// The model on its way.
struct Pass<'a> {
    measurement: &'a Measurement<'a>,
    backend: &'a dyn Backend,
    stager: Stager<'a>,
    groups: Vec<Group>,
}

impl Measurement<'_> {
    /// By what the errors of the outputs on `windows` of equal length do to the model's predictions.
    pub(super) fn on_text(&self, windows: &[Vec<u32>]) -> Result<Vec<Group>, ConvertError> {
        let (config, layers) = (self.config, self.config.num_layers);
        let tokens = windows.first().map_or(0, Vec::len);
        let device = Device::Cpu { threads: self.threads.get() };
        let backend = kernels::open(device).map_err(CalibrationError::from)?;
        let ends = streams::end_parameters(self.source)?;
        let ends = Ends::load(&*backend, &ends, config).map_err(CalibrationError::from)?;
        let stager = Stager::new(&*backend, config, tokens).map_err(CalibrationError::from)?;
        let mut pass = Pass { measurement: self, backend: &*backend, stager, groups: Vec::new() };
        let states = windows.iter().map(|window| pass.stager.embed(&ends, window));
        let mut states: Vec<_> = states.collect::<Result<_, _>>().map_err(CalibrationError::from)?;

        let copies_bytes = Stage::ALL.len() * windows.len() * tokens * config.hidden_size * size_of::<f32>();
        let at_once = (MAX_COPIES_BYTES / copies_bytes.max(1)).clamp(1, layers.max(1));
        let mut work = Work::new(layers, at_once);
        let mut unquantized: Option<Vec<WindowState>> = None;
        for first in (0..layers).step_by(at_once) {
            let end = layers.min(first + at_once);
            let mut probes = Vec::new();
            let mut rest = None;
            for index in first..layers {
                let parameters = streams::layer_parameters(self.source, index)?;
                let mut layer = pass.load(&parameters, index)?;
                probes.iter_mut().for_each(|probe: &mut Probe| pass.through(&layer, &mut probe.states));
                if index < end {
                    pass.probe(index, &mut layer, parameters, &mut states, &mut probes)?;
                } else if unquantized.is_none() {
                    pass.through(&layer, rest.get_or_insert_with(|| states.clone()));
                }
                let (done, left) = work.layer_done(probes.len());
                self.progress.measured(done, left);
            }
            let unquantized = unquantized.get_or_insert_with(|| rest.unwrap_or_else(|| states.clone()));
            pass.weigh(&ends, unquantized, &probes)?;
        }
        Ok(pass.groups)
    }
}

impl Pass<'_> {
    fn load(&self, parameters: &Parameters, index: usize) -> Result<StagedLayer, CalibrationError> {
        Ok(StagedLayer::load(self.backend, parameters, self.measurement.config, index)?)
    }

    fn through(&mut self, layer: &StagedLayer, states: &mut [WindowState]) {
        for state in states {
            self.stager.begin(layer, state);
            Stage::ALL.into_iter().for_each(|stage| self.stager.advance(layer, stage, state));
        }
    }

    fn advance(&mut self, layer: &StagedLayer, stage: Stage, states: &mut [WindowState]) {
        states.iter_mut().for_each(|state| self.stager.advance(layer, stage, state));
    }

    /// Takes `states` through the layer, and adds a probe for each of its groups.
    fn probe(
        &mut self,
        index: usize,
        layer: &mut StagedLayer,
        mut parameters: Parameters,
        states: &mut [WindowState],
        probes: &mut Vec<Probe>,
    ) -> Result<(), CalibrationError> {
        let own = probes.len();
        states.iter_mut().for_each(|state| self.stager.begin(layer, state));
        for stage in Stage::ALL {
            let group = self.group(stage, index, &parameters, states)?;
            for probe in &mut probes[own..] {
                self.advance(layer, stage, &mut probe.states);
            }
            if let Some(group) = group {
                let mut quantized = states.to_vec();
                let originals = self.quantize(&group, &mut parameters);
                self.reload(layer, &parameters, stage)?;
                self.advance(layer, stage, &mut quantized);
                parameters.linears.extend(originals);
                self.reload(layer, &parameters, stage)?;
                probes.push(Probe { group: self.groups.len(), states: quantized });
                self.groups.push(group);
            }
            self.advance(layer, stage, states);
        }
        Ok(())
    }

    fn reload(
        &self,
        layer: &mut StagedLayer,
        parameters: &Parameters,
        stage: Stage,
    ) -> Result<(), CalibrationError> {
        Ok(layer.reload(self.backend, parameters, self.measurement.config, stage)?)
    }

    /// The errors of a stage's modules, whose inputs are in `states`.
    fn group(
        &self,
        stage: Stage,
        index: usize,
        parameters: &Parameters,
        states: &[WindowState],
    ) -> Result<Option<Group>, CalibrationError> {
        let (modules, cols) = self.measurement.modules(stage, index, parameters);
        if modules.is_empty() {
            return Ok(None);
        }
        let mut sums = Sums::new(cols, false, false);
        for state in states {
            sums.add(&Inputs::new(&state.input, cols, None), None);
        }
        let group = self.measurement.on_inputs(modules, cols, &sums.finish());
        match group {
            Some(group) if !group.errors.iter().all(|error| error.is_finite()) => {
                Err(Measurement::overflow(&group))
            }
            group => Ok(group),
        }
    }

    /// Quantizes the modules of `group` in `parameters`; returns what they were.
    fn quantize(&self, group: &Group, parameters: &mut Parameters) -> Vec<(String, LinearTensor)> {
        let cast = self.measurement.casts[self.measurement.roughest()];
        let mut originals = Vec::with_capacity(group.modules.len());
        for module in &group.modules {
            let Some(LinearTensor::Dense(dense)) = parameters.linears.get(module) else { continue };
            let shape = [dense.shape[0], dense.shape[1]];
            let quantized = Quantized::nearest(&dense.to_f32(), shape[1], cast);
            let scheme = Scheme { weight: cast, activation: None, rotation: None };
            let mx = MxLinear::new(scheme, shape, quantized.packed_codes(), quantized.scale_bytes());
            let mx = LinearTensor::Mx(mx.expect("a quantized weight has the size of its format"));
            originals
                .extend(parameters.linears.insert(module.clone(), mx).map(|dense| (module.clone(), dense)));
        }
        originals
    }

    /// Sets the sensitivity of the groups of `probes`, which have come to the model's end.
    fn weigh(
        &mut self,
        ends: &Ends,
        unquantized: &[WindowState],
        probes: &[Probe],
    ) -> Result<(), CalibrationError> {
        let (vocab, mut sums, mut count) =
            (self.measurement.config.vocab_size, vec![0.0; probes.len()], 0_usize);
        for (window, state) in unquantized.iter().enumerate() {
            let tokens = state.residual.len() / self.measurement.config.hidden_size;
            let positions: Vec<u32> = (0..tokens as u32).step_by(POSITION_STRIDE).collect();
            for positions in positions.chunks(LOGIT_ROWS) {
                let baseline = self.stager.logits(ends, state, positions);
                count += positions.len();
                for (sum, probe) in sums.iter_mut().zip(probes) {
                    let logits = self.stager.logits(ends, &probe.states[window], positions);
                    let rows = logits.par_chunks_exact(vocab).zip(baseline.par_chunks_exact(vocab));
                    let kl: Vec<f64> = rows.map(|(row, baseline)| kl_divergence(row, baseline)).collect();
                    *sum += kl.iter().sum::<f64>();
                }
            }
        }
        let roughest = self.measurement.roughest();
        for (sum, probe) in sums.into_iter().zip(probes) {
            let group = &mut self.groups[probe.group];
            let (divergence, error) = (sum / count.max(1) as f64, group.errors[roughest]);
            if !divergence.is_finite() {
                return Err(Measurement::overflow(group));
            }
            group.sensitivity = if error > 0.0 { divergence / error } else { 0.0 };
        }
        Ok(())
    }
}

/// How much there is to do: copies of the text times layers.
struct Work {
    start: Instant,
    done: usize,
    all: usize,
}

impl Work {
    /// What a layer takes beside the copies that go through it.
    const OVERHEAD: usize = 2 * Stage::ALL.len();

    fn new(layers: usize, at_once: usize) -> Self {
        let pass = |first: usize| -> usize {
            let copies = |index: usize| Stage::ALL.len() * (index + 1 - first).min(at_once);
            (first..layers).map(|index| copies(index) + Self::OVERHEAD).sum()
        };
        Self { start: Instant::now(), done: 0, all: (0..layers).step_by(at_once).map(pass).sum() }
    }

    /// Share of the work that is done, and how long the rest will take.
    fn layer_done(&mut self, copies: usize) -> (f64, std::time::Duration) {
        self.done += copies + Self::OVERHEAD;
        let share = (self.done as f64 / self.all as f64).min(1.0);
        (share, self.start.elapsed().mul_f64((1.0 - share) / share))
    }
}

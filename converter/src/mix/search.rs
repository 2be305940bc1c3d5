//! The smallest mix that is good enough: budgets are tried by direct cast on the windows that calibration holds out.

use std::collections::BTreeMap;

use kernels::mx::{MxFormat, Scheme};
use kernels::{Backend, Device};
use models::ModelConfig;
use models::staged::{Ends, Stage, StagedLayer, Stager, WindowState};

use super::group::{Group, bits_per_weight, choose};
use super::{Job, MixError, Trial};
use crate::calibrate::{CalibrationError, CalibrationWindows, streams};
use crate::error::ConvertError;
use crate::layout;
use crate::plan::plan;

/// Bits per weight that the result may be above the smallest mix that would do.
const RESOLUTION: f64 = 1.0 / 16.0;

/// The formats of the smallest mix whose perplexity is at most `1 + share` times the unquantized model's, and every mix
/// that was tried on the way.
pub(super) fn search(
    job: &Job<'_>,
    config: &ModelConfig,
    groups: &[Group],
    share: f64,
) -> Result<(Vec<MxFormat>, Vec<Trial>), ConvertError> {
    let Some(text) = &job.mix.text else {
        return Err(CalibrationError::NoText { method: "nearest" }.into());
    };
    let windows = CalibrationWindows::of(job.source, config, &text.path, text.windows, text.window_tokens)?;
    let tokens = &windows.tokens[windows.seen()..];
    let device = Device::Cpu { threads: job.threads.get() };
    let backend = kernels::open(device).map_err(CalibrationError::from)?;
    let mut held_out = HeldOut::new(job, config, &*backend, tokens)?;
    let unquantized = held_out.perplexity(&BTreeMap::new())?;
    if !unquantized.is_finite() {
        return Err(MixError::Unmeasurable.into());
    }

    let mut trials = Vec::new();
    let mut attempt = |budget: f64| -> Result<(Vec<MxFormat>, Trial), ConvertError> {
        let formats = choose(groups, &job.mix.formats, budget)?;
        let recipe = job.recipe_of(groups, &formats);
        let planned = plan(&recipe, job.source.tensors(), job.source.traits())
            .map_err(|error| ConvertError::Plan { path: job.source.path_of(error.tensor()), error })?;
        let perplexity = held_out.perplexity(&layout::schemes(&planned))?;
        let bits = bits_per_weight(groups, &formats);
        let trial = Trial { bits, perplexity, increase: perplexity / unquantized - 1.0 };
        job.progress.tried(&trial);
        trials.push(trial);
        Ok((formats, trial))
    };
    let uniform = job.mix.formats.iter().map(|format| bits_per_weight(groups, &vec![*format; groups.len()]));
    let (mut low, mut high) =
        uniform.fold((f64::INFINITY, 0.0_f64), |(low, high), bits| (low.min(bits), high.max(bits)));
    let (mut best, trial) = attempt(high)?;
    if trial.increase > share || trial.increase.is_nan() {
        let least = trial.increase;
        return Err(MixError::OverIncrease { share, least, bits: trial.bits }.into());
    }
    high = high.min(trial.bits);
    let mut budget = low;
    while low <= high {
        let (formats, trial) = attempt(budget)?;
        if trial.increase <= share {
            best = formats;
            high = trial.bits;
        } else {
            low = budget;
        }
        if high - low <= RESOLUTION {
            break;
        }
        budget = f64::midpoint(low, high);
    }
    Ok((best, trials))
}

/// The windows that mixes are tried on.
struct HeldOut<'a> {
    job: &'a Job<'a>,
    config: &'a ModelConfig,
    backend: &'a dyn Backend,
    stager: Stager<'a>,
    ends: Ends,
    tokens: &'a [Vec<u32>],
    embedded: Vec<WindowState>,
}

impl<'a> HeldOut<'a> {
    fn new(
        job: &'a Job<'a>,
        config: &'a ModelConfig,
        backend: &'a dyn Backend,
        tokens: &'a [Vec<u32>],
    ) -> Result<Self, ConvertError> {
        let ends = streams::end_parameters(job.source)?;
        let ends = Ends::load(backend, &ends, config).map_err(CalibrationError::from)?;
        let length = tokens.first().map_or(0, Vec::len);
        let mut stager = Stager::new(backend, config, length).map_err(CalibrationError::from)?;
        let embedded = tokens.iter().map(|window| stager.embed(&ends, window));
        let embedded = embedded.collect::<Result<_, _>>().map_err(CalibrationError::from)?;
        Ok(Self { job, config, backend, stager, ends, tokens, embedded })
    }

    /// Of the model with `schemes` by module, cast directly.
    fn perplexity(&mut self, schemes: &BTreeMap<&str, Scheme>) -> Result<f64, ConvertError> {
        let mut states = self.embedded.clone();
        for index in 0..self.config.num_layers {
            let mut parameters = streams::layer_parameters(self.job.source, index)?;
            streams::cast_directly(&mut parameters, schemes);
            let layer = StagedLayer::load(self.backend, &parameters, self.config, index)
                .map_err(CalibrationError::from)?;
            for state in &mut states {
                self.stager.begin(&layer, state);
                Stage::ALL.into_iter().for_each(|stage| self.stager.advance(&layer, stage, state));
            }
        }
        let windows = self.tokens.iter().zip(&states);
        let nll: f64 = windows.map(|(window, state)| self.stager.nll(&self.ends, window, state)).sum();
        let scored: usize = self.tokens.iter().map(|window| window.len() - 1).sum();
        Ok((nll / scored.max(1) as f64).exp())
    }
}

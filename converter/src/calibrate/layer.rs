//! One layer: its stages one after the other, each quantized on the inputs that it then has.

use std::collections::BTreeMap;

use kernels::Backend;
use kernels::mx::{Block, Cast, ScaleRounding, Scheme};
use models::ModelConfig;
use models::checkpoint::{LinearTensor, MxLinear};
use models::staged::{Ends, Parameters, Stage, StagedLayer, Stager, WindowState};

use super::held_out::HeldOut;
use super::store::{LayerResult, PackedModule, StageRecord};
use super::streams;
use super::sums::{Finished, Inputs, OutputError, Sums};
use super::text::CalibrationWindows;
use super::{CalibrationError, HeldOutDivergence, HeldOutPerplexity, Job};
use crate::error::ConvertError;
use crate::quantize::{Problem, Quantized, retarget};

/// Holds weights that make up for earlier errors near the original ones: a share of the mean of the Hessian's diagonal.
/// With a tenth of it, SmolLM2-135M in MXFP4 ends further from the original (Kullback-Leibler divergence 0.204, not 0.194).
const RETARGET_DAMPING: f64 = 0.1;

/// The windows on their way through three models: the quantized one, the unquantized one, and the direct cast.
pub(super) struct Calibrator<'a> {
    pub(super) job: &'a Job<'a>,
    pub(super) backend: &'a dyn Backend,
    pub(super) config: &'a ModelConfig,
    /// Of the modules to quantize.
    pub(super) schemes: BTreeMap<&'a str, Scheme>,
    /// CalibrationWindows that modules are quantized on; the others compare.
    pub(super) seen: usize,
    /// All windows.
    pub(super) quantized: Vec<WindowState>,
    /// All windows; `None` for those that the unquantized model does not run on.
    pub(super) original: Vec<Option<WindowState>>,
    /// The windows that are compared on.
    pub(super) nearest: Vec<WindowState>,
    pub(super) stager: Stager<'a>,
}

/// A module to quantize.
struct Module {
    name: String,
    rows: usize,
    scheme: Scheme,
    weight: Vec<f32>,
}

/// What decides which inputs a product sees: the format that they are quantized to, and the blocks that are rotated.
type InputForm = (Option<Cast>, Option<Block>);

fn input_form(scheme: Scheme) -> InputForm {
    (scheme.activation, scheme.rotation.map(|_| scheme.weight.format.block))
}

/// Sums of the inputs in one form: over the windows to quantize on, and over those to compare on.
struct StageSums<T> {
    scheme: Scheme,
    seen: T,
    held_out: T,
}

impl Calibrator<'_> {
    /// Quantizes layer `index`, or takes what is `stored`, and takes all windows through it.
    pub(super) fn layer(
        &mut self,
        index: usize,
        stored: Option<&LayerResult>,
    ) -> Result<LayerResult, ConvertError> {
        let dense = streams::layer_parameters(self.job.source, index)?;
        let original = self.load(&dense, index)?;
        let mut parameters = dense.clone();
        if let Some(stored) = stored {
            self.overlay(&mut parameters, stored)?;
        }
        let mut layer = self.load(&parameters, index)?;
        let mut result = stored.cloned().unwrap_or_default();
        for state in &mut self.quantized {
            self.stager.begin(&layer, state);
        }
        for state in self.original.iter_mut().flatten() {
            self.stager.begin(&original, state);
        }
        for stage in Stage::ALL {
            if stored.is_some() {
                self.advance_original(&original, stage);
            } else {
                self.stage(index, stage, &original, &mut parameters, &mut result)?;
                layer
                    .reload(self.backend, &parameters, self.config, stage)
                    .map_err(CalibrationError::from)?;
            }
            self.quantized.iter_mut().for_each(|state| self.stager.advance(&layer, stage, state));
        }
        self.nearest_layer(index, dense)?;
        Ok(result)
    }

    fn advance_original(&mut self, original: &StagedLayer, stage: Stage) {
        self.original.iter_mut().flatten().for_each(|state| self.stager.advance(original, stage, state));
    }

    fn load(&self, parameters: &Parameters, index: usize) -> Result<StagedLayer, CalibrationError> {
        Ok(StagedLayer::load(self.backend, parameters, self.config, index)?)
    }

    /// Replaces weights by what was stored for them.
    fn overlay(&self, parameters: &mut Parameters, stored: &LayerResult) -> Result<(), CalibrationError> {
        for (name, packed) in &stored.modules {
            let (Some(&scheme), Some(weight)) =
                (self.schemes.get(name.as_str()), parameters.linears.get(name))
            else {
                continue;
            };
            let shape = weight.shape();
            let mx = MxLinear::new(scheme, shape, packed.codes.clone(), packed.scales.clone());
            let mx = mx.map_err(|error| CalibrationError::Damaged {
                path: self.job.output.to_owned(),
                reason: format!("{name}: {error}"),
            })?;
            parameters.linears.insert(name.clone(), LinearTensor::Mx(mx));
        }
        Ok(())
    }

    /// Quantizes the modules of one stage into `parameters` and `result`, and takes the unquantized model through it.
    fn stage(
        &mut self,
        index: usize,
        stage: Stage,
        original: &StagedLayer,
        parameters: &mut Parameters,
        result: &mut LayerResult,
    ) -> Result<(), CalibrationError> {
        let (names, cols) = stage.modules(self.config, index);
        let modules: Vec<Module> = names
            .into_iter()
            .filter_map(|(name, rows)| {
                let scheme = *self.schemes.get(name.as_str())?;
                let LinearTensor::Dense(dense) = parameters.linears.get(&name)? else { return None };
                Some(Module { weight: streams::rotated(dense, scheme), name, rows, scheme })
            })
            .collect();
        let Some(first) = modules.first() else {
            self.advance_original(original, stage);
            return Ok(());
        };
        let sums = self.sums(stage, cols, original, &modules);
        if !sums.iter().all(|sums| sums.seen.is_finite() && sums.held_out.is_finite()) {
            return Err(CalibrationError::NonFinite { module: first.name.clone() });
        }

        let (mut direct, mut calibrated) = (OutputError::default(), OutputError::default());
        let mut candidates = Vec::with_capacity(modules.len());
        for module in &modules {
            let sums = sums.iter().find(|sums| input_form(sums.scheme) == input_form(module.scheme));
            let sums = sums.expect("every form of inputs has sums");
            let nearest = Quantized::nearest(&module.weight, cols, nearest_cast(module.scheme.weight));
            let method = self.quantize(module, cols, &sums.seen);
            direct = direct.plus(sums.held_out.error(&module.weight, &nearest.dequantize()));
            calibrated = calibrated.plus(sums.held_out.error(&module.weight, &method.dequantize()));
            candidates.push((nearest, method));
        }
        let keep = calibrated.error <= direct.error;
        for (module, (nearest, method)) in modules.iter().zip(candidates) {
            let chosen = if keep { method } else { nearest };
            let packed = PackedModule {
                codes: chosen.packed_codes(),
                scales: chosen.scale_bytes(),
                energy: chosen.energy(&module.weight),
            };
            let shape = [module.rows, cols];
            let mx = MxLinear::new(module.scheme, shape, packed.codes.clone(), packed.scales.clone());
            let mx = mx.expect("a quantized weight has the size of its format");
            parameters.linears.insert(module.name.clone(), LinearTensor::Mx(mx));
            result.modules.insert(module.name.clone(), packed);
        }
        result.stages.push(StageRecord {
            modules: modules.into_iter().map(|module| module.name).collect(),
            kept: if keep { self.job.calibration.method.name() } else { "nearest" }.to_owned(),
            nearest_db: direct.decibels(),
            method_db: calibrated.decibels(),
        });
        Ok(())
    }

    /// One module, by the method.
    fn quantize(&self, module: &Module, cols: usize, sums: &Finished) -> Quantized {
        let strength = self.job.calibration.drift_correction;
        let weight = sums.missing(&module.weight).map(|mut missing| {
            missing.iter_mut().for_each(|value| *value *= strength);
            retarget(&module.weight, cols, &sums.hessian, &missing, RETARGET_DAMPING)
        });
        self.job.calibration.method.quantize(&Problem {
            weight: weight.as_deref().unwrap_or(&module.weight),
            cols,
            hessian: &sums.hessian,
            cast: module.scheme.weight,
        })
    }

    /// Sums the stage's inputs over all windows, and takes the unquantized model through the stage.
    fn sums(
        &mut self,
        stage: Stage,
        cols: usize,
        original: &StagedLayer,
        modules: &[Module],
    ) -> Vec<StageSums<Finished>> {
        let corrects = self.job.calibration.drift_correction > 0.0;
        let mut all: Vec<StageSums<Sums>> = Vec::new();
        for scheme in modules.iter().map(|module| module.scheme) {
            if !all.iter().any(|sums| input_form(sums.scheme) == input_form(scheme)) {
                let new = |measured: bool| Sums::new(cols, corrects, measured);
                all.push(StageSums { scheme, seen: new(false), held_out: new(true) });
            }
        }
        for (window, (state, wanted)) in self.quantized.iter().zip(&mut self.original).enumerate() {
            for sums in &mut all {
                let inputs = Inputs::new(&state.input, cols, Some(sums.scheme));
                let sums = if window < self.seen { &mut sums.seen } else { &mut sums.held_out };
                sums.add(&inputs, wanted.as_ref().map(|wanted| &*wanted.input));
            }
            if let Some(state) = wanted {
                self.stager.advance(original, stage, state);
            }
        }
        all.into_iter()
            .map(|sums| StageSums {
                scheme: sums.scheme,
                seen: sums.seen.finish(),
                held_out: sums.held_out.finish(),
            })
            .collect()
    }

    /// Takes the direct cast through the layer.
    fn nearest_layer(&mut self, index: usize, mut parameters: Parameters) -> Result<(), ConvertError> {
        streams::cast_directly(&mut parameters, &self.schemes);
        let layer = self.load(&parameters, index)?;
        for state in &mut self.nearest {
            self.stager.begin(&layer, state);
            Stage::ALL.into_iter().for_each(|stage| self.stager.advance(&layer, stage, state));
        }
        Ok(())
    }

    /// The models, on the windows that are compared on, after the last layer.
    pub(super) fn compare(
        &mut self,
        ends: &Ends,
        windows: &CalibrationWindows,
    ) -> (HeldOutPerplexity, HeldOutDivergence) {
        let seen = windows.seen();
        let held_out = HeldOut {
            tokens: &windows.tokens[seen..],
            unquantized: self.original[seen..].iter().flatten().collect(),
            nearest: &self.nearest,
            calibrated: &self.quantized[seen..],
        };
        held_out.compare(&mut self.stager, ends)
    }
}

/// What direct cast does: the same, without a search that calibration steers.
pub(crate) fn nearest_cast(cast: Cast) -> Cast {
    if cast.scale_rounding == ScaleRounding::Mse { cast.format.into() } else { cast }
}

//! Free permutations: channels between modules change places so that those of like magnitude share blocks and so scales
//! (per-embedding-group quantization with range-based permutation, Bondarenko et al., arXiv 2109.12948). The rows that
//! make the channels and the columns that take them are written in the new order: the model is the same, and nothing
//! has to be done, or said in the checkpoint, to run it.

mod choose;
mod orders;
mod seam;

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Instant;

use kernels::{Backend, Device};
use models::ModelConfig;
use models::checkpoint::LinearTensor;
use models::staged::{Ends, Parameters, Stage, StagedLayer, Stager, WindowState};
use serde::Serialize;

use crate::calibrate::{CalibrationError, CalibrationWindows, streams};
use crate::error::ConvertError;
use crate::layout;
use crate::plan::Plan;
use crate::pool::in_pool;
use crate::progress::Progress;
use crate::source::Source;
use choose::{Consumer, Seen};
use seam::Seam;

pub use choose::PermutedModule;
pub(crate) use orders::{ChannelOrders, TensorOrder};

/// Windows of text that are enough to see ranges and compare orders, and their length in tokens.
const WINDOWS: usize = 8;
const WINDOW_TOKENS: usize = 256;

/// How to permute: by the range that channels have, wherever that lowers the error of the module that takes them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Permute {
    /// What outputs are compared on, and activations seen on; without it, weights alone count.
    pub text: Option<PathBuf>,
}

/// What permutation came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PermutationReport {
    /// File name of the text, if there was one.
    pub text: Option<String>,
    /// The modules that take channels that can change places, in the order of execution.
    pub modules: Vec<PermutedModule>,
}

impl PermutationReport {
    /// The modules whose input channels changed places.
    pub(crate) fn permuted(&self) -> impl Iterator<Item = &str> {
        let moved = self.modules.iter().filter(|module| module.order != "stored");
        moved.map(|module| module.module.as_str())
    }

    /// `channels before 34 of 60 modules reordered by range: error of their outputs -18.91 to -19.20 dB on average`.
    pub(crate) fn summary(&self) -> String {
        let moved: Vec<_> = self.modules.iter().filter(|module| module.order != "stored").collect();
        let what = if self.text.is_some() { "outputs" } else { "weights" };
        let mean = |of: &dyn Fn(&PermutedModule) -> f64| {
            moved.iter().map(|module| of(module)).sum::<f64>() / moved.len() as f64
        };
        let mut summary =
            format!("channels before {} of {} modules reordered by range", moved.len(), self.modules.len());
        if !moved.is_empty() {
            let (stored, db) = (mean(&|module| module.stored_db), mean(&|module| module.db));
            summary += &format!(": error of their {what} {stored:.2} to {db:.2} dB on average");
        }
        summary
    }
}

/// A model whose channels are to be ordered for a plan.
pub(crate) struct Job<'a> {
    pub(crate) source: &'a Source,
    pub(crate) plan: &'a Plan,
    pub(crate) permute: &'a Permute,
    pub(crate) threads: NonZeroUsize,
    pub(crate) progress: &'a dyn Progress,
}

/// The text on its way through the unquantized model.
struct Run<'a> {
    stager: Stager<'a>,
    states: Vec<WindowState>,
}

impl Job<'_> {
    /// The orders that help.
    pub(crate) fn run(&self) -> Result<(ChannelOrders, PermutationReport), ConvertError> {
        in_pool(self.threads, || self.run_in_pool())
    }

    fn run_in_pool(&self) -> Result<(ChannelOrders, PermutationReport), ConvertError> {
        let start = Instant::now();
        let config = ModelConfig::parse(self.source.config()).map_err(models::ModelError::from);
        let config = config.map_err(CalibrationError::from)?;
        let device = Device::Cpu { threads: self.threads.get() };
        let backend = kernels::open(device).map_err(CalibrationError::from)?;
        let mut run = self.start(&*backend, &config)?;
        let schemes = layout::schemes(self.plan);
        let (mut orders, mut modules) = (ChannelOrders::default(), Vec::new());
        for index in 0..config.num_layers {
            let parameters = streams::layer_parameters(self.source, index)?;
            let layer = match &mut run {
                None => None,
                Some(run) => {
                    let layer = StagedLayer::load(&*backend, &parameters, &config, index);
                    let layer = layer.map_err(CalibrationError::from)?;
                    run.states.iter_mut().for_each(|state| run.stager.begin(&layer, state));
                    Some(layer)
                }
            };
            for stage in Stage::ALL {
                if let Some(seam) = Seam::before(stage, &config, index)
                    && let Some(&scheme) = schemes.get(seam.consumer.as_str())
                    && let Some(weight) = weight(&seam, &parameters)
                {
                    let seen = run.as_ref().map(|run| {
                        let inputs = run.states.iter().flat_map(|state| &state.input).copied().collect();
                        Seen::new(inputs, &weight, seam.cols())
                    });
                    let consumer = Consumer { seam: &seam, scheme, weight: &weight, seen };
                    let (order, module) = consumer.choose();
                    if !module.stored_db.is_finite() {
                        return Err(CalibrationError::NonFinite { module: seam.consumer }.into());
                    }
                    if let Some(order) = order {
                        seam.follow(&order, &parameters, &mut orders);
                    }
                    modules.push(module);
                }
                if let (Some(run), Some(layer)) = (&mut run, &layer) {
                    run.states.iter_mut().for_each(|state| run.stager.advance(layer, stage, state));
                }
            }
            let left = start.elapsed() / (index + 1) as u32 * (config.num_layers - index - 1) as u32;
            self.progress.permuted(index + 1, config.num_layers, left);
        }
        let text = self.permute.text.as_ref().and_then(|text| text.file_name());
        let text = text.map(|name| name.to_string_lossy().into_owned());
        Ok((orders, PermutationReport { text, modules }))
    }

    /// The text at the model's first layer, if there is a text.
    fn start<'b>(
        &self,
        backend: &'b dyn Backend,
        config: &'b ModelConfig,
    ) -> Result<Option<Run<'b>>, ConvertError> {
        let Some(text) = &self.permute.text else { return Ok(None) };
        let tokens = WINDOW_TOKENS.min(config.max_model_len);
        // One more, which is held out.
        let windows = CalibrationWindows::of(self.source, config, text, WINDOWS + 1, tokens)?;
        let ends = streams::end_parameters(self.source)?;
        let ends = Ends::load(backend, &ends, config).map_err(CalibrationError::from)?;
        let mut stager = Stager::new(backend, config, tokens).map_err(CalibrationError::from)?;
        let states = windows.tokens[..windows.seen()].iter().map(|window| stager.embed(&ends, window));
        let states = states.collect::<Result<_, _>>().map_err(CalibrationError::from)?;
        Ok(Some(Run { stager, states }))
    }
}

/// The weight of the module that takes the channels, if it and those that make them are as the seam says.
fn weight(seam: &Seam, parameters: &Parameters) -> Option<Vec<f32>> {
    let rows_fit = seam.producers.iter().all(|producer| {
        parameters.linears.get(producer).is_some_and(|weight| weight.shape()[0] == seam.rows())
    });
    match parameters.linears.get(&seam.consumer)? {
        LinearTensor::Dense(dense) if rows_fit && dense.shape[1] == seam.cols() => Some(dense.to_f32()),
        _ => None,
    }
}

//! The error that each format makes in each group of modules.

use std::num::NonZeroUsize;

use kernels::mx::{Cast, Energy};
use models::ModelConfig;
use models::checkpoint::LinearTensor;
use models::staged::{Parameters, Stage};

use super::Group;
use crate::calibrate::{CalibrationError, Finished, OutputError, streams};
use crate::error::ConvertError;
use crate::progress::Progress;
use crate::quantize::Quantized;
use crate::source::Source;

/// A model, and formats to compare on it.
pub(super) struct Measurement<'a> {
    pub(super) source: &'a Source,
    pub(super) config: &'a ModelConfig,
    /// By format of the mix.
    pub(super) casts: Vec<Cast>,
    /// Which modules are to be mixed.
    pub(super) mixed: &'a dyn Fn(&str) -> bool,
    pub(super) threads: NonZeroUsize,
    pub(super) progress: &'a dyn Progress,
}

/// A module and its weight `[N, K]`.
pub(super) struct Module {
    pub(super) name: String,
    pub(super) weight: Vec<f32>,
}

impl Measurement<'_> {
    /// By the error of the weights alone, as if all inputs were alike and all groups equally important.
    pub(super) fn by_weights(&self) -> Result<Vec<Group>, ConvertError> {
        let mut groups = Vec::new();
        for index in 0..self.config.num_layers {
            let parameters = streams::layer_parameters(self.source, index)?;
            for stage in Stage::ALL {
                let (modules, cols) = self.modules(stage, index, &parameters);
                let error = |module: &Module, quantized: &Quantized| {
                    let Energy { signal, noise } = quantized.energy(&module.weight);
                    OutputError { power: signal, error: noise }
                };
                groups.extend(self.group(modules, cols, &error));
            }
        }
        Ok(groups)
    }

    /// The group of `modules`, by the error of their outputs on the inputs that `sums` are of.
    pub(super) fn on_inputs(&self, modules: Vec<Module>, cols: usize, sums: &Finished) -> Option<Group> {
        let error =
            |module: &Module, quantized: &Quantized| sums.error(&module.weight, &quantized.dequantize());
        self.group(modules, cols, &error)
    }

    /// Those of a stage that are mixed, and K.
    pub(super) fn modules(
        &self,
        stage: Stage,
        index: usize,
        parameters: &Parameters,
    ) -> (Vec<Module>, usize) {
        let (modules, cols) = stage.modules(self.config, index);
        let modules = modules.into_iter().filter(|(name, _)| (self.mixed)(name));
        let modules = modules.filter_map(|(name, _)| match parameters.linears.get(&name)? {
            LinearTensor::Dense(dense) => Some(Module { weight: dense.to_f32(), name }),
            LinearTensor::Mx(_) => None,
        });
        (modules.collect(), cols)
    }

    /// `None` without modules.
    fn group(
        &self,
        modules: Vec<Module>,
        cols: usize,
        error: &dyn Fn(&Module, &Quantized) -> OutputError,
    ) -> Option<Group> {
        if modules.is_empty() {
            return None;
        }
        let errors = self.casts.iter().map(|cast| {
            let total = modules.iter().fold(OutputError::default(), |total, module| {
                total.plus(error(module, &Quantized::nearest(&module.weight, cols, *cast)))
            });
            if total.power > 0.0 { total.error / total.power } else { 0.0 }
        });
        Some(Group {
            errors: errors.collect(),
            elements: modules.iter().map(|module| module.weight.len() as u64).sum(),
            modules: modules.into_iter().map(|module| module.name).collect(),
            sensitivity: 1.0,
        })
    }

    /// Index of the format that errors are made with to see what they do: that of the fewest bits.
    pub(super) fn roughest(&self) -> usize {
        let bits = |cast: &Cast| cast.format.bits_per_element();
        let formats = self.casts.iter().enumerate();
        formats.min_by(|a, b| bits(a.1).total_cmp(&bits(b.1))).map_or(0, |(index, _)| index)
    }

    /// What a model does when its numbers overflow.
    pub(super) fn overflow(group: &Group) -> CalibrationError {
        CalibrationError::NonFinite { module: group.modules.first().cloned().unwrap_or_default() }
    }
}

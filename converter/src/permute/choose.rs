//! The order of a seam's channels: by which range, if by any.

use kernels::mx::{Scheme, quantize_dequantize};
use rayon::prelude::*;
use serde::Serialize;

use super::orders::ChannelOrder;
use super::seam::Seam;
use crate::calibrate::{OutputError, nearest_cast, product_transposed};
use crate::quantize::Quantized;

/// What became of the channels before one module.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PermutedModule {
    /// The module that takes them.
    pub module: String,
    /// What they were ordered by: `stored` as they were, `weights`, `activations`.
    pub order: &'static str,
    /// Error of direct cast in the stored order, in dB: of the outputs on the text, or of the weights without a text.
    pub stored_db: f64,
    /// The same in this order.
    pub db: f64,
}

/// A module that takes channels, and what it takes.
pub(super) struct Consumer<'a> {
    pub(super) seam: &'a Seam,
    pub(super) scheme: Scheme,
    /// `[N, K]`.
    pub(super) weight: &'a [f32],
    /// `None` without a text.
    pub(super) seen: Option<Seen>,
}

/// What a module does on the text as long as nothing is quantized, whatever the order.
pub(super) struct Seen {
    /// `[tokens, K]`, in the stored order.
    inputs: Vec<f32>,
    /// `[tokens, N]`.
    outputs: Vec<f32>,
}

impl Seen {
    /// Of `inputs` `[tokens, cols]` to `weight` `[N, cols]`.
    pub(super) fn new(inputs: Vec<f32>, weight: &[f32], cols: usize) -> Self {
        Self { outputs: product_transposed(&inputs, cols, weight), inputs }
    }
}

impl Consumer<'_> {
    /// The best order, `None` for the stored one, and what it gains.
    pub(super) fn choose(&self) -> (Option<ChannelOrder>, PermutedModule) {
        let stored = self.error(None);
        let ranges =
            [("weights", Some(self.weight)), ("activations", self.seen.as_ref().map(|seen| &*seen.inputs))];
        let tried = ranges.into_iter().filter_map(|(name, values)| {
            let order = self.seam.by_range(&range(values?, self.seam.cols()));
            let error = self.error(Some(&self.seam.columns(&order)));
            (error.error < stored.error).then_some((name, order, error))
        });
        let best = tried.min_by(|a, b| a.2.error.total_cmp(&b.2.error));
        let module = |order, error: OutputError| PermutedModule {
            module: self.seam.consumer.clone(),
            order,
            stored_db: stored.decibels(),
            db: error.decibels(),
        };
        match best {
            None => (None, module("stored", stored)),
            Some((name, order, error)) => (Some(order), module(name, error)),
        }
    }

    /// What direct cast in this order of columns does to the outputs, each token divided by the length of its input; to
    /// the weights, without inputs.
    fn error(&self, columns: Option<&ChannelOrder>) -> OutputError {
        let cols = self.seam.cols();
        let gathered = |values: &[f32]| columns.map_or_else(|| values.to_vec(), |order| order.gather(values));
        let mut weight = gathered(self.weight);
        self.scheme.rotate(&mut weight);
        let quantized = Quantized::nearest(&weight, cols, nearest_cast(self.scheme.weight));
        let Some(seen) = &self.seen else {
            let energy = quantized.energy(&weight);
            return OutputError { power: energy.signal, error: energy.noise };
        };
        let mut inputs = gathered(&seen.inputs);
        inputs.par_chunks_exact_mut(cols).for_each(|token| {
            self.scheme.rotate(token);
            if let Some(cast) = self.scheme.activation {
                let unquantized = token.to_vec();
                quantize_dequantize(cast, &unquantized, token);
            }
        });
        let outputs = product_transposed(&inputs, cols, &quantized.dequantize());
        let square = |values: &[f32]| values.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
        let rows = weight.len() / cols;
        let tokens = seen.inputs.chunks_exact(cols).zip(outputs.chunks_exact(rows));
        let mut sum = OutputError::default();
        for ((input, output), wanted) in tokens.zip(seen.outputs.chunks_exact(rows)) {
            let length = square(input);
            if length > 0.0 {
                let lacking: Vec<f32> = wanted.iter().zip(output).map(|(w, o)| w - o).collect();
                sum = sum
                    .plus(OutputError { power: square(wanted) / length, error: square(&lacking) / length });
            }
        }
        sum
    }
}

/// The largest magnitude in each column of `[_, cols]`.
fn range(values: &[f32], cols: usize) -> Vec<f32> {
    let mut range = vec![0.0_f32; cols];
    for row in values.chunks_exact(cols) {
        range.iter_mut().zip(row).for_each(|(range, value)| *range = range.max(value.abs()));
    }
    range
}

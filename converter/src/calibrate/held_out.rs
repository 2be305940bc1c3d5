//! What became of the model as a whole, on windows that nothing was quantized on.

use models::staged::{Ends, LOGIT_ROWS, Stager, WindowState};
use rayon::prelude::*;
use serde::Serialize;

use crate::eval::{kl_divergence, nll};

/// Perplexities on the held-out windows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct HeldOutPerplexity {
    /// Of the source.
    pub unquantized: f64,
    /// Of direct cast.
    pub nearest: f64,
    /// Of the calibrated model.
    pub calibrated: f64,
}

/// How far predictions on the held-out windows are from the source's: the mean Kullback-Leibler divergence of the next
/// token's distribution, in nats.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct HeldOutDivergence {
    /// Of direct cast.
    pub nearest: f64,
    /// Of the calibrated model.
    pub calibrated: f64,
}

impl HeldOutDivergence {
    /// Whether calibration ends no further from the source than direct cast does; false where it is no number. Few
    /// windows tell this by their divergence, not by their perplexity, which an error lowers as often as it raises where
    /// the model is unsure of the text.
    pub(super) fn favours_calibration(self) -> bool {
        self.calibrated <= self.nearest
    }
}

/// The held-out windows behind the last layer of each model.
pub(super) struct HeldOut<'a> {
    /// Their tokens.
    pub(super) tokens: &'a [Vec<u32>],
    pub(super) unquantized: Vec<&'a WindowState>,
    pub(super) nearest: &'a [WindowState],
    pub(super) calibrated: &'a [WindowState],
}

impl HeldOut<'_> {
    /// Compares what the models predict.
    pub(super) fn compare(
        &self,
        stager: &mut Stager<'_>,
        ends: &Ends,
    ) -> (HeldOutPerplexity, HeldOutDivergence) {
        let (mut lost, mut divergence, mut scored) = ([0.0; 3], [0.0; 2], 0_usize);
        for (window, tokens) in self.tokens.iter().enumerate() {
            let positions: Vec<u32> = (0..tokens.len() as u32 - 1).collect();
            for positions in positions.chunks(LOGIT_ROWS) {
                let targets = &tokens[positions[0] as usize + 1..][..positions.len()];
                let states = [self.unquantized[window], &self.nearest[window], &self.calibrated[window]];
                let all = states.map(|state| stager.logits(ends, state, positions));
                let [baseline, quantized @ ..] = &all;
                let width = baseline.len() / positions.len();
                for (lost, logits) in lost.iter_mut().zip(&all) {
                    let rows = logits.par_chunks_exact(width).zip(targets);
                    let rows: Vec<f64> = rows.map(|(row, &target)| nll(row, target)).collect();
                    *lost += rows.iter().sum::<f64>();
                }
                for (divergence, logits) in divergence.iter_mut().zip(quantized) {
                    let rows = logits.par_chunks_exact(width).zip(baseline.par_chunks_exact(width));
                    let rows: Vec<f64> = rows.map(|(row, baseline)| kl_divergence(row, baseline)).collect();
                    *divergence += rows.iter().sum::<f64>();
                }
                scored += positions.len();
            }
        }
        let [unquantized, nearest, calibrated] = lost.map(|lost| (lost / scored as f64).exp());
        let perplexity = HeldOutPerplexity { unquantized, nearest, calibrated };
        let [nearest, calibrated] = divergence.map(|sum| sum / scored as f64);
        (perplexity, HeldOutDivergence { nearest, calibrated })
    }
}

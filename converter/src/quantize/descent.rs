//! Coordinate descent after rounding (as QuantEase, Behdin et al., arXiv 2309.01885, does for scalar formats): block by
//! block, each element moves to where the error of the whole row is least, and each shared scale to the best of
//! its neighbours.

use kernels::mx::{Block, E8m0};
use rayon::prelude::*;

use super::grid::{Grid, neighbours};
use super::lanes::{LANES, Lane, add_scaled, transpose, weighted_sum};
use super::{Problem, Quantized};

/// Times that a block's elements are visited under each candidate for its scale: the second time, all of them have
/// been rounded under it.
const VISITS: usize = 2;

/// Lowers `tr((W - Q) (H + damping) (W - Q)')`, in `sweeps` passes over the columns; never raises it.
pub(super) fn descend(problem: &Problem<'_>, damping: f64, sweeps: usize, quantized: &mut Quantized) {
    let cols = problem.cols;
    let block = problem.cast.format.block.size();
    let mean = (0..cols).map(|i| f64::from(problem.importance(i))).sum::<f64>() / cols as f64;
    let descent = Descent { problem, damping: (damping * mean) as f32, block };
    let groups = (quantized.codes.par_chunks_mut(LANES * cols))
        .zip(quantized.scales.par_chunks_mut(LANES * cols / block))
        .zip(problem.weight.par_chunks(LANES * cols));
    groups.for_each(|((codes, scales), weight)| {
        let values = Quantized { cast: problem.cast, cols, codes: codes.to_vec(), scales: scales.to_vec() };
        let errors: Vec<f32> = weight.iter().zip(values.dequantize()).map(|(w, q)| w - q).collect();
        let mut errors = transpose(&errors, cols);
        for _ in 0..sweeps {
            for first in (0..cols).step_by(block) {
                let gradient = descent.gradient(&errors, first);
                for (lane, weight) in weight.chunks_exact(cols).enumerate() {
                    let at = lane * cols + first;
                    let (codes, scale) = (&mut codes[at..at + block], &mut scales[at / block]);
                    let mut start = Attempt::new(*scale, codes);
                    for (j, (value, gradient_of)) in
                        start.values[..block].iter_mut().zip(&gradient).enumerate()
                    {
                        *value = weight[first + j] - errors[first + j][lane];
                        start.gradient[j] = gradient_of[lane];
                    }
                    let best = descent.best(&start, first);
                    *scale = best.scale;
                    codes.copy_from_slice(&best.codes[..block]);
                    for (j, value) in best.values[..block].iter().enumerate() {
                        errors[first + j][lane] = weight[first + j] - value;
                    }
                }
            }
        }
    });
}

struct Descent<'a> {
    problem: &'a Problem<'a>,
    /// Added to the diagonal of H.
    damping: f32,
    block: usize,
}

/// One block of one row, under one scale; arrays are in use up to the block's size.
#[derive(Clone, Copy)]
struct Attempt {
    scale: E8m0,
    codes: [u8; Block::MAX],
    values: [f32; Block::MAX],
    /// `H (w - q)` of the block's columns.
    gradient: [f32; Block::MAX],
    /// Of the row's error.
    change: f64,
}

impl Attempt {
    fn new(scale: E8m0, block: &[u8]) -> Self {
        let mut codes = [0; Block::MAX];
        codes[..block.len()].copy_from_slice(block);
        Self { scale, codes, values: [0.0; Block::MAX], gradient: [0.0; Block::MAX], change: 0.0 }
    }
}

impl Descent<'_> {
    /// `(H + damping) (w - q)` of the columns of the block that starts at `first`, for all rows.
    fn gradient(&self, errors: &[Lane], first: usize) -> Vec<Lane> {
        let columns = (first..first + self.block).map(|column| {
            let mut sum =
                weighted_sum(&self.problem.hessian[column * self.problem.cols..][..errors.len()], errors);
            add_scaled(&mut sum, self.damping, &errors[column]);
            sum
        });
        columns.collect()
    }

    /// The best of the block's scale and its neighbours; `first` is the block's first column.
    fn best(&self, start: &Attempt, first: usize) -> Attempt {
        let mut best = *start;
        let candidates = [start.scale].into_iter().chain(neighbours(start.scale));
        for scale in candidates {
            let mut attempt = Attempt { scale, ..*start };
            for _ in 0..VISITS {
                self.visit(&mut attempt, first);
            }
            if attempt.change < best.change {
                best = attempt;
            }
        }
        best
    }

    /// Moves each element to its best value, given all the others.
    fn visit(&self, attempt: &mut Attempt, first: usize) {
        let grid = Grid::new(self.problem.cast.format.element, attempt.scale);
        for j in 0..self.block {
            let row = &self.problem.hessian[(first + j) * self.problem.cols + first..][..self.block];
            let own = row[j] + self.damping;
            if own <= 0.0 {
                continue;
            }
            let (old, gradient) = (attempt.values[j], attempt.gradient[j]);
            let code = grid.encode(old + gradient / own);
            let value = grid.value(code);
            attempt.codes[j] = code;
            attempt.values[j] = value;
            let step = value - old;
            if step == 0.0 {
                continue;
            }
            attempt.change +=
                f64::from(step) * (f64::from(own) * f64::from(step) - 2.0 * f64::from(gradient));
            attempt.gradient.iter_mut().zip(row).for_each(|(gradient, h)| *gradient -= step * h);
            attempt.gradient[j] -= step * self.damping;
        }
    }
}

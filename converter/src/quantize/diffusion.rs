//! The loop that error diffusion and GPTQ share: columns one after the other, each rounded after adding a share of
//! the errors of those before it. They differ in what the shares are.

use kernels::mx::E8m0;
use rayon::prelude::*;

use super::grid::{Grid, block_scale};
use super::lanes::{LANES, transpose, weighted_sum};
use super::{Problem, Quantized};

/// In which order columns are rounded, and how errors spread.
#[derive(Debug)]
pub(super) struct Diffusion {
    /// The columns, first to last.
    pub(super) order: Vec<u32>,
    /// `[K, K]`, lower triangle by position in `order`: entry `[t, s]`, s < t, is what an error at s adds at t.
    pub(super) shares: Vec<f32>,
}

impl Diffusion {
    /// Rounds `problem.weight`. Every block's scale is chosen from the weight before the first column is rounded, so
    /// that columns can be visited in any order.
    pub(super) fn quantize(&self, problem: &Problem<'_>) -> Quantized {
        let (cols, format) = (problem.cols, problem.cast.format);
        let block = format.block.size();
        let importance: Vec<f32> = (0..cols).map(|i| problem.importance(i)).collect();
        let mut codes = vec![0; problem.weight.len()];
        let mut scales = vec![E8m0::ONE; problem.weight.len() / block];
        let groups = (codes.par_chunks_mut(LANES * cols))
            .zip(scales.par_chunks_mut(LANES * cols / block))
            .zip(problem.weight.par_chunks(LANES * cols));
        groups.for_each(|((codes, scales), weight)| {
            let blocks = weight.chunks_exact(block).zip(importance.chunks_exact(block).cycle());
            for (scale, (x, importance)) in scales.iter_mut().zip(blocks) {
                *scale = block_scale(problem.cast, x, importance);
            }
            let grids: Vec<Grid> = scales.iter().map(|scale| Grid::new(format.element, *scale)).collect();
            self.round_rows(weight, cols, block, &grids, codes);
        });
        Quantized { cast: problem.cast, cols, codes, scales }
    }

    /// Up to [`LANES`] rows.
    fn round_rows(&self, weight: &[f32], cols: usize, block: usize, grids: &[Grid], codes: &mut [u8]) {
        let target = transpose(weight, cols);
        // By position: what was wanted less what it became.
        let mut errors = vec![[0.0; LANES]; cols];
        for (position, &column) in self.order.iter().enumerate() {
            let column = column as usize;
            let spread = weighted_sum(&self.shares[position * cols..][..position], &errors[..position]);
            for (row, codes) in codes.chunks_exact_mut(cols).enumerate() {
                let grid = grids[row * (cols / block) + column / block];
                let code = grid.encode(target[column][row] + spread[row]);
                codes[column] = code;
                errors[position][row] = target[column][row] - grid.value(code);
            }
        }
    }
}

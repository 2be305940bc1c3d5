//! Quantizes and decodes a matrix as any [`Design`] says.

use half::bf16;
use kernels::mx::{Block, Cast, E8m0, ElementType, MxFormat, ScaleRounding, quantize_block};

use super::design::{Design, Rounding, Symmetry};
use super::grid::Grid;

/// A row-major matrix.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Matrix {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) values: Vec<f32>,
}

impl Matrix {
    /// Row `index`.
    pub(super) fn row(&self, index: usize) -> &[f32] {
        &self.values[index * self.cols..][..self.cols]
    }

    /// Calls `visit` with the values of every `shape` = `[rows, cols]` block and writes back what it makes of them.
    /// Blocks at the edges may be smaller.
    fn for_blocks(&mut self, shape: [usize; 2], mut visit: impl FnMut(&mut [f32])) {
        let [block_rows, block_cols] = shape;
        let mut block = Vec::with_capacity(block_rows * block_cols);
        for top in (0..self.rows).step_by(block_rows) {
            let bottom = (top + block_rows).min(self.rows);
            for left in (0..self.cols).step_by(block_cols) {
                let width = block_cols.min(self.cols - left);
                if bottom - top == 1 {
                    visit(&mut self.values[top * self.cols + left..][..width]);
                    continue;
                }
                block.clear();
                for row in top..bottom {
                    block.extend_from_slice(&self.values[row * self.cols + left..][..width]);
                }
                visit(&mut block);
                for (row, values) in (top..bottom).zip(block.chunks_exact(width)) {
                    self.values[row * self.cols + left..][..width].copy_from_slice(values);
                }
            }
        }
    }

    /// Largest magnitude over smallest, zeros left out, of every block that is not all zero.
    pub(super) fn block_spreads(&self, shape: [usize; 2]) -> Vec<f32> {
        let mut spreads = Vec::new();
        self.clone().for_blocks(shape, |block| {
            let magnitudes = block.iter().map(|x| x.abs()).filter(|&x| x > 0.0);
            let (low, high) =
                magnitudes.fold((f32::INFINITY, 0.0_f32), |(low, high), x| (low.min(x), high.max(x)));
            if high > 0.0 {
                spreads.push(high / low);
            }
        });
        spreads
    }

    /// Quantized and decoded; values are finite. `seed` is that of stochastic rounding.
    pub(super) fn quantized(&self, design: &Design, seed: u64) -> Self {
        let quantizer = BlockQuantizer::new(design);
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut result = self.clone();
        result.for_blocks(design.organisation.shape(design.block), |block| quantizer.apply(block, &mut rng));
        result
    }
}

/// A [`Design`], ready to be applied to blocks.
struct BlockQuantizer {
    element: ElementType,
    grid: Grid,
    rounding: Rounding,
    rule: ScaleRounding,
    symmetry: Symmetry,
}

impl BlockQuantizer {
    fn new(design: &Design) -> Self {
        let Design { element, rounding, scale_rounding, symmetry, .. } = *design;
        Self { element, grid: Grid::new(element.spec()), rounding, rule: scale_rounding, symmetry }
    }

    fn apply(&self, block: &mut [f32], rng: &mut fastrand::Rng) {
        match self.symmetry {
            Symmetry::Symmetric => self.scaled(block, rng),
            Symmetry::TwoScales => {
                // The negative values on their own, then the others: each part sees zeros for the rest.
                let part = |keep: fn(f32) -> bool| -> Vec<f32> {
                    block.iter().map(|&x| if keep(x) { x } else { 0.0 }).collect()
                };
                let mut positive = part(|x| x > 0.0);
                let mut negative = part(|x| x < 0.0);
                self.scaled(&mut positive, rng);
                self.scaled(&mut negative, rng);
                for ((x, p), n) in block.iter_mut().zip(positive).zip(negative) {
                    *x = p + n;
                }
            }
            Symmetry::Offset => {
                let (low, high) = block
                    .iter()
                    .fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), &x| (low.min(x), high.max(x)));
                let offset = bf16::from_f32(f32::midpoint(low, high)).to_f32();
                block.iter_mut().for_each(|x| *x -= offset);
                self.scaled(block, rng);
                block.iter_mut().for_each(|x| *x += offset);
            }
        }
    }

    /// With one scale.
    fn scaled(&self, block: &mut [f32], rng: &mut fastrand::Rng) {
        let amax = block.iter().fold(0.0_f32, |amax, x| amax.max(x.abs()));
        if amax == 0.0 {
            return;
        }
        let scale = self.scale(amax, block);
        let inverse = scale.recip();
        match self.rounding {
            Rounding::Nearest => block.iter_mut().for_each(|x| *x = self.grid.nearest(*x * inverse) * scale),
            Rounding::Stochastic => {
                block.iter_mut().for_each(|x| *x = self.grid.stochastic(*x * inverse, rng.f32()) * scale);
            }
        }
    }

    /// The scale of a block whose largest magnitude is `amax`.
    fn scale(&self, amax: f32, block: &[f32]) -> f32 {
        if self.rule != ScaleRounding::Mse {
            return self.rule_scale(amax, self.rule);
        }
        let even = self.rule_scale(amax, ScaleRounding::Even);
        // As the formats have it: of equals, the rule's own, then the lower.
        let mut best = (self.squared_error(block, even), even);
        for candidate in [even * 0.5, even * 2.0] {
            let error = self.squared_error(block, candidate);
            if error < best.0 {
                best = (error, candidate);
            }
        }
        best.1
    }

    /// What `rule` makes of the largest magnitude: the formats' own choice for a block with this value alone.
    fn rule_scale(&self, amax: f32, rule: ScaleRounding) -> f32 {
        const SMALLEST: usize = 16;
        let block = Block::along_k(SMALLEST).expect("16 is a block size");
        let cast = Cast { format: MxFormat { element: self.element, block }, scale_rounding: rule };
        let mut values = [0.0; SMALLEST];
        values[0] = amax;
        let E8m0(byte) = quantize_block(cast, &values, &mut [0; SMALLEST]);
        // Subnormal scales have no F32 reciprocal; such blocks are zero for every purpose here.
        E8m0(byte.clamp(1, 253)).to_f32()
    }

    fn squared_error(&self, block: &[f32], scale: f32) -> f64 {
        let inverse = scale.recip();
        let errors = block.iter().map(|&x| f64::from(x - self.grid.nearest(x * inverse) * scale));
        errors.map(|error| error * error).sum()
    }
}

#[cfg(test)]
mod tests {
    use kernels::mx::quantize_dequantize;

    use super::super::design::Organisation;
    use super::*;

    fn matrix(rows: usize, cols: usize) -> Matrix {
        let mut rng = fastrand::Rng::with_seed(3);
        // Heavy tails, and a block of zeros.
        let value = |i: usize| {
            let x: f32 = (0..6).map(|_| rng.f32() - 0.5).sum::<f32>() * (4.0 * rng.f32()).exp2();
            if i < 32 { 0.0 } else { bf16::from_f32(x).to_f32() }
        };
        Matrix { rows, cols, values: (0..rows * cols).map(value).collect() }
    }

    #[test]
    fn blocks_along_k_are_those_of_the_formats() {
        let matrix = matrix(24, 128);
        for element in ElementType::ALL {
            for scale_rounding in ScaleRounding::ALL {
                for block in [16, 32, 64] {
                    let design = Design { scale_rounding, block, ..Design::ocp(element) };
                    let cast = Cast {
                        format: MxFormat { element, block: Block::along_k(block).unwrap() },
                        scale_rounding,
                    };
                    let mut expected = vec![0.0; matrix.values.len()];
                    quantize_dequantize(cast, &matrix.values, &mut expected);
                    assert_eq!(matrix.quantized(&design, 0).values, expected, "{design:?}");
                }
            }
        }
    }

    #[test]
    fn columns_are_the_rows_of_the_transpose_and_tiles_share_a_scale() {
        let transposed = |m: &Matrix| Matrix {
            rows: m.cols,
            cols: m.rows,
            values: (0..m.cols).flat_map(|c| (0..m.rows).map(move |r| m.values[r * m.cols + c])).collect(),
        };
        // No whole number of blocks.
        let matrix = matrix(45, 70);
        let row = Design::ocp(ElementType::E2m1);
        let column = Design { organisation: Organisation::Column, ..row };
        assert_eq!(transposed(&matrix.quantized(&column, 0)), transposed(&matrix).quantized(&row, 0));

        // A tile of k rows is a block of all its values.
        let tile = Design { organisation: Organisation::Tile, block: 8, ..row };
        let mut values = matrix.values.clone();
        values.truncate(64);
        let square = Matrix { rows: 8, cols: 8, values: values.clone() };
        let flat = Matrix { rows: 1, cols: 64, values };
        let wide = Design { block: 64, ..row };
        assert_eq!(square.quantized(&tile, 0).values, flat.quantized(&wide, 0).values);
    }

    #[test]
    fn asymmetric_blocks_fit_asymmetric_values() {
        let block: Vec<f32> =
            (0..32).map(|i| if i % 2 == 0 { 5.5 + 0.02 * i as f32 } else { -0.1 }).collect();
        let matrix = Matrix { rows: 1, cols: 32, values: block };
        let error = |symmetry| {
            let design = Design { symmetry, ..Design::ocp(ElementType::Int4) };
            let quantized = matrix.quantized(&design, 0);
            quantized.values.iter().zip(&matrix.values).map(|(q, x)| (q - x).powi(2)).sum::<f32>()
        };
        let symmetric = error(Symmetry::Symmetric);
        // The negative values get a scale of their own.
        assert!(error(Symmetry::TwoScales) < 0.95 * symmetric);
        let shifted =
            Matrix { values: matrix.values.iter().map(|x| 10.0 + 0.1 * x).collect(), ..matrix.clone() };
        let design = Design { symmetry: Symmetry::Offset, ..Design::ocp(ElementType::Int4) };
        let quantized = shifted.quantized(&design, 0);
        let worst = quantized.values.iter().zip(&shifted.values);
        let worst = worst.map(|(q, x)| (q - x).abs()).fold(0.0, f32::max);
        assert!(worst < 0.1, "{worst}");
    }

    #[test]
    fn spreads_leave_zeros_out() {
        let matrix = Matrix { rows: 2, cols: 4, values: vec![1.0, -4.0, 0.5, 2.0, 0.0, 3.0, -3.0, 3.0] };
        assert_eq!(matrix.block_spreads([1, 2]), [4.0, 4.0, 1.0, 1.0]);
        assert_eq!(matrix.block_spreads([2, 1]), [1.0, 4.0 / 3.0, 6.0, 1.5]);
        assert_eq!(matrix.block_spreads([2, 4]), [8.0]);
        assert!(Matrix { values: vec![0.0; 8], ..matrix }.block_spreads([1, 4]).is_empty());
    }
}

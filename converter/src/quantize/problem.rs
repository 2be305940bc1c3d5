//! What a calibrated method is given, and what it returns.

use kernels::mx::{Cast, E8m0, Energy, pack, quantize_block};
use rayon::prelude::*;

/// Rows of a weight, and how much their errors cost: find Q on the grid of `cast` that makes
/// `tr((W - Q) H (W - Q)')` small.
#[derive(Debug, Clone, Copy)]
pub struct Problem<'a> {
    /// W `[rows, cols]` = `[N, K]`, finite.
    pub weight: &'a [f32],
    /// K, a multiple of the block size.
    pub cols: usize,
    /// H `[K, K]`, symmetric: the sum of `x x'` over calibration inputs x.
    pub hessian: &'a [f32],
    /// Format and scale rule.
    pub cast: Cast,
}

impl Problem<'_> {
    /// N.
    pub fn rows(&self) -> usize {
        self.weight.len() / self.cols
    }

    /// Entry `i` of the diagonal of H.
    pub fn importance(&self, i: usize) -> f32 {
        self.hessian[i * self.cols + i]
    }
}

/// A quantized weight, one code per byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quantized {
    /// Format and scale rule.
    pub cast: Cast,
    /// K.
    pub cols: usize,
    /// `[N, K]`, low bits.
    pub codes: Vec<u8>,
    /// `[N, K / block]`.
    pub scales: Vec<E8m0>,
}

impl Quantized {
    /// Direct cast of finite rows `[N, cols]`.
    pub fn nearest(weight: &[f32], cols: usize, cast: Cast) -> Self {
        let block = cast.format.block.size();
        let mut codes = vec![0; weight.len()];
        let mut scales = vec![E8m0::ONE; weight.len() / block];
        let blocks = codes.par_chunks_exact_mut(block).zip(weight.par_chunks_exact(block));
        scales.par_iter_mut().zip(blocks).with_min_len(256).for_each(|(scale, (codes, x))| {
            *scale = quantize_block(cast, x, codes);
        });
        Self { cast, cols, codes, scales }
    }

    /// The values `[N, K]`, rounded to F32 once.
    pub fn dequantize(&self) -> Vec<f32> {
        let block = self.cast.format.block.size();
        let values = self.cast.format.element.values();
        let mut out = Vec::with_capacity(self.codes.len());
        for (codes, scale) in self.codes.chunks_exact(block).zip(&self.scales) {
            let scale = scale.to_f32();
            out.extend(codes.iter().map(|&code| values[usize::from(code)] * scale));
        }
        out
    }

    /// Codes as they are stored, rows one after the other.
    pub fn packed_codes(&self) -> Vec<u8> {
        let mut packed = vec![0; self.cast.format.code_bytes(self.codes.len())];
        pack(&self.codes, self.cast.format.element.spec().bits, &mut packed);
        packed
    }

    /// Scales as they are stored.
    pub fn scale_bytes(&self) -> Vec<u8> {
        self.scales.iter().map(|scale| scale.0).collect()
    }

    /// What was lost against `weight` `[N, K]`, element by element.
    pub fn energy(&self, weight: &[f32]) -> Energy {
        let pairs = weight.iter().zip(self.dequantize());
        pairs.fold(Energy::default(), |sum, (&w, q)| {
            let (w, error) = (f64::from(w), f64::from(w) - f64::from(q));
            Energy { signal: sum.signal + w * w, noise: sum.noise + error * error }
        })
    }
}

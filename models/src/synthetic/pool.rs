//! Weights that are quick to make: rows are cut from a pool of random blocks, each from a place of its own.

use half::bf16;
use kernels::DenseDtype;
use kernels::mx::{ElementRounding, Scheme, Values, quantize_rows};

use crate::ModelError;
use crate::checkpoint::{DenseTensor, LinearTensor, MxLinear};

/// Elements of a pool: far fewer than a model has, enough that rows start at thousands of different places.
const ELEMENTS: usize = 1 << 18;

/// Standard deviation of the weights: what most models are initialized with.
const DEVIATION: f32 = 0.02;

/// Seed of the pool's weights.
const SEED: u64 = 0x6d78;

/// Random weights in one format.
pub(super) struct Pool {
    scheme: Option<Scheme>,
    /// Elements that stay together: a block, or one BF16 number.
    unit: usize,
    /// Packed codes, or BF16.
    codes: Vec<u8>,
    /// One byte a unit; empty for BF16.
    scales: Vec<u8>,
}

impl Pool {
    /// BF16 weights.
    pub(super) fn dense() -> Self {
        Self { scheme: None, unit: 1, codes: normal_bf16(), scales: Vec::new() }
    }

    /// Weights that `scheme` quantizes.
    pub(super) fn mx(scheme: Scheme) -> Self {
        let format = scheme.weight.format;
        let values = normal_bf16();
        let mut codes = vec![0; format.code_bytes(ELEMENTS)];
        let mut scales = vec![0; format.scale_bytes(ELEMENTS)];
        let rounding = ElementRounding::NearestEven;
        quantize_rows(scheme.weight, rounding, Values::Bf16(&values), 0, &mut codes, &mut scales)
            .expect("sums of uniform numbers are finite");
        Self { scheme: Some(scheme), unit: format.block.size(), codes, scales }
    }

    /// The weight of `module`, `shape` = `[rows, cols]`; it depends on nothing but these and the format.
    pub(super) fn tensor(&self, module: &str, shape: [usize; 2]) -> Result<LinearTensor, ModelError> {
        let [rows, cols] = shape;
        let (units, held) = (cols / self.unit, ELEMENTS / self.unit);
        let mut random = fastrand::Rng::with_seed(seed(module));
        let starts: Vec<usize> = (0..rows).map(|_| random.usize(..held)).collect();
        let codes = cut(&self.codes, self.codes.len() / held, &starts, units);
        match self.scheme {
            None => {
                let shape = shape.to_vec();
                let dtype = DenseDtype::Bf16;
                Ok(LinearTensor::Dense(DenseTensor { name: module.to_owned(), dtype, shape, bytes: codes }))
            }
            Some(scheme) => {
                let scales = cut(&self.scales, 1, &starts, units);
                MxLinear::new(scheme, shape, codes, scales)
                    .map(LinearTensor::Mx)
                    .map_err(|error| ModelError::Synthetic { tensor: module.to_owned(), error })
            }
        }
    }
}

/// For each start, `units` units of `pool` from there on, over its end to its beginning.
fn cut(pool: &[u8], unit_bytes: usize, starts: &[usize], units: usize) -> Vec<u8> {
    let row_bytes = units * unit_bytes;
    let mut out = Vec::with_capacity(starts.len() * row_bytes);
    for start in starts {
        let mut rest = &pool[start * unit_bytes..];
        let mut missing = row_bytes;
        while missing > 0 {
            let taken = rest.len().min(missing);
            out.extend_from_slice(&rest[..taken]);
            missing -= taken;
            rest = pool;
        }
    }
    out
}

/// Normally distributed numbers, little-endian: the sum of twelve uniform ones has variance 1.
fn normal_bf16() -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(SEED);
    let mut normal = || (0..12).map(|_| random.f32()).sum::<f32>() - 6.0;
    (0..ELEMENTS).flat_map(|_| bf16::from_f32(DEVIATION * normal()).to_le_bytes()).collect()
}

/// FNV-1a.
fn seed(name: &str) -> u64 {
    name.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

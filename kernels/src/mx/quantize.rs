//! Direct cast of rows to an MX format: what callers see. The loops are in [`super::block`].

use std::iter::Sum;
use std::ops::{Add, AddAssign};

use super::block::{QuantizeBlock, QuantizeDequantize, QuantizeRows};
use super::{Cast, E8m0};
use crate::isa::Isa;

/// How an element is rounded to its grid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ElementRounding {
    /// To the nearest value, ties to the even code.
    NearestEven,
    /// To one of the two neighbouring values, away from zero with probability by distance: `floor(|y| / step + u)`
    /// steps with u uniform in [0, 1), so the expected value is y (where y does not saturate). Reproducible: u depends
    /// on `seed` and the element's index alone, whatever the chunks a tensor is quantized in.
    Stochastic {
        /// Seed; give each tensor its own.
        seed: u64,
    },
}

/// Little-endian values to quantize.
#[derive(Debug, Clone, Copy)]
pub enum Values<'a> {
    /// bfloat16 bytes.
    Bf16(&'a [u8]),
    /// IEEE half bytes.
    F16(&'a [u8]),
    /// IEEE single bytes.
    F32(&'a [u8]),
}

impl Values<'_> {
    /// Number of values; a trailing partial value does not count.
    pub const fn len(&self) -> usize {
        match self {
            Self::Bf16(bytes) | Self::F16(bytes) => bytes.len() / 2,
            Self::F32(bytes) => bytes.len() / 4,
        }
    }

    /// Whether there are no values.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The input holds NaN or Inf.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("element {index} is {value}")]
pub struct NonFinite {
    /// Index into the tensor: `first_index` plus the index into the input.
    pub index: usize,
    /// The offending value, as text: `NaN`, `inf`, `-inf`.
    pub value: &'static str,
}

impl NonFinite {
    /// The first NaN or Inf of a block that has one; `first_index` is the index of its first value.
    #[cold]
    pub(super) fn find(block: &[f32], first_index: u64) -> Self {
        let offset = block.iter().position(|x| !x.is_finite()).unwrap_or_default();
        let value = match block[offset] {
            f32::INFINITY => "inf",
            f32::NEG_INFINITY => "-inf",
            _ => "NaN",
        };
        Self { index: first_index as usize + offset, value }
    }
}

/// Signal and error energy of a quantization, additive over chunks of a tensor.
///
/// Each block is summed in units of its scale, so neither underflow nor overflow of F32 shows.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Energy {
    /// Sum of x^2.
    pub signal: f64,
    /// Sum of (x - q)^2, q the element value times the scale.
    pub noise: f64,
}

impl Energy {
    /// Signal to quantization noise ratio, 10 log10(signal / noise), in dB; +inf when nothing was lost.
    pub fn sqnr_db(&self) -> f64 {
        if self.noise == 0.0 { f64::INFINITY } else { 10.0 * (self.signal / self.noise).log10() }
    }
}

impl Add for Energy {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { signal: self.signal + other.signal, noise: self.noise + other.noise }
    }
}

impl AddAssign for Energy {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sum for Energy {
    fn sum<I: Iterator<Item = Self>>(energies: I) -> Self {
        energies.fold(Self::default(), Self::add)
    }
}

/// Quantizes whole rows, or any whole number of blocks, to packed codes and scales. Does not allocate.
///
/// `first_index` is the index in the tensor of the first value: it counts for stochastic rounding and in errors.
///
/// # Errors
/// The first NaN or Inf; `codes` and `scales` then hold nothing of use.
///
/// # Panics
/// `values` is not a whole number of blocks, or `codes` or `scales` do not have exactly the bytes it takes.
pub fn quantize_rows(
    cast: Cast,
    rounding: ElementRounding,
    values: Values<'_>,
    first_index: u64,
    codes: &mut [u8],
    scales: &mut [u8],
) -> Result<Energy, NonFinite> {
    let (n, format) = (values.len(), cast.format);
    assert!(n.is_multiple_of(format.block.size()), "{n} values are no whole number of blocks of {format}");
    assert_eq!(codes.len(), format.code_bytes(n), "bytes of codes for {n} values of {format}");
    assert_eq!(scales.len(), format.scale_bytes(n), "scales for {n} values of {format}");
    Isa::best().quantize(cast, QuantizeRows { rounding, values, first_index, codes, scales })
}

/// Quantizes `x` and decodes it again: the exact values a quantized activation row has, rounded to F32 once. A block
/// with NaN or Inf becomes NaN as a whole. Does not allocate.
///
/// # Panics
/// `x` is not a whole number of blocks, or `out` is not as long as `x`.
pub fn quantize_dequantize(cast: Cast, x: &[f32], out: &mut [f32]) {
    let format = cast.format;
    assert!(
        x.len().is_multiple_of(format.block.size()),
        "{} values are no whole number of blocks of {format}",
        x.len()
    );
    assert_eq!(x.len(), out.len(), "one output per value");
    Isa::best().quantize(cast, QuantizeDequantize { x, out });
}

/// Quantizes one block to one code per byte (not packed), and returns its scale. A block with NaN or Inf gets the
/// scale [`E8m0::NAN`] and codes 0.
///
/// # Panics
/// `x` or `codes` are not one block long.
pub fn quantize_block(cast: Cast, x: &[f32], codes: &mut [u8]) -> E8m0 {
    let block = cast.format.block.size();
    assert_eq!(x.len(), block, "one block of {}", cast.format);
    assert_eq!(codes.len(), block, "one code per value");
    Isa::best().quantize(cast, QuantizeBlock { x, codes })
}

//! Activations as integers: what the int8 dot products of a linear layer read.
//!
//! Per token and block of 32, `x = 2^e * integers`. There are two kinds:
//!
//! - A declared MX format whose elements are integers times a power of two: those integers, one byte each.
//! - Everything else (weight-only schemes, MXFP8 or E3M2 activations, other block sizes): 16-bit block fixed point,
//!   after the declared quantization, if any. 2^e is the smallest power of two, but at least 2^-126, for which the
//!   block's largest magnitude stays below 32639 * 2^e; values are rounded to integers, ties to even. So the error is at
//!   most 2^(e - 1), which is below 2^-15 of the block's largest magnitude: BF16 has 2^-9 of each value. An integer v is
//!   held as two signed bytes, `v = 256 * hi + lo` (hence 32639 = 127 * 256 + 127): two planes that are multiplied by
//!   the same decoded weights.
//!
//! A block with NaN, an infinity or a magnitude of 2^100 or more makes its row NaN.
//!
//! Rows come in tiles of T tokens, each tile one stream of words. Per block, with P planes:
//!
//! | words | content |
//! |---|---|
//! | T x P | where the sums of products start |
//! | T x P | F32: what to subtract from the sums' bits |
//! | 8 x T x P | four integers each |
//!
//! Sums start at the bits of m = 1.5 * 2^(23 + e'), where 2^e' is the unit of the products, less what the weights'
//! offset will add to them. Then the sum's bits are those of the float m + 2^e' * sum, since |sum| < 2^22, and a
//! subtraction leaves 2^e' * sum, exactly: no conversion, no multiplication.

use std::ops::RangeInclusive;

use super::codec::{IntegerCodec, factor_log2};
use crate::cpu::packed::BLOCK;
use crate::cpu::simd::dot::{Dot, DotWork};
use crate::cpu::simd::{LANES, Lanes};
use crate::mx::{Cast, E8m0, ScaleRounding, SharedExponent, quantize_block};

/// Exponents of units of products, the lower plane's where there are two, that together with [`NARROW_SCALES`] keep all
/// of a product's numbers normal, so that a scale can be added to their exponents.
pub(super) const NARROW_UNITS: RangeInclusive<i32> = -60..=30;
/// Scales of weights, as bytes, for the same.
pub(super) const NARROW_SCALES: RangeInclusive<u8> = 127 - 60..=127 + 60;

/// Words of one token, block and plane.
pub(super) const PLANE_WORDS: usize = 2 + BLOCK / 4;

/// F32 bits of 2^100: magnitudes from here on count as not finite, so that every exponent in use is a normal one.
const LIMIT: u32 = (127 + 100) << 23;

/// Added to the bits of an F32, carries into the exponent from 32639 / 2^14 on.
const FIXED_POINT_CARRY: u32 = 0x80_0000 - 0x7E_FE00;
/// Bits below the leading one of a fixed-point block's largest magnitude.
const FIXED_POINT_BITS: i32 = 14;
/// Least exponent of a fixed-point block.
const FIXED_POINT_MIN: i32 = -126;

/// An element grid, in units that make its values integers.
#[derive(Debug, Clone, Copy)]
struct IntegerGrid {
    cast: Cast,
    exponent: SharedExponent,
    /// Smallest binade with a step of its own; 1 for integers.
    min_binade: f32,
    /// Times the binade: a value whose last mantissa bit is the step, and that keeps the sign of what is added to it.
    magic: f32,
    max: f32,
    factor: f32,
}

/// Turns rows into an image.
#[derive(Debug, Clone, Copy)]
pub(super) struct Quantizer {
    /// What the weights' bytes are raised by.
    offset: i32,
    /// Exponent of the products' unit, less that of the block.
    unit_log2: i32,
    /// `None` for 16-bit fixed point.
    grid: Option<IntegerGrid>,
}

impl Quantizer {
    /// The quantizer of `codec`'s activations, for weights that are raised by `offset`.
    pub(super) fn new(codec: &IntegerCodec, offset: i32) -> Self {
        let grid = codec.image.map(|cast| {
            let spec = cast.format.element.spec();
            IntegerGrid {
                cast,
                exponent: SharedExponent::new(spec, cast.scale_rounding),
                min_binade: power(if spec.is_integer() { 0 } else { spec.emin() }),
                magic: 1.5 * power(23 - spec.mantissa_bits as i32),
                max: spec.max,
                factor: spec.int8_factor().unwrap_or(1.0),
            }
        });
        let image_log2 = codec.image.and_then(|cast| factor_log2(cast.format.element)).unwrap_or(0);
        Self { offset, unit_log2: -codec.factor_log2 - image_log2, grid }
    }
}

/// 2^n for a normal F32.
#[inline(always)]
const fn power(n: i32) -> f32 {
    f32::from_bits(((n + 127) as u32) << 23)
}

/// A block's exponent and integers in 16-bit fixed point.
#[inline(always)]
unsafe fn fixed_point<D: Dot>(x: *const f32, amax: u32) -> (i32, [D; 2]) {
    let binade = ((amax + FIXED_POINT_CARRY) >> 23) as i32 - 127;
    let exponent = (binade - FIXED_POINT_BITS).max(FIXED_POINT_MIN);
    // SAFETY: the caller's conditions.
    unsafe {
        let scale = D::Float::splat(power(-exponent));
        let (first, second) = (D::Float::load(x).mul(scale), D::Float::load(x.add(LANES)).mul(scale));
        (exponent, [D::nearest(first), D::nearest(second)])
    }
}

/// A block's exponent and integers on an element grid.
#[inline(always)]
unsafe fn on_grid<D: Dot, const FLOAT: bool>(grid: &IntegerGrid, x: *const f32, amax: u32) -> (i32, [D; 2]) {
    // SAFETY: the caller's conditions.
    unsafe {
        let scale = if grid.cast.scale_rounding == ScaleRounding::Mse {
            let mut codes = [0; BLOCK];
            quantize_block(grid.cast, std::slice::from_raw_parts(x, BLOCK), &mut codes)
        } else {
            grid.exponent.of(amax)
        };
        let reciprocal = D::Float::splat(scale.reciprocal().to_f32());
        let (max, min) = (D::Float::splat(grid.max), D::Float::splat(-grid.max));
        let (magic, factor) = (D::Float::splat(grid.magic), D::Float::splat(grid.factor));
        let min_binade = D::Float::splat(grid.min_binade);
        let mut integers = [D::splat(0); 2];
        for (i, out) in integers.iter_mut().enumerate() {
            let y = D::Float::load(x.add(LANES * i)).mul(reciprocal).min(max).max(min);
            *out = if FLOAT {
                let magic = D::binade(y).max(min_binade).mul(magic);
                D::nearest(y.add(magic).sub(magic).mul(factor))
            } else {
                D::nearest(y.mul(factor))
            };
        }
        (i32::from(scale.0) - i32::from(E8m0::ONE.0), integers)
    }
}

/// Where the words of one token and block go.
#[derive(Clone, Copy)]
struct Place {
    /// The block's first word.
    block: *mut i32,
    /// Tokens of the tile.
    tokens: usize,
    token: usize,
}

impl Place {
    /// Writes item `item` of `plane`: 0 is the start, 1 the subtrahend, then quads.
    #[inline(always)]
    unsafe fn write<const PLANES: usize>(self, item: usize, plane: usize, word: i32) {
        // SAFETY: the caller's place is inside the image.
        unsafe { *self.block.add((item * self.tokens + self.token) * PLANES + plane) = word };
    }

    #[inline(always)]
    unsafe fn write_plane<D: Dot, const PLANES: usize>(self, plane: usize, integers: [D; 2]) {
        let mut words = [0_i32; BLOCK / 4];
        // SAFETY: 32 bytes; the caller's place is inside the image.
        unsafe {
            let bytes = words.as_mut_ptr().cast::<i8>();
            integers[0].store_bytes(bytes);
            integers[1].store_bytes(bytes.add(LANES));
            for (q, word) in words.into_iter().enumerate() {
                self.write::<PLANES>(2 + q, plane, word);
            }
        }
    }

    /// Writes where sums whose unit is 2^`unit_log2` start, and what is subtracted from them.
    #[inline(always)]
    unsafe fn write_unit<const PLANES: usize>(self, plane: usize, unit_log2: i32, raised: i32) {
        let magic = (1.5 * power(23 + unit_log2)).to_bits() as i32;
        // SAFETY: the caller's place is inside the image.
        unsafe {
            self.write::<PLANES>(0, plane, magic.wrapping_sub(raised));
            self.write::<PLANES>(1, plane, magic);
        }
    }
}

/// Writes one token's block; returns whether its units are [`NARROW_UNITS`]. `KIND` is 0 for fixed point, 1 for an integer
/// grid and 2 for a float grid.
#[inline(always)]
unsafe fn quantize_one<D: Dot, const KIND: u8, const PLANES: usize>(
    q: &Quantizer,
    grid: Option<&IntegerGrid>,
    x: *const f32,
    place: Place,
) -> bool {
    // SAFETY: the caller's conditions.
    unsafe {
        let amax = D::max_magnitude(x);
        if amax >= LIMIT {
            for plane in 0..PLANES {
                place.write_plane::<D, PLANES>(plane, [D::splat(0); 2]);
                place.write::<PLANES>(0, plane, 0);
                place.write::<PLANES>(1, plane, f32::NAN.to_bits() as i32);
            }
            return false;
        }
        let (exponent, integers) = match grid {
            Some(grid) if KIND == 1 => on_grid::<D, false>(grid, x, amax),
            Some(grid) => on_grid::<D, true>(grid, x, amax),
            None => fixed_point::<D>(x, amax),
        };
        // Zeros are zeros in any unit.
        let unit_log2 = q.unit_log2 + if amax == 0 { 0 } else { exponent };
        let sum = if q.offset == 0 { 0 } else { integers[0].sum(integers[1]) };
        if PLANES == 1 {
            place.write_unit::<PLANES>(0, unit_log2, q.offset * sum);
            place.write_plane::<D, PLANES>(0, integers);
        } else {
            let upper = [integers[0].upper_byte(), integers[1].upper_byte()];
            let upper_sum = if q.offset == 0 { 0 } else { upper[0].sum(upper[1]) };
            place.write_unit::<PLANES>(0, unit_log2 + 8, q.offset * upper_sum);
            place.write_plane::<D, PLANES>(0, upper);
            place.write_unit::<PLANES>(1, unit_log2, q.offset * (sum - 256 * upper_sum));
            place.write_plane::<D, PLANES>(1, integers);
        }
        NARROW_UNITS.contains(&unit_log2)
    }
}

/// Rows to quantize: `tokens` of `blocks` blocks, `stride` floats apart.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub(super) start: *const f32,
    pub(super) stride: usize,
    pub(super) tokens: usize,
    pub(super) blocks: usize,
}

/// Writes the image of one tile; says whether all of its units are [`NARROW_UNITS`].
pub(super) struct QuantizeTile<'a> {
    pub(super) quantizer: &'a Quantizer,
    pub(super) x: Rows,
    /// `tokens * blocks * planes * PLANE_WORDS` words.
    pub(super) image: *mut i32,
}

impl QuantizeTile<'_> {
    #[inline(always)]
    unsafe fn blocks<D: Dot, const KIND: u8, const PLANES: usize>(self, grid: Option<&IntegerGrid>) -> bool {
        let Self { quantizer, x, image } = self;
        let mut narrow = true;
        // SAFETY: rows and image hold the tile.
        unsafe {
            for b in 0..x.blocks {
                let block = image.add(b * x.tokens * PLANES * PLANE_WORDS);
                for token in 0..x.tokens {
                    let place = Place { block, tokens: x.tokens, token };
                    let source = x.start.add(token * x.stride + b * BLOCK);
                    narrow &= quantize_one::<D, KIND, PLANES>(quantizer, grid, source, place);
                }
            }
        }
        narrow
    }
}

impl DotWork for QuantizeTile<'_> {
    type Output = bool;

    #[inline(always)]
    unsafe fn run<D: Dot>(self) -> bool {
        // SAFETY: rows and image hold the tile.
        unsafe {
            match &self.quantizer.grid {
                None => self.blocks::<D, 0, 2>(None),
                Some(grid) if grid.cast.format.element.spec().is_integer() => {
                    self.blocks::<D, 1, 1>(Some(grid))
                }
                Some(grid) => self.blocks::<D, 2, 1>(Some(grid)),
            }
        }
    }
}

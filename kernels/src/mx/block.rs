//! The loops of quantization, block by block. Each is a [`BlockLoop`]: one source, compiled once for every element
//! grid, block size and instruction set ([`super::isa`]), with the same result bit for bit.

use std::hint::black_box;

use super::grid::{FloatGrid, Grid, IntegerGrid};
use super::load::load;
use super::pack::pack_inlined;
use super::random::Stream;
use super::scale::SharedExponent;
use super::{Cast, E8m0, ElementRounding, Energy, NonFinite, ScaleRounding, Values};

/// Bits of F32 infinity: magnitudes at or above are not finite.
const INFINITY: u32 = 0x7f80_0000;

/// Sums are kept in this many lanes, whatever the vector width, so that every instruction set adds in the same order.
const LANES: usize = 8;

/// Work on blocks, generic over block size and grid. `run` is `#[inline(always)]` in every implementation: the
/// caller's instruction set reaches only what is inlined into it.
pub(super) trait BlockLoop {
    /// Result of the whole loop.
    type Output;

    /// Does the work with blocks of `B` values.
    fn run<const B: usize, G: Grid>(self, cast: BlockCast<G>) -> Self::Output;
}

/// Runs `work` with the block size and grid of `cast`.
#[inline(always)]
pub(super) fn specialize<L: BlockLoop>(cast: Cast, work: L) -> L::Output {
    let spec = cast.format.element.spec();
    if spec.is_integer() {
        sized(cast, IntegerGrid::new(spec), work)
    } else {
        sized(cast, FloatGrid::new(spec), work)
    }
}

#[inline(always)]
fn sized<G: Grid, L: BlockLoop>(cast: Cast, grid: G, work: L) -> L::Output {
    let spec = cast.format.element.spec();
    let exponent = SharedExponent::new(spec, cast.scale_rounding);
    let search = cast.scale_rounding == ScaleRounding::Mse;
    let block_cast = BlockCast { grid, exponent, search, bits: spec.bits };
    match cast.format.block.size() {
        16 => work.run::<16, G>(block_cast),
        32 => work.run::<32, G>(block_cast),
        64 => work.run::<64, G>(block_cast),
        other => unreachable!("no Block has {other} elements"),
    }
}

/// A [`Cast`], ready to be applied to blocks.
#[derive(Debug, Clone, Copy)]
pub(super) struct BlockCast<G> {
    grid: G,
    exponent: SharedExponent,
    search: bool,
    bits: u32,
}

impl<G: Grid> BlockCast<G> {
    /// The block's scale; `None` with NaN or Inf in it.
    #[inline(always)]
    fn scale<const B: usize>(self, x: &[f32; B]) -> Option<E8m0> {
        let amax_bits = x.iter().fold(0, |amax, v| amax.max(v.to_bits() & (u32::MAX >> 1)));
        if amax_bits >= INFINITY {
            return None;
        }
        let scale = self.exponent.of(amax_bits);
        Some(if self.search { self.least_error(x, scale) } else { scale })
    }

    /// [`ScaleRounding::Mse`]: the best of `start` and its two neighbours within E8M0.
    #[inline(always)]
    fn least_error<const B: usize>(self, x: &[f32; B], start: E8m0) -> E8m0 {
        let y = scaled(x, start);
        let (below, above) = (start.shifted(-1), start.shifted(1));
        let error = self.squared_error(&y, start, start);
        let error_below = self.squared_error(&y, start, below);
        let error_above = self.squared_error(&y, start, above);
        // In this order and with `<`, `start` wins ties, then `below`.
        let (error, best) = if error_below < error { (error_below, below) } else { (error, start) };
        if error_above < error { above } else { best }
    }

    /// Squared error of a block with scale `candidate`; `y` and the result are in units of `unit`. The differences are
    /// exact in F32 and their squares in F64; only the sum rounds.
    #[inline(always)]
    fn squared_error<const B: usize>(self, y: &[f32; B], unit: E8m0, candidate: E8m0) -> f64 {
        let exponent = i32::from(candidate.0) - i32::from(unit.0);
        let (down, up) = (E8m0::ONE.shifted(-exponent).to_f32(), E8m0::ONE.shifted(exponent).to_f32());
        let mut error = [0.0; B];
        for (error, &y) in error.iter_mut().zip(y) {
            *error = y - self.grid.nearest(y * down).1 * up;
        }
        SquareSum::of(&error).total()
    }

    /// Codes and grid values of `y`, a block in units of its scale.
    #[inline(always)]
    fn nearest<const B: usize>(self, y: &[f32; B]) -> ([u8; B], [f32; B]) {
        let (mut codes, mut values) = ([0; B], [0.0; B]);
        for ((code, value), &y) in codes.iter_mut().zip(&mut values).zip(y) {
            (*code, *value) = self.grid.nearest(y);
        }
        (codes, values)
    }

    /// As [`Self::nearest`], at random; `first` is the index of the first element in its tensor.
    #[inline(always)]
    fn stochastic<const B: usize>(self, y: &[f32; B], stream: Stream, first: u64) -> ([u8; B], [f32; B]) {
        let (mut codes, mut values) = ([0; B], [0.0; B]);
        for (((code, value), &y), index) in codes.iter_mut().zip(&mut values).zip(y).zip(first..) {
            (*code, *value) = self.grid.stochastic(y, stream.bits(index));
        }
        (codes, values)
    }
}

/// `x` in units of `scale`. Exact but for values so far below the grid that they round to zero on it anyway.
#[inline(always)]
fn scaled<const B: usize>(x: &[f32; B], scale: E8m0) -> [f32; B] {
    let reciprocal = scale.reciprocal().to_f32();
    x.map(|x| x * reciprocal)
}

/// A sum of squares in the making: element `i` of a block goes to lane `i % LANES`.
#[derive(Debug, Clone, Copy, Default)]
struct SquareSum([f64; LANES]);

impl SquareSum {
    #[inline(always)]
    fn of<const B: usize>(x: &[f32; B]) -> Self {
        let mut lanes = [0.0; LANES];
        for x in x.as_chunks::<LANES>().0 {
            for (lane, &x) in lanes.iter_mut().zip(x) {
                *lane += f64::from(x) * f64::from(x);
            }
        }
        Self(lanes)
    }

    /// Adds a sum in units of `unit`.
    #[inline(always)]
    fn add(&mut self, other: Self, unit: f64) {
        for (lane, other) in self.0.iter_mut().zip(other.0) {
            *lane += other * unit;
        }
    }

    #[inline(always)]
    fn total(self) -> f64 {
        // Kept in memory, the lanes are one vector. Otherwise the compiler sees how they are added up here, and computes
        // them two at a time from the start, at half the speed.
        let [a, b, c, d, e, f, g, h] = black_box(self.0);
        ((a + e) + (c + g)) + ((b + f) + (d + h))
    }
}

/// [`quantize_rows`](super::quantize_rows); the lengths have been checked.
pub(super) struct QuantizeRows<'a> {
    pub(super) rounding: ElementRounding,
    pub(super) values: Values<'a>,
    pub(super) first_index: u64,
    pub(super) codes: &'a mut [u8],
    pub(super) scales: &'a mut [u8],
}

impl BlockLoop for QuantizeRows<'_> {
    type Output = Result<Energy, NonFinite>;

    #[inline(always)]
    fn run<const B: usize, G: Grid>(self, cast: BlockCast<G>) -> Self::Output {
        let (mut signal, mut noise) = (SquareSum::default(), SquareSum::default());
        let code_bytes = B * cast.bits as usize / 8;
        for (block, (packed, scale_byte)) in
            self.codes.chunks_exact_mut(code_bytes).zip(self.scales).enumerate()
        {
            let first = block * B;
            let first_index = self.first_index + first as u64;
            let x: [f32; B] = load(self.values, first);
            let Some(scale) = cast.scale(&x) else { return Err(NonFinite::find(&x, first_index)) };
            let y = scaled(&x, scale);
            let (codes, values) = match self.rounding {
                ElementRounding::NearestEven => cast.nearest(&y),
                ElementRounding::Stochastic { seed } => cast.stochastic(&y, Stream::new(seed), first_index),
            };
            let mut error = [0.0; B];
            for ((error, y), value) in error.iter_mut().zip(&y).zip(&values) {
                *error = y - value;
            }
            let unit = scale.squared();
            signal.add(SquareSum::of(&y), unit);
            noise.add(SquareSum::of(&error), unit);
            *scale_byte = scale.0;
            pack_inlined(&codes, cast.bits, packed);
        }
        Ok(Energy { signal: signal.total(), noise: noise.total() })
    }
}

/// [`quantize_dequantize`](super::quantize_dequantize); the lengths have been checked.
pub(super) struct QuantizeDequantize<'a> {
    pub(super) x: &'a [f32],
    pub(super) out: &'a mut [f32],
}

impl BlockLoop for QuantizeDequantize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const B: usize, G: Grid>(self, cast: BlockCast<G>) {
        for (x, out) in self.x.as_chunks::<B>().0.iter().zip(self.out.as_chunks_mut::<B>().0) {
            match cast.scale(x) {
                Some(scale) => {
                    let (_, values) = cast.nearest(&scaled(x, scale));
                    *out = values.map(|value| value * scale.to_f32());
                }
                None => *out = [f32::NAN; B],
            }
        }
    }
}

/// [`quantize_block`](super::quantize_block); the lengths have been checked.
pub(super) struct QuantizeBlock<'a> {
    pub(super) x: &'a [f32],
    pub(super) codes: &'a mut [u8],
}

impl BlockLoop for QuantizeBlock<'_> {
    type Output = E8m0;

    #[inline(always)]
    fn run<const B: usize, G: Grid>(self, cast: BlockCast<G>) -> E8m0 {
        let mut result = E8m0::NAN;
        for (x, codes) in self.x.as_chunks::<B>().0.iter().zip(self.codes.as_chunks_mut::<B>().0) {
            (*codes, result) = match cast.scale(x) {
                Some(scale) => (cast.nearest(&scaled(x, scale)).0, scale),
                None => ([0; B], E8m0::NAN),
            };
        }
        result
    }
}

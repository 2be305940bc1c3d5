//! One tile of an integer product: a row group x up to eight tokens, along a range of K.

#![allow(clippy::needless_range_loop, reason = "registers of a tile are indexed by token")]

use std::ops::Range;

use super::codec::{Bytes, CodeKind, Codec, Decoded, IntegerCodec, Nibbles, Sextets};
use super::image::{NARROW_SCALES, PLANE_WORDS};
use super::integer::Problem;
use crate::cpu::simd::dot::{Dot, DotWork};
use crate::cpu::simd::{LANES, Lanes};

/// Bytes of a cache line.
pub(super) const LINE: usize = 64;

/// Packed weights of 4 bits, by their codec.
pub(super) const NIBBLES: u8 = CodeKind::Nibbles as u8;
/// Of 6 bits.
pub(super) const SEXTETS: u8 = CodeKind::Sextets as u8;
/// Of 8 bits.
pub(super) const BYTES: u8 = CodeKind::Bytes as u8;
/// A panel of decoded codes.
pub(super) const DECODED: u8 = BYTES + 1;
/// A panel of whole bytes, where they multiply in another way.
pub(super) const DECODED_BYTES: u8 = BYTES + 2;
/// A panel of what multiplies as decoded codes do, whose scales and units are [narrow](super::image::NARROW_UNITS).
pub(super) const NARROW: u8 = BYTES + 3;

/// A tile's sums over one block, `[token][plane]`.
type Sums<D, const P: usize, const T: usize> = [[D; P]; T];

/// Where the sums of the block at `x` start.
#[inline(always)]
unsafe fn start<D: Dot, const P: usize, const T: usize>(x: *const i32) -> Sums<D, P, T> {
    // SAFETY: the caller's block has the words.
    unsafe {
        let mut sums = [[D::splat(0); P]; T];
        for t in 0..T {
            for p in 0..P {
                sums[t][p] = D::splat(*x.add(t * P + p));
            }
        }
        sums
    }
}

/// Adds quad `q` of the block at `x` times the decoded weights `w`.
#[inline(always)]
unsafe fn multiply<D: Dot, const BYTES: bool, const P: usize, const T: usize>(
    sums: &mut Sums<D, P, T>,
    w: D,
    x: *const i32,
    q: usize,
) {
    // SAFETY: the caller's block has the words.
    unsafe {
        for t in 0..T {
            for p in 0..P {
                let x = D::splat(*x.add((2 + q) * T * P + t * P + p));
                let sum = sums[t][p];
                sums[t][p] = if BYTES { sum.dot_bytes(w, x) } else { sum.dot_codes(w, x) };
            }
        }
    }
}

/// Adds the sums of the block at `x`, in its unit and times the weights' scale, to the totals.
#[inline(always)]
unsafe fn fold<D: Dot, const P: usize, const T: usize>(
    totals: &mut [D::Float; T],
    sums: Sums<D, P, T>,
    x: *const i32,
    scale: D::Float,
) {
    // SAFETY: the caller's block has the words.
    unsafe {
        for t in 0..T {
            let mut value = D::Float::splat(0.0);
            for p in 0..P {
                let magic = D::Float::splat(f32::from_bits(*x.add(T * P + t * P + p) as u32));
                let plane = sums[t][p].as_floats().sub(magic);
                value = if p == 0 { plane } else { value.add(plane) };
            }
            totals[t] = value.mul_add(scale, totals[t]);
        }
    }
}

/// As [`start`], with the weights' scales added to the exponents, so that the sums are scaled.
#[inline(always)]
unsafe fn start_scaled<D: Dot, const P: usize, const T: usize>(x: *const i32, scales: D) -> Sums<D, P, T> {
    // SAFETY: the caller's block has the words.
    unsafe {
        let mut sums = start::<D, P, T>(x);
        for t in 0..T {
            for p in 0..P {
                sums[t][p] = sums[t][p].add(scales);
            }
        }
        sums
    }
}

/// Adds the sums of [`start_scaled`] to the totals. That is what [`fold`] does: scaled sums are exact, and a fused
/// multiplication by a power of two rounds as the addition alone. But the additions have execution units of their own,
/// where the fused ones compete with the dot products.
#[inline(always)]
unsafe fn fold_scaled<D: Dot, const P: usize, const T: usize>(
    totals: &mut [D::Float; T],
    sums: Sums<D, P, T>,
    x: *const i32,
    scales: D,
) {
    // SAFETY: the caller's block has the words.
    unsafe {
        for t in 0..T {
            let mut value = D::Float::splat(0.0);
            for p in 0..P {
                let magic = D::splat(*x.add(T * P + t * P + p)).add(scales).as_floats();
                let plane = sums[t][p].as_floats().sub(magic);
                value = if p == 0 { plane } else { value.add(plane) };
            }
            totals[t] = value.add(totals[t]);
        }
    }
}

/// Dot products per quad up to which weights pass as fast as memory gives them.
///
/// They are read in the order of their addresses, and hardware prefetchers then do better alone than with any prefetches
/// of ours (measured at distances from 256 to 16384 bytes). With more work between the loads they fall behind.
const MEMORY_BOUND_DOTS: usize = 2;

/// Asks for what follows `block` in memory.
#[inline(always)]
unsafe fn prefetch<D: Dot, C: Codec<D>>(block: *const u8) {
    /// Bytes ahead, for the first cache.
    const NEAR: usize = 512;
    /// And for the second.
    const FAR: usize = 8192;
    for line in (0..C::BLOCK_BYTES).step_by(LINE) {
        // SAFETY: an address may be any.
        unsafe {
            D::prefetch::<false>(block.wrapping_add(NEAR + line));
            D::prefetch::<true>(block.wrapping_add(FAR + line));
        }
    }
}

/// Memory for a strip's weights after decoding.
#[derive(Clone, Copy)]
pub(super) struct Panel {
    /// [`Decoded`] blocks.
    pub(super) codes: *mut u8,
    /// Their scales: F32, or I32 for the exponents.
    pub(super) scales: *mut f32,
    /// Whether scales are for the exponents.
    pub(super) exponents: bool,
}

impl Panel {
    /// For tiles that keep nothing.
    pub(super) const NONE: Self =
        Self { codes: std::ptr::null_mut(), scales: std::ptr::null_mut(), exponents: false };

    /// Keeps quads `4 * half .. 4 * half + 4` of block `b`.
    #[inline(always)]
    unsafe fn keep_quads<D: Dot>(self, b: usize, half: usize, quads: [D; 4]) {
        // SAFETY: the panel has room for the strip.
        unsafe {
            let out = self.codes.add(b * <Decoded<false, false> as Codec<D>>::BLOCK_BYTES);
            for (i, quad) in quads.into_iter().enumerate() {
                quad.store(out.add((4 * half + i) * size_of::<[u32; LANES]>()));
            }
        }
    }

    /// Keeps the scales of block `b`, which are powers of two.
    #[inline(always)]
    unsafe fn keep_scales<D: Dot>(self, b: usize, scales: D::Float) {
        // SAFETY: the panel has room for the strip.
        unsafe {
            let out = self.scales.add(b * LANES);
            scales.store(out);
            if self.exponents {
                const ONE: i32 = 1.0_f32.to_bits() as i32;
                D::load(out.cast()).add(D::splat(-ONE)).store(out.cast());
            }
        }
    }
}

/// Weights of a row group along a range of K, as a codec wants them.
#[derive(Debug, Clone)]
pub(super) struct Strip {
    pub(super) group: usize,
    /// Blocks along K.
    pub(super) blocks: Range<usize>,
    pub(super) codes: *const u8,
    pub(super) scales: *const u8,
    /// Whether they come from memory.
    pub(super) fetch: bool,
}

impl Strip {
    /// Whether all scales are [`NARROW_SCALES`].
    ///
    /// # Safety
    /// `scales` are those of a weight.
    pub(super) unsafe fn has_narrow_scales(&self) -> bool {
        // SAFETY: a scale per row of a group and block.
        let scales = unsafe { std::slice::from_raw_parts(self.scales, self.blocks.len() * LANES) };
        // Both bounds without leaving early: that is done for many scales at once.
        let (min, max) = scales.iter().fold((u8::MAX, u8::MIN), |(min, max), &s| (s.min(min), s.max(max)));
        NARROW_SCALES.contains(&min) && NARROW_SCALES.contains(&max)
    }
}

/// A strip x `T` tokens from `token`.
pub(super) struct Tile<'a, const KIND: u8, const P: usize, const T: usize, const KEEP: bool> {
    pub(super) problem: &'a Problem<'a>,
    pub(super) strip: &'a Strip,
    pub(super) token: usize,
    /// Totals `[T, LANES]` of the blocks before the strip's, and then with these; used if a strip is not all of K.
    pub(super) carry: *mut f32,
    /// Where decoded weights go on their way, if `KEEP`.
    pub(super) panel: Panel,
}

impl<const KIND: u8, const P: usize, const T: usize, const KEEP: bool> Tile<'_, KIND, P, T, KEEP> {
    #[inline(always)]
    unsafe fn multiply<D: Dot, C: Codec<D>>(self, codec: C) {
        let Self { problem: Problem { weight, image, out, .. }, strip, token, carry, panel } = self;
        let all = weight.blocks();
        // SAFETY: the strip is inside the weight or a panel of it, the tile inside the image.
        unsafe {
            let (mut block, mut scales) = (strip.codes, strip.scales);
            let mut x = image.add((token * all + strip.blocks.start * T) * P * PLANE_WORDS);
            let mut totals = [D::Float::splat(0.0); T];
            if strip.blocks.start > 0 {
                for t in 0..T {
                    totals[t] = D::Float::load(carry.add(t * LANES));
                }
            }
            for b in 0..strip.blocks.len() {
                if P * T > MEMORY_BOUND_DOTS && strip.fetch {
                    prefetch::<D, C>(block);
                }
                let mut sums = if C::EXPONENTS {
                    start_scaled::<D, P, T>(x, D::load(scales))
                } else {
                    start::<D, P, T>(x)
                };
                for half in 0..2 {
                    let quads = codec.quads(block, half);
                    if KEEP {
                        panel.keep_quads(b, half, quads);
                    }
                    for i in 0..4 {
                        if C::BYTES && !D::ONE_DOT {
                            multiply::<D, true, P, T>(&mut sums, quads[i], x, 4 * half + i);
                        } else {
                            multiply::<D, false, P, T>(&mut sums, quads[i], x, 4 * half + i);
                        }
                    }
                }
                if C::EXPONENTS {
                    fold_scaled::<D, P, T>(&mut totals, sums, x, D::load(scales));
                } else {
                    let scales = C::scales(scales);
                    fold::<D, P, T>(&mut totals, sums, x, scales);
                    if KEEP {
                        panel.keep_scales::<D>(b, scales);
                    }
                }
                block = block.add(C::BLOCK_BYTES);
                scales = scales.add(C::SCALE_BYTES);
                x = x.add(T * P * PLANE_WORDS);
            }
            for t in 0..T {
                if strip.blocks.end == all {
                    out.write(strip.group, token + t, totals[t]);
                } else {
                    totals[t].store(carry.add(t * LANES));
                }
            }
        }
    }
}

impl<const KIND: u8, const P: usize, const T: usize, const KEEP: bool> DotWork
    for Tile<'_, KIND, P, T, KEEP>
{
    type Output = ();

    #[inline(always)]
    unsafe fn run<D: Dot>(self) {
        let codec: &IntegerCodec = self.problem.codec;
        // SAFETY: the tile is inside the problem.
        unsafe {
            match KIND {
                NIBBLES => self.multiply::<D, Nibbles<D>>(Nibbles::new(codec)),
                SEXTETS => self.multiply::<D, Sextets<D>>(Sextets::new(codec)),
                BYTES => self.multiply::<D, Bytes>(Codec::<D>::new(codec)),
                DECODED => self.multiply::<D, Decoded<false, false>>(Codec::<D>::new(codec)),
                NARROW => self.multiply::<D, Decoded<false, true>>(Codec::<D>::new(codec)),
                _ => self.multiply::<D, Decoded<true, false>>(Codec::<D>::new(codec)),
            }
        }
    }
}

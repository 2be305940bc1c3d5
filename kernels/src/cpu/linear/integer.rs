//! Products by int8 dot products. A tile is one row group x up to eight tokens: sums and totals stay in registers over all
//! of K, and packed weights are decoded in registers on the way, which costs little beside the products of a few tokens.
//! So one kernel serves a single token as well as a long prompt; what changes is where its weights come from.

#![allow(clippy::needless_range_loop, reason = "registers of a tile are indexed by token")]

use super::codec::{Bytes, CodeKind, Codec, IntegerCodec, Nibbles, Sextets};
use super::image::PLANE_WORDS;
use super::{Output, Part};
use crate::cpu::packed::PackedWeight;
use crate::cpu::simd::dot::{Dot, DotWork};
use crate::cpu::simd::{LANES, Lanes};

/// Bytes of an image that stay in the second cache while weights pass by.
const IMAGE_BYTES: usize = 256 << 10;
/// Bytes of a cache line.
const LINE: usize = 64;

/// What one call works on.
#[derive(Clone, Copy)]
pub(super) struct Problem<'a> {
    pub(super) weight: &'a PackedWeight,
    pub(super) codec: &'a IntegerCodec,
    /// The [image](super::image) of all tokens, in tiles of `tile_tokens` (fewer at the end).
    pub(super) image: *const i32,
    pub(super) tile_tokens: usize,
    pub(super) out: Output<'a>,
}

// SAFETY: tasks write disjoint parts of `out`; nothing writes the rest.
unsafe impl Sync for Problem<'_> {}

/// What an image must be like for an instruction set.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    /// Tokens of the largest tile.
    pub(super) max_tile_tokens: usize,
    /// What the decoded bytes of weights are raised by.
    pub(super) offset: i32,
}

/// Finds the [`Shape`] for a codec.
pub(super) struct FindShape<'a>(pub(super) &'a IntegerCodec);

impl DotWork for FindShape<'_> {
    type Output = Shape;

    #[inline(always)]
    unsafe fn run<D: Dot>(self) -> Shape {
        let offset = match self.0.kind {
            CodeKind::Nibbles | CodeKind::Sextets => D::CODE_OFFSET,
            CodeKind::Bytes => D::BYTE_OFFSET,
        };
        Shape { max_tile_tokens: max_tile_tokens::<D>(self.0.planes()), offset }
    }
}

/// Tokens of the largest tile whose sums fit the registers.
const fn max_tile_tokens<D: Dot>(planes: usize) -> usize {
    match (D::Float::REGISTERS >= 32, planes) {
        (true, _) => 8,
        (false, 1) => 4,
        (false, _) => 2,
    }
}

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

/// How far ahead of its use a block is asked for, in bytes: into the second cache, and into the first.
///
/// Measured. Hardware prefetchers keep up with a reader that does some work per byte (`dots` dot products per quad of a
/// block), but fall behind both a faster one, whose requests for what is near they delay, and a slower one, which stops
/// them.
const fn prefetch_distances(block_bytes: usize, dots: usize) -> (Option<usize>, usize) {
    let far = match block_bytes / dots {
        0..256 => Some(8192),
        256 => None,
        _ => Some(2048),
    };
    (far, 512)
}

/// A row group x `T` tokens from `token`.
struct Tile<'a, const KIND: u8, const P: usize, const T: usize> {
    problem: &'a Problem<'a>,
    group: usize,
    token: usize,
    /// Whether the weights come from memory.
    fetch: bool,
}

impl<const KIND: u8, const P: usize, const T: usize> Tile<'_, KIND, P, T> {
    #[inline(always)]
    unsafe fn multiply<D: Dot, C: Codec<D>>(self, codec: C) {
        let Self { problem: Problem { weight, image, out, .. }, group, token, fetch } = self;
        let blocks = weight.blocks();
        // SAFETY: the group is inside the weight, the tile inside the image.
        unsafe {
            let mut block = weight.codes.as_ptr().add(group * blocks * C::BLOCK_BYTES);
            let mut scales = weight.scales.as_ptr().add(group * blocks * LANES);
            let mut x = image.add(token * blocks * P * PLANE_WORDS);
            let mut totals = [D::Float::splat(0.0); T];
            for _ in 0..blocks {
                if fetch {
                    let (far, near) = const { prefetch_distances(C::BLOCK_BYTES, P * T) };
                    for line in (0..C::BLOCK_BYTES).step_by(LINE) {
                        D::prefetch::<false>(block.wrapping_add(near + line));
                        if let Some(far) = far {
                            D::prefetch::<true>(block.wrapping_add(far + line));
                        }
                    }
                }
                let mut sums = start::<D, P, T>(x);
                for half in 0..2 {
                    let quads = codec.quads(block, half);
                    for i in 0..4 {
                        if C::BYTES && !D::ONE_DOT {
                            multiply::<D, true, P, T>(&mut sums, quads[i], x, 4 * half + i);
                        } else {
                            multiply::<D, false, P, T>(&mut sums, quads[i], x, 4 * half + i);
                        }
                    }
                }
                fold::<D, P, T>(&mut totals, sums, x, D::Float::from_e8m0(scales));
                block = block.add(C::BLOCK_BYTES);
                scales = scales.add(LANES);
                x = x.add(T * P * PLANE_WORDS);
            }
            for t in 0..T {
                out.write(group, token + t, totals[t]);
            }
        }
    }
}

impl<const KIND: u8, const P: usize, const T: usize> DotWork for Tile<'_, KIND, P, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<D: Dot>(self) {
        let codec = self.problem.codec;
        // SAFETY: the tile is inside the problem.
        unsafe {
            match KIND {
                NIBBLES => self.multiply::<D, Nibbles<D>>(Nibbles::new(codec)),
                SEXTETS => self.multiply::<D, Sextets<D>>(Sextets::new(codec)),
                _ => self.multiply::<D, Bytes>(Codec::<D>::new(codec)),
            }
        }
    }
}

const NIBBLES: u8 = CodeKind::Nibbles as u8;
const SEXTETS: u8 = CodeKind::Sextets as u8;
const BYTES: u8 = CodeKind::Bytes as u8;

/// One task: row groups x tokens.
pub(super) struct Task<'a> {
    pub(super) problem: &'a Problem<'a>,
    pub(super) part: Part,
}

impl Task<'_> {
    #[inline(always)]
    unsafe fn tiles<D: Dot, const KIND: u8, const P: usize>(&self) {
        let Problem { weight, tile_tokens, .. } = *self.problem;
        let token_bytes = weight.blocks() * P * PLANE_WORDS * size_of::<i32>();
        let chunk = (IMAGE_BYTES / token_bytes / tile_tokens).max(1) * tile_tokens;
        for first in self.part.tokens.clone().step_by(chunk) {
            let tokens = first..(first + chunk).min(self.part.tokens.end);
            for group in self.part.groups.clone() {
                for token in tokens.clone().step_by(tile_tokens) {
                    let count = tile_tokens.min(tokens.end - token);
                    // SAFETY: the part is inside the problem.
                    unsafe { self.tile::<D, KIND, P>(group, token, count, token == first) };
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<D: Dot, const KIND: u8, const P: usize>(
        &self,
        group: usize,
        token: usize,
        count: usize,
        fetch: bool,
    ) {
        let problem = self.problem;
        macro_rules! tile {
            ($t:literal) => {
                D::outlined(Tile::<KIND, P, $t> { problem, group, token, fetch })
            };
        }
        let max = const { max_tile_tokens::<D>(P) };
        // SAFETY: the part is inside the problem.
        unsafe {
            match count {
                1 => tile!(1),
                2 => tile!(2),
                3 if max >= 4 => tile!(3),
                4 if max >= 4 => tile!(4),
                5 if max >= 8 => tile!(5),
                6 if max >= 8 => tile!(6),
                7 if max >= 8 => tile!(7),
                8 if max >= 8 => tile!(8),
                _ => unreachable!("no tile of {count} tokens"),
            }
        }
    }
}

impl DotWork for Task<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<D: Dot>(self) {
        // SAFETY: the part is inside the problem.
        unsafe {
            match (self.problem.codec.kind, self.problem.codec.planes()) {
                (CodeKind::Nibbles, 1) => self.tiles::<D, NIBBLES, 1>(),
                (CodeKind::Nibbles, _) => self.tiles::<D, NIBBLES, 2>(),
                (CodeKind::Sextets, 1) => self.tiles::<D, SEXTETS, 1>(),
                (CodeKind::Sextets, _) => self.tiles::<D, SEXTETS, 2>(),
                (CodeKind::Bytes, 1) => self.tiles::<D, BYTES, 1>(),
                (CodeKind::Bytes, _) => self.tiles::<D, BYTES, 2>(),
            }
        }
    }
}

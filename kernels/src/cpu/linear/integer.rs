//! Products by int8 dot products: weights streamed and decoded in registers for a few tokens, or decoded once into a
//! panel that all tokens use.

#![allow(clippy::needless_range_loop, reason = "registers of a tile are indexed by row group and token")]

use std::ops::Range;

use super::codec::{Bytes, CodeKind, Codec, IntegerCodec, Nibbles, Sextets};
use super::image::PLANE_WORDS;
use super::{Output, Part};
use crate::cpu::packed::{BLOCK, PackedWeight};
use crate::cpu::simd::dot::{Dot, DotWork};
use crate::cpu::simd::{LANES, Lanes};

/// Row groups of a panel.
pub(super) const PANEL_GROUPS: usize = 2;
/// Blocks along K of a panel: with two row groups, 16 KiB of decoded bytes, half of the L1 cache.
const PANEL_BLOCKS: usize = 16;
/// Quads of a block, and bytes of a row group's decoded quad.
const QUADS: usize = BLOCK / 4;
const QUAD_BYTES: usize = 4 * LANES;

/// A thread's scratch: a decoded panel, its scales, and all tokens' totals between panels.
pub(super) struct Scratch {
    decoded: *mut u8,
    scales: *mut f32,
    totals: *mut f32,
}

impl Scratch {
    const DECODED_FLOATS: usize = PANEL_BLOCKS * PANEL_GROUPS * QUADS * LANES;
    const SCALE_FLOATS: usize = PANEL_BLOCKS * PANEL_GROUPS * LANES;

    /// Floats for `tokens` tokens.
    pub(super) const fn floats(tokens: usize) -> usize {
        Self::DECODED_FLOATS + Self::SCALE_FLOATS + tokens * PANEL_GROUPS * LANES
    }

    /// Cuts `floats`, which holds [`floats`](Self::floats), or nothing where weights are streamed.
    pub(super) fn new(floats: &mut [f32], streamed: bool) -> Self {
        if streamed {
            let none: *mut f32 = std::ptr::null_mut();
            return Self { decoded: none.cast(), scales: none, totals: none };
        }
        let (decoded, rest) = floats.split_at_mut(Self::DECODED_FLOATS);
        let (scales, totals) = rest.split_at_mut(Self::SCALE_FLOATS);
        Self {
            decoded: decoded.as_mut_ptr().cast(),
            scales: scales.as_mut_ptr(),
            totals: totals.as_mut_ptr(),
        }
    }
}

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
    /// Tokens up to which weights are decoded in registers.
    pub(super) stream_tokens: usize,
    /// Tokens of the largest tile.
    pub(super) max_tile_tokens: usize,
    /// What the decoded bytes of weights are raised by.
    pub(super) offset: i32,
}

/// Finds the [`Shape`] for a codec: sums and totals of a tile must fit the registers.
pub(super) struct FindShape<'a>(pub(super) &'a IntegerCodec);

impl DotWork for FindShape<'_> {
    type Output = Shape;

    #[inline(always)]
    unsafe fn run<D: Dot>(self) -> Shape {
        let (stream_tokens, max_tile_tokens) = match (D::Float::REGISTERS >= 32, self.0.is_wide()) {
            (true, false) => (4, 6),
            (true, true) => (4, 4),
            (false, false) => (2, 3),
            (false, true) => (1, 2),
        };
        let offset = match self.0.kind {
            CodeKind::Nibbles | CodeKind::Sextets => D::CODE_OFFSET,
            CodeKind::Bytes => D::BYTE_OFFSET,
        };
        Shape { stream_tokens, max_tile_tokens, offset }
    }
}

/// A tile's sums over one block, `[row group][token][plane]`.
type Sums<D, const P: usize, const G: usize, const T: usize> = [[[D; P]; T]; G];

/// Where the sums of the block at `x` start.
#[inline(always)]
unsafe fn start<D: Dot, const P: usize, const G: usize, const T: usize>(x: *const i32) -> Sums<D, P, G, T> {
    // SAFETY: the caller's block has the words.
    unsafe {
        let mut sums = [[[D::splat(0); P]; T]; G];
        for t in 0..T {
            for p in 0..P {
                let start = D::splat(*x.add(t * P + p));
                for g in 0..G {
                    sums[g][t][p] = start;
                }
            }
        }
        sums
    }
}

/// Adds quad `q` of the block at `x` times the decoded weights `w`.
#[inline(always)]
unsafe fn multiply<D: Dot, const BYTES: bool, const P: usize, const G: usize, const T: usize>(
    sums: &mut Sums<D, P, G, T>,
    w: [D; G],
    x: *const i32,
    q: usize,
) {
    // SAFETY: the caller's block has the words.
    unsafe {
        for t in 0..T {
            for p in 0..P {
                let x = D::splat(*x.add((2 + q) * T * P + t * P + p));
                for g in 0..G {
                    let sum = sums[g][t][p];
                    sums[g][t][p] = if BYTES { sum.dot_bytes(w[g], x) } else { sum.dot_codes(w[g], x) };
                }
            }
        }
    }
}

/// Adds the sums of the block at `x`, in its unit and times the weights' scales, to the totals.
#[inline(always)]
unsafe fn fold<D: Dot, const P: usize, const G: usize, const T: usize>(
    totals: &mut [[D::Float; T]; G],
    sums: Sums<D, P, G, T>,
    x: *const i32,
    scales: [D::Float; G],
) {
    // SAFETY: the caller's block has the words.
    unsafe {
        for t in 0..T {
            for g in 0..G {
                let mut value = D::Float::splat(0.0);
                for p in 0..P {
                    let magic = D::Float::splat(f32::from_bits(*x.add(T * P + t * P + p) as u32));
                    let plane = sums[g][t][p].as_floats().sub(magic);
                    value = if p == 0 { plane } else { value.add(plane) };
                }
                totals[g][t] = value.mul_add(scales[g], totals[g][t]);
            }
        }
    }
}

/// Each function: groups are inside the weight, blocks and tokens inside the image, and scratch holds what it says.
impl Problem<'_> {
    #[inline(always)]
    unsafe fn block_ptr(&self, group: usize, block: usize) -> *const u8 {
        // SAFETY: the caller's group and block are inside the weight.
        unsafe {
            let index = group * self.weight.blocks() + block;
            self.weight.codes.as_ptr().add(index * self.weight.storage.block_bytes())
        }
    }

    #[inline(always)]
    unsafe fn scale_ptr(&self, group: usize, block: usize) -> *const u8 {
        // SAFETY: the caller's group and block are inside the weight.
        unsafe { self.weight.scales.as_ptr().add((group * self.weight.blocks() + block) * LANES) }
    }

    /// The tile that begins with `token`, at `block`.
    #[inline(always)]
    unsafe fn tile_ptr<const P: usize, const T: usize>(&self, token: usize, block: usize) -> *const i32 {
        // SAFETY: the caller's token and block are inside the image.
        unsafe { self.image.add((token * self.weight.blocks() + block * T) * P * PLANE_WORDS) }
    }
}

/// Row groups for all `T` tokens, one after the other, weights decoded in registers.
struct Stream<'a, const KIND: u8, const P: usize, const T: usize> {
    problem: &'a Problem<'a>,
    groups: Range<usize>,
}

impl<const KIND: u8, const P: usize, const T: usize> Stream<'_, KIND, P, T> {
    #[inline(always)]
    unsafe fn group<D: Dot, C: Codec<D>>(&self, codec: C, group: usize) {
        let problem = self.problem;
        // SAFETY: the group is inside the weight, the image has `T` tokens.
        unsafe {
            let mut totals = [[D::Float::splat(0.0); T]; 1];
            for b in 0..problem.weight.blocks() {
                let x = problem.tile_ptr::<P, T>(0, b);
                let mut sums = start::<D, P, 1, T>(x);
                let block = problem.block_ptr(group, b);
                for half in 0..2 {
                    let quads = codec.quads(block, half);
                    for i in 0..4 {
                        if C::BYTES && !D::ONE_DOT {
                            multiply::<D, true, P, 1, T>(&mut sums, [quads[i]], x, 4 * half + i);
                        } else {
                            multiply::<D, false, P, 1, T>(&mut sums, [quads[i]], x, 4 * half + i);
                        }
                    }
                }
                let scale = D::Float::from_e8m0(problem.scale_ptr(group, b));
                fold::<D, P, 1, T>(&mut totals, sums, x, [scale]);
            }
            for t in 0..T {
                problem.out.write(group, t, totals[0][t]);
            }
        }
    }
}

impl<const KIND: u8, const P: usize, const T: usize> DotWork for Stream<'_, KIND, P, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<D: Dot>(self) {
        let codec = self.problem.codec;
        // SAFETY: the groups are inside the weight.
        unsafe {
            for group in self.groups.clone() {
                match KIND {
                    NIBBLES => self.group::<D, Nibbles<D>>(Nibbles::new(codec), group),
                    SEXTETS => self.group::<D, Sextets<D>>(Sextets::new(codec), group),
                    _ => self.group::<D, Bytes>(Codec::<D>::new(codec), group),
                }
            }
        }
    }
}

/// Packed weights to fetch into the cache while the ones before are multiplied: as many bytes of each of two row groups.
#[derive(Clone, Copy)]
struct Prefetch {
    groups: [*const u8; PANEL_GROUPS],
    /// Cache lines of each.
    lines: usize,
    /// The next line, of both groups' lines one after the other.
    next: usize,
    /// Lines to fetch at a time.
    step: usize,
}

impl Prefetch {
    const LINE: usize = 64;

    #[inline(always)]
    unsafe fn advance<D: Dot>(&mut self) {
        let end = (self.next + self.step).min(self.lines * PANEL_GROUPS);
        while self.next < end {
            let (group, line) =
                if self.next < self.lines { (0, self.next) } else { (1, self.next - self.lines) };
            // SAFETY: a hint may point anywhere.
            unsafe { D::prefetch(self.groups[group].wrapping_add(line * Self::LINE)) };
            self.next += 1;
        }
    }
}

/// A panel: its blocks along K, and its row groups.
#[derive(Clone)]
struct Panel {
    blocks: Range<usize>,
    group: usize,
    /// Row groups that it has, at most [`PANEL_GROUPS`].
    count: usize,
}

/// A tile of `G` of the panel's row groups, from the `first`, x `T` tokens from `token` over the panel's blocks.
struct Tile<'a, const BYTES: bool, const P: usize, const G: usize, const T: usize> {
    problem: &'a Problem<'a>,
    scratch: &'a Scratch,
    panel: &'a Panel,
    first: usize,
    token: usize,
    prefetch: &'a mut Prefetch,
}

impl<const BYTES: bool, const P: usize, const G: usize, const T: usize> DotWork for Tile<'_, BYTES, P, G, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<D: Dot>(self) {
        let Self { problem, scratch, panel: Panel { blocks, group, count }, first, token, prefetch } = self;
        // SAFETY: the tile is inside the image, the panel inside the scratch.
        unsafe {
            let waiting = scratch.totals.add((token * PANEL_GROUPS + first) * LANES);
            let mut totals = [[D::Float::splat(0.0); T]; G];
            if blocks.start > 0 {
                for g in 0..G {
                    for t in 0..T {
                        totals[g][t] = D::Float::load(waiting.add((t * PANEL_GROUPS + g) * LANES));
                    }
                }
            }
            let mut x = problem.tile_ptr::<P, T>(token, blocks.start);
            for b in 0..blocks.len() {
                prefetch.advance::<D>();
                let mut sums = start::<D, P, G, T>(x);
                let block = scratch.decoded.add((b * QUADS * PANEL_GROUPS + first) * QUAD_BYTES);
                for q in 0..QUADS {
                    let mut w = [D::splat(0); G];
                    for g in 0..G {
                        w[g] = D::load(block.add((q * PANEL_GROUPS + g) * QUAD_BYTES));
                    }
                    multiply::<D, BYTES, P, G, T>(&mut sums, w, x, q);
                }
                let mut scales = [D::Float::splat(0.0); G];
                for g in 0..G {
                    scales[g] = D::Float::load(scratch.scales.add((b * PANEL_GROUPS + first + g) * LANES));
                }
                fold::<D, P, G, T>(&mut totals, sums, x, scales);
                x = x.add(T * P * PLANE_WORDS);
            }
            let last = blocks.end == problem.weight.blocks();
            for t in 0..T {
                for g in 0..G {
                    if !last {
                        totals[g][t].store(waiting.add((t * PANEL_GROUPS + g) * LANES));
                    } else if first + g < *count {
                        problem.out.write(group + first + g, token + t, totals[g][t]);
                    }
                }
            }
        }
    }
}

/// Decodes a panel.
struct Decode<'a, const KIND: u8> {
    problem: &'a Problem<'a>,
    scratch: &'a Scratch,
    panel: &'a Panel,
}

impl<const KIND: u8> Decode<'_, KIND> {
    #[inline(always)]
    unsafe fn panel<D: Dot, C: Codec<D>>(self, codec: C) {
        let Self { problem, scratch, panel: Panel { blocks, group, count } } = self;
        // SAFETY: the groups are inside the weight, the panel inside the scratch.
        unsafe {
            for b in 0..blocks.len() {
                for g in 0..*count {
                    let block = problem.block_ptr(group + g, blocks.start + b);
                    for half in 0..2 {
                        let quads = codec.quads(block, half);
                        for i in 0..4 {
                            let at = (b * QUADS + 4 * half + i) * PANEL_GROUPS + g;
                            quads[i].store(scratch.decoded.add(at * QUAD_BYTES));
                        }
                    }
                    let scale = D::Float::from_e8m0(problem.scale_ptr(group + g, blocks.start + b));
                    scale.store(scratch.scales.add((b * PANEL_GROUPS + g) * LANES));
                }
            }
        }
    }
}

impl<const KIND: u8> DotWork for Decode<'_, KIND> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<D: Dot>(self) {
        let codec = self.problem.codec;
        // SAFETY: the groups are inside the weight, the panel inside the scratch.
        unsafe {
            match KIND {
                NIBBLES => self.panel::<D, Nibbles<D>>(Nibbles::new(codec)),
                SEXTETS => self.panel::<D, Sextets<D>>(Sextets::new(codec)),
                _ => self.panel::<D, Bytes>(Codec::<D>::new(codec)),
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
    pub(super) scratch: Scratch,
    /// Whether weights are decoded in registers.
    pub(super) streamed: bool,
}

impl Task<'_> {
    #[inline(always)]
    unsafe fn stream<D: Dot, const KIND: u8, const P: usize>(&self) {
        let (problem, groups) = (self.problem, self.part.groups.clone());
        // A narrow instruction set has fewer sizes.
        let wide = D::Float::REGISTERS >= 32;
        // SAFETY: the part is inside the problem.
        unsafe {
            match self.part.tokens.len() {
                1 => D::outlined(Stream::<KIND, P, 1> { problem, groups }),
                2 if wide || P == 1 => D::outlined(Stream::<KIND, P, 2> { problem, groups }),
                3 if wide => D::outlined(Stream::<KIND, P, 3> { problem, groups }),
                4 if wide => D::outlined(Stream::<KIND, P, 4> { problem, groups }),
                tokens => unreachable!("no stream of {tokens} tokens"),
            }
        }
    }

    /// All tokens' tiles of `G` row groups over a panel.
    #[inline(always)]
    unsafe fn tiles<D: Dot, const BYTES: bool, const P: usize, const G: usize>(
        &self,
        panel: &Panel,
        first: usize,
        prefetch: &mut Prefetch,
    ) {
        let (problem, scratch) = (self.problem, &self.scratch);
        let Range { start: mut token, end } = self.part.tokens;
        let wide = D::Float::REGISTERS >= 32;
        macro_rules! tile {
            ($t:literal) => {
                D::outlined(Tile::<BYTES, P, G, $t> { problem, scratch, panel, first, token, prefetch })
            };
        }
        // SAFETY: the part is inside the problem.
        unsafe {
            while token < end {
                let tokens = problem.tile_tokens.min(end - token);
                match tokens {
                    1 => tile!(1),
                    2 => tile!(2),
                    3 if wide || P == 1 => tile!(3),
                    4 if wide => tile!(4),
                    5 if wide && P == 1 => tile!(5),
                    6 if wide && P == 1 => tile!(6),
                    tokens => unreachable!("no tile of {tokens} tokens"),
                }
                token += tokens;
            }
        }
    }

    /// What follows `panel`, to be fetched during its tiles.
    fn prefetch(&self, panel: &Panel) -> Prefetch {
        let (problem, weight) = (self.problem, self.problem.weight);
        let (blocks, end) = (weight.blocks(), self.part.groups.end);
        let (group, block) = match panel.blocks.end {
            next if next < blocks => (panel.group, next),
            _ => (panel.group + PANEL_GROUPS, 0),
        };
        let count = end.saturating_sub(group).min(PANEL_GROUPS);
        let bytes = (blocks - block).min(PANEL_BLOCKS) * weight.storage.block_bytes();
        let lines = if count == PANEL_GROUPS { bytes / Prefetch::LINE } else { 0 };
        let tiles = self.part.tokens.len().div_ceil(problem.tile_tokens);
        let start = |g| {
            let offset = ((group + g) * blocks + block) * weight.storage.block_bytes();
            weight.codes.as_ptr().wrapping_add(offset)
        };
        let step = (lines * PANEL_GROUPS).div_ceil(tiles * panel.blocks.len());
        Prefetch { groups: [start(0), start(1)], lines, next: 0, step }
    }

    #[inline(always)]
    unsafe fn blocked<D: Dot, const KIND: u8, const P: usize>(&self) {
        let (problem, scratch) = (self.problem, &self.scratch);
        let (blocks, groups) = (problem.weight.blocks(), self.part.groups.clone());
        for group in groups.clone().step_by(PANEL_GROUPS) {
            let count = (groups.end - group).min(PANEL_GROUPS);
            for start in (0..blocks).step_by(PANEL_BLOCKS) {
                let panel = Panel { blocks: start..(start + PANEL_BLOCKS).min(blocks), group, count };
                let mut next = self.prefetch(&panel);
                // SAFETY: the part is inside the problem.
                unsafe {
                    D::outlined(Decode::<KIND> { problem, scratch, panel: &panel });
                    // Where a panel has one row group only, what is computed for the other one is not used.
                    let bytes = KIND == BYTES && !D::ONE_DOT;
                    if D::Float::REGISTERS >= 32 {
                        if bytes {
                            self.tiles::<D, true, P, PANEL_GROUPS>(&panel, 0, &mut next);
                        } else {
                            self.tiles::<D, false, P, PANEL_GROUPS>(&panel, 0, &mut next);
                        }
                    } else {
                        for first in 0..count {
                            if bytes {
                                self.tiles::<D, true, P, 1>(&panel, first, &mut next);
                            } else {
                                self.tiles::<D, false, P, 1>(&panel, first, &mut next);
                            }
                        }
                    }
                }
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
            match (self.problem.codec.kind, self.problem.codec.is_wide(), self.streamed) {
                (CodeKind::Nibbles, false, true) => self.stream::<D, NIBBLES, 1>(),
                (CodeKind::Nibbles, true, true) => self.stream::<D, NIBBLES, 2>(),
                (CodeKind::Sextets, false, true) => self.stream::<D, SEXTETS, 1>(),
                (CodeKind::Sextets, true, true) => self.stream::<D, SEXTETS, 2>(),
                (CodeKind::Bytes, false, true) => self.stream::<D, BYTES, 1>(),
                (CodeKind::Bytes, true, true) => self.stream::<D, BYTES, 2>(),
                (CodeKind::Nibbles, false, false) => self.blocked::<D, NIBBLES, 1>(),
                (CodeKind::Nibbles, true, false) => self.blocked::<D, NIBBLES, 2>(),
                (CodeKind::Sextets, false, false) => self.blocked::<D, SEXTETS, 1>(),
                (CodeKind::Sextets, true, false) => self.blocked::<D, SEXTETS, 2>(),
                (CodeKind::Bytes, false, false) => self.blocked::<D, BYTES, 1>(),
                (CodeKind::Bytes, true, false) => self.blocked::<D, BYTES, 2>(),
            }
        }
    }
}

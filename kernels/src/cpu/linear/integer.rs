//! Products by int8 dot products: how they are cut into tiles.
//!
//! A [tile](super::tile) decodes packed weights in registers on its way along K, which costs little beside the products
//! of a few tokens. A prompt has many tiles for the same weights: there the first tile keeps what it decodes, a range of
//! K at a time, in a panel that stays in the nearest caches while the other tiles of tokens pass by. So one kernel serves
//! a single token as well as a long prompt; what changes is where its weights come from.

use std::ops::Range;

use super::codec::{CodeKind, IntegerCodec};
use super::image::PLANE_WORDS;
use super::tile::{BYTES, DECODED, DECODED_BYTES, LINE, NARROW, NIBBLES, Panel, SEXTETS, Strip, Tile};
use super::{Output, Part};
use crate::cpu::packed::{BLOCK, PackedWeight};
use crate::cpu::simd::dot::{Dot, DotWork};
use crate::cpu::simd::{LANES, Lanes};

/// Tiles from which a panel is worth its stores and loads.
const PANEL_TILES: usize = 3;
/// Blocks along K of a panel, which is read from the nearest caches by every tile. (Measured: 16 and all of K are slower.)
const PANEL_BLOCKS: usize = 64;
/// Bytes of a panel's block, a byte for each element, and of its scales.
const PANEL_BLOCK_BYTES: usize = LANES * BLOCK;
const PANEL_SCALE_BYTES: usize = LANES * size_of::<f32>();
/// Bytes of an image, along a panel's range of K, that stay in the second cache while row groups pass by.
const IMAGE_BYTES: usize = 704 << 10;

/// What one call works on.
#[derive(Clone, Copy)]
pub(super) struct Problem<'a> {
    pub(super) weight: &'a PackedWeight,
    pub(super) codec: &'a IntegerCodec,
    /// The [image](super::image) of all tokens, in tiles of `tile_tokens` (fewer at the end).
    pub(super) image: *const i32,
    pub(super) tile_tokens: usize,
    /// Whether all units of the image are [`NARROW_UNITS`](super::image::NARROW_UNITS).
    pub(super) narrow: bool,
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

/// Tokens that share panels, and the bytes that each thread needs for that: panels, and totals of a task's row groups.
pub(super) struct Panels {
    chunk: usize,
    bytes: usize,
}

impl Panels {
    /// Those for tasks of up to `groups` row groups and `tokens` tokens; `None` if there are too few tokens for panels.
    pub(super) fn new(
        weight: &PackedWeight,
        planes: usize,
        tile_tokens: usize,
        groups: usize,
        tokens: usize,
    ) -> Option<Self> {
        if tokens < PANEL_TILES * tile_tokens {
            return None;
        }
        let range = PANEL_BLOCKS.min(weight.blocks());
        let token_bytes = range * planes * PLANE_WORDS * size_of::<i32>();
        let most = (IMAGE_BYTES / token_bytes).max(PANEL_TILES * tile_tokens);
        // Chunks of equal size: a small one at the end would need the same panels.
        let chunk = tokens.div_ceil(tokens.div_ceil(most)).next_multiple_of(tile_tokens);
        let totals = if range == weight.blocks() { 0 } else { groups * chunk * LANES };
        Some(Self {
            chunk,
            bytes: PANEL_BLOCKS * (PANEL_BLOCK_BYTES + PANEL_SCALE_BYTES) + totals * size_of::<f32>(),
        })
    }

    /// Bytes that each thread needs.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

/// One task: row groups x tokens.
pub(super) struct Task<'a> {
    pub(super) problem: &'a Problem<'a>,
    pub(super) part: Part,
    /// With the thread's memory for them.
    pub(super) panels: Option<(&'a Panels, *mut u8)>,
}

impl Task<'_> {
    #[inline(always)]
    unsafe fn multiply<D: Dot, const KIND: u8, const P: usize>(&self) {
        // SAFETY: the part is inside the problem.
        unsafe {
            match self.panels {
                Some((panels, memory)) => self.by_panels::<D, KIND, P>(panels, memory),
                None => self.directly::<D, KIND, P>(),
            }
        }
    }

    #[inline(always)]
    unsafe fn directly<D: Dot, const KIND: u8, const P: usize>(&self) {
        for group in self.part.groups.clone() {
            // SAFETY: the part is inside the problem.
            unsafe {
                let strip = self.strip(group, 0..self.problem.weight.blocks());
                self.tiles::<D, KIND, P>(strip, self.part.tokens.clone(), std::ptr::null_mut(), None);
            }
        }
    }

    #[inline(always)]
    unsafe fn by_panels<D: Dot, const KIND: u8, const P: usize>(&self, panels: &Panels, memory: *mut u8) {
        let all = self.problem.weight.blocks();
        // SAFETY: the part is inside the problem, the memory as large as `panels` says.
        unsafe {
            let panel_scales = memory.add(PANEL_BLOCKS * PANEL_BLOCK_BYTES).cast::<f32>();
            let totals = panel_scales.add(PANEL_BLOCKS * LANES);
            for first in self.part.tokens.clone().step_by(panels.chunk) {
                let tokens = first..(first + panels.chunk).min(self.part.tokens.end);
                let strips = (0..all).step_by(PANEL_BLOCKS).flat_map(|from| {
                    let blocks = from..(from + PANEL_BLOCKS).min(all);
                    self.part.groups.clone().map(move |group| (group, blocks.clone()))
                });
                let mut strips = strips.map(|(group, blocks)| self.strip(group, blocks)).peekable();
                while let Some(mut strip) = strips.next() {
                    let whole_bytes = KIND == BYTES && !D::ONE_DOT;
                    // With two planes there are twice as many additions, and their units are the busy ones.
                    let exponents =
                        P == 1 && self.problem.narrow && !whole_bytes && strip.has_narrow_scales();
                    let carry =
                        totals.wrapping_add((strip.group - self.part.groups.start) * tokens.len() * LANES);
                    // The first tile decodes them for all.
                    let first = tokens.start..(tokens.start + self.problem.tile_tokens).min(tokens.end);
                    let rest = first.end..tokens.end;
                    let panel = Panel { codes: memory, scales: panel_scales, exponents };
                    self.tile::<D, KIND, P, true>(&strip, first.start, first.len(), carry, panel);
                    let carry = carry.wrapping_add(first.len() * LANES);
                    strip = Strip { codes: memory, scales: panel_scales.cast(), fetch: false, ..strip };
                    let next = strips.peek();
                    if exponents {
                        self.tiles::<D, NARROW, P>(strip, rest, carry, next);
                    } else if whole_bytes {
                        self.tiles::<D, DECODED_BYTES, P>(strip, rest, carry, next);
                    } else {
                        self.tiles::<D, DECODED, P>(strip, rest, carry, next);
                    }
                }
            }
        }
    }

    /// The packed weights of a row group along `blocks`.
    unsafe fn strip(&self, group: usize, blocks: Range<usize>) -> Strip {
        let weight = self.problem.weight;
        let first = group * weight.blocks() + blocks.start;
        // SAFETY: the group and the blocks are inside the weight.
        let (codes, scales) = unsafe {
            let codes = weight.codes.as_ptr().add(first * weight.storage.block_bytes());
            (codes, weight.scales.as_ptr().add(first * LANES))
        };
        Strip { group, blocks, codes, scales, fetch: true }
    }

    /// A strip x all tiles of `tokens`, whose totals, if need be, are at `carry`. Meanwhile packed weights of `next` are
    /// brought to the second cache.
    #[inline(always)]
    unsafe fn tiles<D: Dot, const KIND: u8, const P: usize>(
        &self,
        mut strip: Strip,
        tokens: Range<usize>,
        carry: *mut f32,
        next: Option<&Strip>,
    ) {
        let tile_tokens = self.problem.tile_tokens;
        let next_lines = next
            .map_or(0, |next| (next.blocks.len() * self.problem.weight.storage.block_bytes()).div_ceil(LINE));
        let lines_per_tile = next_lines.div_ceil(tokens.len().div_ceil(tile_tokens).max(1));
        for (i, token) in tokens.clone().step_by(tile_tokens).enumerate() {
            if let Some(next) = next {
                for line in (i * lines_per_tile..(i + 1) * lines_per_tile).take_while(|&l| l < next_lines) {
                    // SAFETY: an address may be any.
                    unsafe { D::prefetch::<true>(next.codes.wrapping_add(line * LINE)) };
                }
            }
            let count = tile_tokens.min(tokens.end - token);
            let carry = carry.wrapping_add((token - tokens.start) * LANES);
            // SAFETY: the part is inside the problem.
            unsafe { self.tile::<D, KIND, P, false>(&strip, token, count, carry, Panel::NONE) };
            // The first tile has brought the weights.
            strip.fetch = false;
        }
    }

    #[inline(always)]
    unsafe fn tile<D: Dot, const KIND: u8, const P: usize, const KEEP: bool>(
        &self,
        strip: &Strip,
        token: usize,
        count: usize,
        carry: *mut f32,
        panel: Panel,
    ) {
        let problem = self.problem;
        macro_rules! tile {
            ($t:literal) => {
                D::outlined(Tile::<KIND, P, $t, KEEP> { problem, strip, token, carry, panel })
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
                (CodeKind::Nibbles, 1) => self.multiply::<D, NIBBLES, 1>(),
                (CodeKind::Nibbles, _) => self.multiply::<D, NIBBLES, 2>(),
                (CodeKind::Sextets, 1) => self.multiply::<D, SEXTETS, 1>(),
                (CodeKind::Sextets, _) => self.multiply::<D, SEXTETS, 2>(),
                (CodeKind::Bytes, 1) => self.multiply::<D, BYTES, 1>(),
                (CodeKind::Bytes, _) => self.multiply::<D, BYTES, 2>(),
            }
        }
    }
}

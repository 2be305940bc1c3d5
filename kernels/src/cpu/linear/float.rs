//! Products in F32: for weights that are no integers (MXFP8, E3M2, dense ones).

#![allow(clippy::needless_range_loop, reason = "registers of a tile are indexed by row group and token")]

use std::ops::Range;

use super::{Output, Part};
use crate::backend::DenseDtype;
use crate::cpu::packed::{BLOCK, PackedWeight, Storage, sextet_low_word, sextet_upper_word};
use crate::cpu::simd::{HalfFields, LANES, Lanes, dispatch};

/// Rows (tokens) up to which weights are decoded in registers instead of into scratch.
const STREAM_ROWS: usize = 4;
/// Row groups whose blocks are interleaved when streaming, so that their chains of dependent additions overlap.
const STREAM_GROUPS: usize = 4;
/// Tile of the blocked product: row groups x tokens held in registers.
const TILE_GROUPS: usize = 2;
pub(super) const TILE_TOKENS: usize = 12;
/// Tokens of a tile of one row group where there are sixteen registers of half the size.
const NARROW_TILE_TOKENS: usize = 6;
/// Blocks along K that are decoded into scratch at a time: 32 x 32 x 2 x 16 floats, 128 KiB of the L2 cache.
const PANEL_BLOCKS: usize = 32;

/// Floats of a decoded panel.
const PANEL_FLOATS: usize = PANEL_BLOCKS * BLOCK * TILE_GROUPS * LANES;

/// Decodes four consecutive elements along K of a row group.
trait Codec: Copy {
    /// Elements `4q .. 4q+4` of the block at `block`, one [`Lanes`] each, without their scale.
    ///
    /// # Safety
    /// As [`Lanes`]; `block` points to a whole block and `q < 8`.
    unsafe fn quad<L: Lanes>(&self, block: *const u8, q: usize) -> [L; 4];
}

#[derive(Clone, Copy)]
struct Sextets<'a>(&'a [f32; 32]);
#[derive(Clone, Copy)]
struct Fp8(HalfFields);
#[derive(Clone, Copy)]
struct Bf16;
#[derive(Clone, Copy)]
struct F16;
#[derive(Clone, Copy)]
struct F32;

impl Codec for Sextets<'_> {
    #[inline(always)]
    unsafe fn quad<L: Lanes>(&self, block: *const u8, q: usize) -> [L; 4] {
        let words = block.cast::<u32>();
        // SAFETY: the words are inside the block.
        unsafe {
            let (low, high) =
                (words.add(sextet_low_word(q / 2) * LANES), words.add(sextet_upper_word(q / 4) * LANES));
            L::from_sextets(low, q % 2, high, q % 4, self.0)
        }
    }
}

/// Codecs with one lane vector per element. No closure: one that is not inlined would lose the instruction set.
macro_rules! element_codec {
    ($codec:ty, $bytes:literal, |$self:ident, $p:ident| $decode:expr) => {
        impl Codec for $codec {
            #[inline(always)]
            unsafe fn quad<L: Lanes>(&self, block: *const u8, q: usize) -> [L; 4] {
                let $self = self;
                // SAFETY: elements 4q .. 4q+4 of sixteen rows.
                unsafe {
                    let mut quad = [L::splat(0.0); 4];
                    for (j, out) in quad.iter_mut().enumerate() {
                        let $p = block.add((4 * q + j) * LANES * $bytes);
                        *out = $decode;
                    }
                    quad
                }
            }
        }
    };
}
element_codec!(Fp8, 1, |codec, p| L::from_fp8(p, codec.0));
element_codec!(Bf16, 2, |_codec, p| L::from_bf16(p.cast()));
element_codec!(F16, 2, |_codec, p| L::from_f16(p.cast()));
element_codec!(F32, 4, |_codec, p| L::load(p.cast()));

/// What one call works on.
#[derive(Clone, Copy)]
pub(super) struct Problem<'a> {
    pub(super) weight: &'a PackedWeight,
    /// `[tokens, x_stride]`, columns padded with zeros to whole blocks.
    pub(super) x: *const f32,
    pub(super) x_stride: usize,
    pub(super) out: Output<'a>,
}

// SAFETY: tasks write disjoint columns of `out`, and nothing writes `x`.
unsafe impl Sync for Problem<'_> {}

impl Problem<'_> {
    #[inline(always)]
    unsafe fn block_ptr(&self, group: usize, block: usize) -> *const u8 {
        // SAFETY: the caller's group and block are inside the weight.
        unsafe {
            let index = group * self.weight.blocks() + block;
            self.weight.codes.as_ptr().add(index * self.weight.storage.block_bytes())
        }
    }

    /// `total + s * scale` for one group and block.
    #[inline(always)]
    unsafe fn accumulate<L: Lanes, const SCALED: bool>(
        &self,
        group: usize,
        block: usize,
        s: L,
        total: L,
    ) -> L {
        // SAFETY: the caller's group and block are inside the weight.
        unsafe { if SCALED { s.mul_add(self.scale::<L>(group, block), total) } else { total.add(s) } }
    }

    #[inline(always)]
    unsafe fn scale<L: Lanes>(&self, group: usize, block: usize) -> L {
        // SAFETY: the caller's group and block are inside the weight, which has scales.
        unsafe {
            let index = group * self.weight.blocks() + block;
            L::from_e8m0(self.weight.scales.as_ptr().add(index * LANES))
        }
    }
}

/// `G` row groups from `group` for all `T` tokens, weights decoded in registers.
#[inline(always)]
unsafe fn stream<L: Lanes, C: Codec, const SCALED: bool, const G: usize, const T: usize>(
    p: &Problem<'_>,
    codec: C,
    group: usize,
) {
    // SAFETY: the caller's groups and tokens are inside the problem.
    unsafe {
        let mut total = [[L::splat(0.0); T]; G];
        for b in 0..p.weight.blocks() {
            let mut s = [[L::splat(0.0); T]; G];
            for q in 0..BLOCK / 4 {
                for g in 0..G {
                    let w = codec.quad::<L>(p.block_ptr(group + g, b), q);
                    for (j, w) in w.into_iter().enumerate() {
                        for t in 0..T {
                            let x = *p.x.add(t * p.x_stride + b * BLOCK + 4 * q + j);
                            s[g][t] = w.mul_add(L::splat(x), s[g][t]);
                        }
                    }
                }
            }
            for g in 0..G {
                for t in 0..T {
                    total[g][t] = p.accumulate::<L, SCALED>(group + g, b, s[g][t], total[g][t]);
                }
            }
        }
        for g in 0..G {
            for t in 0..T {
                p.out.write(group + g, t, total[g][t]);
            }
        }
    }
}

/// Row groups `from..to` for `T` tokens, `G` at a time.
#[inline(always)]
unsafe fn stream_groups<L: Lanes, C: Codec, const SCALED: bool, const G: usize, const T: usize>(
    p: &Problem<'_>,
    codec: C,
    from: usize,
    to: usize,
) {
    // SAFETY: the caller's groups are inside the weight.
    unsafe {
        let mut group = from;
        while group + G <= to {
            stream::<L, C, SCALED, G, T>(p, codec, group);
            group += G;
        }
        if G > 2 && group + 2 <= to {
            stream::<L, C, SCALED, 2, T>(p, codec, group);
            group += 2;
        }
        while group < to {
            stream::<L, C, SCALED, 1, T>(p, codec, group);
            group += 1;
        }
    }
}

/// A tile of `G` of the panel's row groups, from `first`, x `T` tokens over a panel of decoded blocks
/// `[panel blocks, 32, TILE_GROUPS, LANES]`. Between panels the totals wait in `totals`, `[tokens, TILE_GROUPS, LANES]`.
#[inline(always)]
unsafe fn tile<L: Lanes, const SCALED: bool, const G: usize, const T: usize>(
    p: &Problem<'_>,
    decoded: *const f32,
    scales: &[[L; TILE_GROUPS]; PANEL_BLOCKS],
    panel: Range<usize>,
    first: usize,
    token: usize,
    totals: *mut f32,
) {
    // SAFETY: the caller's tile is inside the problem, `decoded` and `totals`.
    unsafe {
        let mut x: [*const f32; T] = [std::ptr::null(); T];
        for (t, x) in x.iter_mut().enumerate() {
            *x = p.x.add((token + t) * p.x_stride);
        }
        for b in panel.clone() {
            let w = decoded.add((b - panel.start) * BLOCK * TILE_GROUPS * LANES);
            let mut s = [[L::splat(0.0); T]; G];
            for k in 0..BLOCK {
                let mut wk = [L::splat(0.0); G];
                for (g, wk) in wk.iter_mut().enumerate() {
                    *wk = L::load(w.add((k * TILE_GROUPS + first + g) * LANES));
                }
                for t in 0..T {
                    let xk = L::splat(*x[t].add(b * BLOCK + k));
                    for g in 0..G {
                        s[g][t] = wk[g].mul_add(xk, s[g][t]);
                    }
                }
            }
            for g in 0..G {
                for t in 0..T {
                    let at = totals.add(((token + t) * TILE_GROUPS + first + g) * LANES);
                    let total = L::load(at);
                    let total = if SCALED {
                        s[g][t].mul_add(scales[b - panel.start][first + g], total)
                    } else {
                        total.add(s[g][t])
                    };
                    total.store(at);
                }
            }
        }
    }
}

/// All tokens, in tiles of `T` and then of one.
#[inline(always)]
unsafe fn tiles<L: Lanes, const SCALED: bool, const G: usize, const T: usize>(
    p: &Problem<'_>,
    decoded: *const f32,
    scales: &[[L; TILE_GROUPS]; PANEL_BLOCKS],
    panel: Range<usize>,
    first: usize,
    tokens: Range<usize>,
    totals: *mut f32,
) {
    // SAFETY: the caller's panel is inside the problem, `decoded` and `totals`.
    unsafe {
        let mut token = tokens.start;
        while token + T <= tokens.end {
            tile::<L, SCALED, G, T>(p, decoded, scales, panel.clone(), first, token, totals);
            token += T;
        }
        while token + 3 <= tokens.end {
            tile::<L, SCALED, G, 3>(p, decoded, scales, panel.clone(), first, token, totals);
            token += 3;
        }
        while token < tokens.end {
            tile::<L, SCALED, G, 1>(p, decoded, scales, panel.clone(), first, token, totals);
            token += 1;
        }
    }
}

/// `G <= TILE_GROUPS` row groups from `group` for all tokens, weights decoded once into `scratch`.
#[inline(always)]
unsafe fn blocked<L: Lanes, C: Codec, const SCALED: bool, const G: usize>(
    p: &Problem<'_>,
    codec: C,
    group: usize,
    tokens: Range<usize>,
    scratch: *mut f32,
) {
    // SAFETY: the caller's groups are inside the weight, `scratch` holds a panel and the totals of all tokens.
    unsafe {
        let totals = scratch.add(PANEL_FLOATS);
        let width = TILE_GROUPS * LANES;
        std::ptr::write_bytes(totals.add(tokens.start * width), 0, tokens.len() * width);
        let blocks = p.weight.blocks();
        for start in (0..blocks).step_by(PANEL_BLOCKS) {
            let panel = start..(start + PANEL_BLOCKS).min(blocks);
            let mut scales = [[L::splat(1.0); TILE_GROUPS]; PANEL_BLOCKS];
            for b in panel.clone() {
                for g in 0..G {
                    let block = p.block_ptr(group + g, b);
                    for q in 0..BLOCK / 4 {
                        for (j, w) in codec.quad::<L>(block, q).into_iter().enumerate() {
                            let k = (b - start) * BLOCK + 4 * q + j;
                            w.store(scratch.add((k * TILE_GROUPS + g) * LANES));
                        }
                    }
                    if SCALED {
                        scales[b - start][g] = p.scale(group + g, b);
                    }
                }
            }
            if L::REGISTERS >= 32 {
                tiles::<L, SCALED, G, TILE_TOKENS>(p, scratch, &scales, panel, 0, tokens.clone(), totals);
            } else {
                for first in 0..G {
                    tiles::<L, SCALED, 1, NARROW_TILE_TOKENS>(
                        p,
                        scratch,
                        &scales,
                        panel.clone(),
                        first,
                        tokens.clone(),
                        totals,
                    );
                }
            }
        }
        for token in tokens {
            for g in 0..G {
                p.out.write(group + g, token, L::load(totals.add((token * TILE_GROUPS + g) * LANES)));
            }
        }
    }
}

#[inline(always)]
unsafe fn run_codec<L: Lanes, C: Codec, const SCALED: bool>(
    p: &Problem<'_>,
    codec: C,
    part: &Part,
    scratch: *mut f32,
) {
    // SAFETY: the caller's part is inside the problem.
    unsafe {
        let Range { start: from, end: to } = part.groups;
        if part.tokens.start == 0 {
            match part.tokens.end {
                1 => return stream_groups::<L, C, SCALED, STREAM_GROUPS, 1>(p, codec, from, to),
                2 => return stream_groups::<L, C, SCALED, 2, 2>(p, codec, from, to),
                3 => return stream_groups::<L, C, SCALED, 1, 3>(p, codec, from, to),
                STREAM_ROWS => return stream_groups::<L, C, SCALED, 1, STREAM_ROWS>(p, codec, from, to),
                _ => {}
            }
        }
        let mut group = from;
        while group + TILE_GROUPS <= to {
            blocked::<L, C, SCALED, TILE_GROUPS>(p, codec, group, part.tokens.clone(), scratch);
            group += TILE_GROUPS;
        }
        if group < to {
            blocked::<L, C, SCALED, 1>(p, codec, group, part.tokens.clone(), scratch);
        }
    }
}

#[inline(always)]
unsafe fn run<L: Lanes>(p: &Problem<'_>, part: &Part, scratch: *mut f32) {
    // SAFETY: the caller's part is inside the problem.
    unsafe {
        match &p.weight.storage {
            Storage::Sextets(table) => run_codec::<L, _, true>(p, Sextets(table), part, scratch),
            Storage::Fp8(fields) => run_codec::<L, _, true>(p, Fp8(*fields), part, scratch),
            Storage::Dense(DenseDtype::Bf16) => run_codec::<L, _, false>(p, Bf16, part, scratch),
            Storage::Dense(DenseDtype::F16) => run_codec::<L, _, false>(p, F16, part, scratch),
            Storage::Dense(DenseDtype::F32) => run_codec::<L, _, false>(p, F32, part, scratch),
            Storage::Nibbles(_) | Storage::Int8 { .. } => unreachable!("elements that are all integers"),
        }
    }
}

dispatch! {
    /// Runs a part of the problem; `scratch` holds [`scratch_floats`].
    pub(super) fn run_on(p: &Problem<'_>, part: &Part, scratch: *mut f32) = run
}

/// Row groups that share a task's decoded panel.
pub(super) const fn panel_groups(tokens: usize) -> usize {
    if tokens <= STREAM_ROWS { 1 } else { TILE_GROUPS }
}

/// Floats of a thread's scratch for `tokens` tokens: a decoded panel, and totals.
pub(super) const fn scratch_floats(tokens: usize) -> usize {
    PANEL_FLOATS + tokens * TILE_GROUPS * LANES
}

//! The loops of attention: scores of tiles of queries against blocks of keys, and probabilities. The sums of values are
//! in [`super::values`].
//!
//! Every function is inlined into one that is compiled for an instruction set. None of the tile sizes here shows in a
//! result: they decide which sums are computed side by side, not the order within one.

use crate::cpu::simd::pairs::{CacheLanes, Products};
use crate::cpu::simd::{LANES, Lanes};

/// Positions whose probabilities are computed together, relative to their own maximum. Ranges start at multiples of it.
pub(super) const RANGE_TOKENS: usize = 256;

/// Blocks that are looked at together, decoded if need be.
pub(super) const GROUP_BLOCKS: usize = 4;

/// Positions of a group of blocks.
pub(super) const GROUP_TOKENS: usize = GROUP_BLOCKS * LANES;

/// Probabilities below 2^-40 of the largest one count as zero.
const SMALLEST_LOG2: f32 = -40.0;

/// 2^x for x <= 0, 0 below -40: nearest integer, then a polynomial of degree 6 (Cephes `exp2f`).
#[inline(always)]
pub(super) unsafe fn exp2<L: CacheLanes>(x: L) -> L {
    // SAFETY: the caller's conditions.
    unsafe {
        // `max` returns its second operand where one is NaN: NaN stays NaN.
        let bounded = L::splat(SMALLEST_LOG2 - 1.0).max(x);
        let n = bounded.round();
        let r = bounded.sub(n);
        let mut p = L::splat(1.535_336_2e-4);
        for c in [1.339_887_4e-3, 9.618_438e-3, 5.550_332_5e-2, 2.402_264_8e-1, 6.931_472e-1] {
            p = p.mul_add(r, L::splat(c));
        }
        let y = p.mul_add(r, L::splat(1.0)).mul_pow2(n);
        // 2^-40 is the value at -40 itself, and no other is below it.
        y.zero_below(f32::from_bits((127 - 40) << 23))
    }
}

/// A tile of query rows in the making: pointers into one thread's scratch.
#[derive(Clone, Copy)]
pub(super) struct Tile<E> {
    /// Rows.
    pub(super) rows: usize,
    /// Elements of a head.
    pub(super) dim: usize,
    /// `dim` rounded up to whole vectors.
    pub(super) stride: usize,
    /// `[rows][stride]`: queries.
    pub(super) q: *mut E,
    /// `[rows][RANGE_TOKENS]`: scores times log2(e).
    pub(super) scores: *mut f32,
    /// `[rows][RANGE_TOKENS]`: probabilities.
    pub(super) p: *mut E,
    /// `[rows][stride]`: the range's sums of values.
    pub(super) sums: *mut f32,
    /// `[rows]`: the positions `from..to` of the range that each row sees, from row to row the same or later ones.
    pub(super) seen: *mut [u32; 2],
}

impl<E> Tile<E> {
    /// Positions of the range that `row` sees.
    ///
    /// # Safety
    /// `row` is one of the tile's, and `seen` is filled.
    #[inline(always)]
    pub(super) unsafe fn seen_in_range(&self, row: usize) -> [usize; 2] {
        // SAFETY: the caller's conditions.
        unsafe { (*self.seen.add(row)).map(|p| p as usize) }
    }

    /// Positions that `row` sees of the group of blocks at position `at` of the range, relative to it.
    #[inline(always)]
    pub(super) unsafe fn seen_in_group(&self, row: usize, at: usize) -> [usize; 2] {
        // SAFETY: the caller's conditions.
        unsafe { self.seen_in_range(row).map(|p| p.saturating_sub(at).min(GROUP_TOKENS)) }
    }
}

/// Up to [`GROUP_BLOCKS`] blocks of one head's keys or values, and the blocks that come next.
pub(super) struct Group<E> {
    /// Blocks; behind the last one it is repeated.
    pub(super) blocks: [*const E; GROUP_BLOCKS],
    /// What to fetch while these are looked at, if it has not been while they were decoded: a head's part of a block is
    /// too short for hardware prefetchers. Into the second cache: more requests can wait for it than for the first.
    pub(super) ahead: Option<[*const u8; GROUP_BLOCKS]>,
}

/// Rows up to which blocks are fetched ahead: with more, there is time enough.
pub(super) const FEW_ROWS: usize = 8;

/// Scores of `R` rows from `row` on against `B` blocks from `block` on.
#[inline(always)]
unsafe fn score<P: Products, const R: usize, const B: usize>(
    tile: Tile<P::Element>,
    row: usize,
    group: &Group<P::Element>,
    block: usize,
    at: usize,
    scale: f32,
) {
    // SAFETY: the caller's conditions.
    unsafe {
        let zero = P::Acc::splat(0.0);
        let mut acc = [[zero; B]; R];
        let keys = &group.blocks[block..block + B];
        let ahead = if R <= FEW_ROWS && tile.rows <= FEW_ROWS { group.ahead } else { None };
        for i in 0..tile.dim / P::STEP {
            if let Some(ahead) = ahead {
                for ahead in &ahead[block..block + B] {
                    P::Acc::prefetch::<true>(ahead.wrapping_add(i * 64));
                }
            }
            let mut k = [P::load(keys[0].add(i * LANES * P::STEP)); B];
            for b in 1..B {
                k[b] = P::load(keys[b].add(i * LANES * P::STEP));
            }
            let q = tile.q.add(row * tile.stride + i * P::STEP);
            for (r, acc) in acc.iter_mut().enumerate() {
                let q = P::splat(q.add(r * tile.stride));
                for (acc, &k) in acc.iter_mut().zip(&k) {
                    *acc = P::dot(*acc, k, q);
                }
            }
        }
        let scale = P::Acc::splat(scale);
        for (r, acc) in acc.iter().enumerate() {
            for (b, acc) in acc.iter().enumerate() {
                let to = tile.scores.add((row + r) * RANGE_TOKENS + at + (block + b) * LANES);
                acc.mul(scale).store(to);
            }
        }
    }
}

/// Scores of `rows` against the group of blocks that starts at position `at` of the range, as far as rows see it. May
/// write scores of other positions of the group.
///
/// # Safety
/// As [`Lanes`]; the tile's pointers and `keys` are what they are said to be.
#[inline(always)]
pub(super) unsafe fn scores<P: Products>(
    tile: Tile<P::Element>,
    rows: std::ops::Range<usize>,
    keys: &Group<P::Element>,
    at: usize,
    scale: f32,
) {
    let (mut row, wide) = (rows.start, P::Acc::REGISTERS >= 32);
    while row < rows.end {
        let n = match rows.end - row {
            12.. if wide => 12,
            8.. if wide => 8,
            6.. if wide => 6,
            4.. => 4,
            3 if wide => 3,
            2.. => 2,
            _ => 1,
        };
        // SAFETY: the caller's conditions.
        unsafe {
            let (from, to) = (tile.seen_in_group(row, at)[0], tile.seen_in_group(row + n - 1, at)[1]);
            let (first, last) = (from / LANES, to.div_ceil(LANES));
            if wide && n >= 8 {
                for block in (first / 2 * 2..last).step_by(2) {
                    match n {
                        12 => score::<P, 12, 2>(tile, row, keys, block, at, scale),
                        _ => score::<P, 8, 2>(tile, row, keys, block, at, scale),
                    }
                }
            } else if wide && first < last {
                match n {
                    6 => score::<P, 6, 4>(tile, row, keys, 0, at, scale),
                    4 => score::<P, 4, 4>(tile, row, keys, 0, at, scale),
                    3 => score::<P, 3, 4>(tile, row, keys, 0, at, scale),
                    2 => score::<P, 2, 4>(tile, row, keys, 0, at, scale),
                    _ => score::<P, 1, 4>(tile, row, keys, 0, at, scale),
                }
            } else if !wide {
                for block in first..last {
                    match n {
                        4 => score::<P, 4, 1>(tile, row, keys, block, at, scale),
                        2 => score::<P, 2, 1>(tile, row, keys, block, at, scale),
                        _ => score::<P, 1, 1>(tile, row, keys, block, at, scale),
                    }
                }
            }
        }
        row += n;
    }
}

/// Turns the scores of `row` at the positions that it sees into probabilities relative to the largest one.
/// Returns the logarithm to base 2 of that one, and the sum.
///
/// # Safety
/// As [`scores`].
#[inline(always)]
pub(super) unsafe fn probabilities<P: Products>(tile: Tile<P::Element>, row: usize) -> (f32, f32) {
    // SAFETY: the caller's conditions.
    unsafe {
        let [from, to] = tile.seen_in_range(row);
        let scores = tile.scores.add(row * RANGE_TOKENS);
        let p = tile.p.add(row * RANGE_TOKENS);
        let (first, last) = (from / LANES, (to - 1) / LANES);
        let outside = f32::NEG_INFINITY;
        for block in [first, last] {
            let at = scores.add(block * LANES);
            let (from, to) = (from.saturating_sub(block * LANES), to - block * LANES);
            P::Acc::load(at).keep(from, to, outside).store(at);
        }
        let mut max = P::Acc::splat(outside);
        for block in first..=last {
            max = max.max(P::Acc::load(scores.add(block * LANES)));
        }
        let max = max.largest();
        let mut sum = P::Acc::splat(0.0);
        for block in first..=last {
            let x = exp2(P::Acc::load(scores.add(block * LANES)).sub(P::Acc::splat(max)));
            sum = sum.add(x);
            P::store(x, p.add(block * LANES));
        }
        (max, sum.reduce_add())
    }
}

//! Sums of values, weighted by probabilities.

use super::kernel::{FEW_ROWS, Group, RANGE_TOKENS, Tile};
use crate::cpu::simd::pairs::{CacheLanes, Products};
use crate::cpu::simd::{LANES, Lanes};

/// Adds the values of positions `from..to` of a group, times their probabilities, to `V` vectors from element `d` on of
/// `R` rows from `row` on. `from` and `to` are whole steps.
#[inline(always)]
unsafe fn weigh<P: Products, const R: usize, const V: usize>(
    tile: Tile<P::Element>,
    row: usize,
    values: &Group<P::Element>,
    [from, to]: [usize; 2],
    at: usize,
    d: usize,
) {
    // SAFETY: the caller's conditions.
    unsafe {
        let sums = tile.sums.add(row * tile.stride + d);
        let mut acc = [[P::Acc::splat(0.0); V]; R];
        for (r, acc) in acc.iter_mut().enumerate() {
            for (j, acc) in acc.iter_mut().enumerate() {
                *acc = P::Acc::load(sums.add(r * tile.stride + j * LANES));
            }
        }
        let p = tile.p.add(row * RANGE_TOKENS + at);
        let ahead = if R <= FEW_ROWS && tile.rows <= FEW_ROWS { values.ahead } else { None };
        let mut t = from;
        while t < to {
            let block = t / LANES;
            let end = to.min((block + 1) * LANES);
            let offset = t % LANES * tile.stride + d * P::STEP;
            let mut v = values.blocks[block].add(offset);
            let mut next = ahead.map(|ahead| ahead[block].cast::<P::Element>().wrapping_add(offset));
            while t < end {
                if let Some(next) = &mut next {
                    for j in 0..V {
                        P::Acc::prefetch::<true>(next.wrapping_add(j * LANES * P::STEP).cast());
                    }
                    *next = next.wrapping_add(tile.stride * P::STEP);
                }
                let mut x = [P::load(v); V];
                for (j, x) in x.iter_mut().enumerate().skip(1) {
                    *x = P::load(v.add(j * LANES * P::STEP));
                }
                for (r, acc) in acc.iter_mut().enumerate() {
                    let p = P::splat(p.add(r * RANGE_TOKENS + t));
                    for (acc, &x) in acc.iter_mut().zip(&x) {
                        *acc = P::dot(*acc, x, p);
                    }
                }
                v = v.add(tile.stride * P::STEP);
                t += P::STEP;
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            for (j, acc) in acc.iter().enumerate() {
                acc.store(sums.add(r * tile.stride + j * LANES));
            }
        }
    }
}

/// [`weigh`] for one element of a step: the other one is a position that the row does not see.
#[inline(always)]
unsafe fn weigh_one<P: Products>(
    tile: Tile<P::Element>,
    row: usize,
    values: &Group<P::Element>,
    t: usize,
    at: usize,
) {
    let (step, element) = (t / P::STEP * P::STEP, t % P::STEP);
    // SAFETY: the caller's conditions.
    unsafe {
        let p = P::splat(tile.p.add(row * RANGE_TOKENS + at + step));
        let v = values.blocks[t / LANES].add(step % LANES * tile.stride);
        for d in (0..tile.stride).step_by(LANES) {
            let sums = tile.sums.add(row * tile.stride + d);
            // A position that is not seen may hold anything, NaN too.
            let x = P::keep(P::load(v.add(d * P::STEP)), element);
            P::dot(P::Acc::load(sums), x, p).store(sums);
        }
    }
}

/// [`weigh`] for all elements.
#[inline(always)]
unsafe fn weigh_rows<P: Products, const R: usize>(
    tile: Tile<P::Element>,
    row: usize,
    values: &Group<P::Element>,
    positions: [usize; 2],
    at: usize,
) {
    if positions[0] >= positions[1] {
        return;
    }
    let mut d = 0;
    // SAFETY: the caller's conditions.
    unsafe {
        while P::Acc::REGISTERS >= 32 && d + 4 * LANES <= tile.stride {
            weigh::<P, R, 4>(tile, row, values, positions, at, d);
            d += 4 * LANES;
        }
        while d + 2 * LANES <= tile.stride {
            weigh::<P, R, 2>(tile, row, values, positions, at, d);
            d += 2 * LANES;
        }
        if d < tile.stride {
            weigh::<P, R, 1>(tile, row, values, positions, at, d);
        }
    }
}

/// One row's positions `from..to` of a group.
#[inline(always)]
unsafe fn weigh_row<P: Products>(
    tile: Tile<P::Element>,
    row: usize,
    values: &Group<P::Element>,
    [mut from, to]: [usize; 2],
    at: usize,
) {
    if from >= to {
        return;
    }
    // SAFETY: the caller's conditions.
    unsafe {
        if from % P::STEP != 0 {
            weigh_one::<P>(tile, row, values, from, at);
            from += 1;
        }
        let whole = to / P::STEP * P::STEP;
        weigh_rows::<P, 1>(tile, row, values, [from, whole], at);
        // A `from` that stood alone may have been all.
        if to % P::STEP != 0 && to > from {
            weigh_one::<P>(tile, row, values, to - 1, at);
        }
    }
}

/// Rows that [`values`] computes side by side, of `left`.
#[inline(always)]
fn rows_at_once(left: usize, wide: bool) -> usize {
    match left {
        6.. if wide => 6,
        4.. if wide => 4,
        3 if wide => 3,
        1 => 1,
        _ => 2,
    }
}

/// Adds values times probabilities for `rows`, as far as they see the group of blocks that starts at position `at` of the
/// range.
///
/// # Safety
/// As [`scores`](super::kernel::scores).
#[inline(always)]
pub(super) unsafe fn values<P: Products>(
    tile: Tile<P::Element>,
    rows: std::ops::Range<usize>,
    values: &Group<P::Element>,
    at: usize,
) {
    let mut row = rows.start;
    while row < rows.end {
        let n = rows_at_once(rows.end - row, P::Acc::REGISTERS >= 32);
        // SAFETY: the caller's conditions.
        unsafe {
            // Positions that all of them see, in whole steps; then what each sees before and behind.
            let from = tile.seen_in_group(row + n - 1, at)[0].next_multiple_of(P::STEP);
            let to = tile.seen_in_group(row, at)[1] / P::STEP * P::STEP;
            if n == 1 || from >= to {
                for row in row..row + n {
                    weigh_row::<P>(tile, row, values, tile.seen_in_group(row, at), at);
                }
            } else {
                for row in row..row + n {
                    let own = tile.seen_in_group(row, at);
                    weigh_row::<P>(tile, row, values, [own[0], own[1].min(from)], at);
                }
                match n {
                    6 => weigh_rows::<P, 6>(tile, row, values, [from, to], at),
                    4 => weigh_rows::<P, 4>(tile, row, values, [from, to], at),
                    3 => weigh_rows::<P, 3>(tile, row, values, [from, to], at),
                    _ => weigh_rows::<P, 2>(tile, row, values, [from, to], at),
                }
                for row in row..row + n {
                    let own = tile.seen_in_group(row, at);
                    weigh_row::<P>(tile, row, values, [own[0].max(to), own[1]], at);
                }
            }
        }
        row += n;
    }
}

//! One task of attention: a tile of rows over its ranges of positions.

use super::cache::SMALLEST;
use super::kernel::{self, GROUP_BLOCKS, GROUP_TOKENS, Group, RANGE_TOKENS, Tile, exp2};
use super::plan::Task;
use super::{Cache, Step, values};
#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::pairs::Avx512Pairs;
use crate::cpu::simd::pairs::{CacheLanes, F32Products, Products, WidenedPairs};
use crate::cpu::simd::{LANES, Lanes, dispatch};

/// Bytes of a thread's scratch, cut into pieces on cache lines.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pieces {
    pub(super) rows: usize,
    pub(super) dim: usize,
    pub(super) stride: usize,
}

impl Pieces {
    /// `[rows][stride]` sums over ranges, then maxima and sums of probabilities: a partial result.
    pub(super) fn state_bytes(self) -> usize {
        (self.rows * (self.stride + 2) * 4).next_multiple_of(64)
    }

    /// Queries, scores, probabilities, sums of a range, positions seen, decoded blocks; elements take at most 4 bytes.
    fn sizes(self) -> [usize; 7] {
        let Self { rows, stride, .. } = self;
        let floats = [rows * stride, rows * RANGE_TOKENS, rows * RANGE_TOKENS, rows * stride];
        let [q, scores, p, sums] = floats.map(|n| (n * 4).next_multiple_of(64));
        let seen = (rows * 8).next_multiple_of(64);
        [self.state_bytes(), q, scores, p, sums, seen, GROUP_BLOCKS * LANES * stride * 2]
    }

    pub(super) fn lines(self) -> usize {
        self.sizes().into_iter().map(|bytes| bytes.div_ceil(64)).sum()
    }
}

/// The sums of rows over the ranges so far: `[rows][stride]` outputs, `[rows]` maxima, `[rows]` sums of probabilities.
#[derive(Clone, Copy)]
pub(super) struct State {
    pub(super) out: *mut f32,
    pub(super) max: *mut f32,
    pub(super) sum: *mut f32,
}

impl State {
    /// The state in the memory at `start`, which holds [`Pieces::state_bytes`].
    pub(super) unsafe fn at(start: *mut u8, pieces: Pieces) -> Self {
        let out = start.cast::<f32>();
        // SAFETY: the caller's conditions.
        let max = unsafe { out.add(pieces.rows * pieces.stride) };
        // SAFETY: as above.
        Self { out, max, sum: unsafe { max.add(pieces.rows) } }
    }

    /// Nothing seen yet.
    unsafe fn clear(self, pieces: Pieces) {
        // SAFETY: the caller's conditions.
        unsafe {
            std::slice::from_raw_parts_mut(self.out, pieces.rows * pieces.stride).fill(0.0);
            std::slice::from_raw_parts_mut(self.max, pieces.rows).fill(f32::NEG_INFINITY);
            std::slice::from_raw_parts_mut(self.sum, pieces.rows).fill(0.0);
        }
    }

    /// Adds what `row` has in a range that comes next.
    #[inline(always)]
    unsafe fn add<L: CacheLanes>(self, stride: usize, row: usize, out: *const f32, max: f32, sum: f32) {
        // SAFETY: the caller's conditions.
        unsafe {
            let (own_max, own_sum) = (*self.max.add(row), *self.sum.add(row));
            let new_max = if own_max > max { own_max } else { max };
            let own_factor = exp2(L::splat(own_max - new_max));
            let factor = exp2(L::splat(max - new_max));
            let new_sum = L::splat(sum).mul_add(factor, L::splat(own_sum).mul(own_factor));
            *self.max.add(row) = new_max;
            *self.sum.add(row) = new_sum.to_array()[0];
            for d in (0..stride).step_by(LANES) {
                let own = self.out.add(row * stride + d);
                let scaled = L::load(own).mul(own_factor);
                L::load(out.add(d)).mul_add(factor, scaled).store(own);
            }
        }
    }
}

/// One task's inputs.
#[derive(Clone, Copy)]
pub(super) struct Job<'a> {
    pub(super) step: &'a Step<'a>,
    pub(super) task: &'a Task,
    pub(super) pieces: Pieces,
}

impl Job<'_> {
    /// Query rows per token.
    fn group(&self) -> usize {
        let heads = self.step.cache.layout.heads;
        heads.q / heads.kv
    }

    /// Fills `tile.q`.
    #[inline(always)]
    unsafe fn load_queries<P: Products>(&self, tile: Tile<P::Element>) {
        let heads = self.step.cache.layout.heads;
        let group = self.group();
        for row in 0..tile.rows {
            let at = (self.task.rows.start + row / group) * heads.qkv_width()
                + (self.task.head * group + row % group) * heads.dim;
            let q = &self.step.qkv[at..][..heads.dim];
            // SAFETY: the caller's conditions.
            let to = unsafe { tile.q.add(row * tile.stride) };
            for (i, q) in q.chunks(LANES).enumerate() {
                // SAFETY: whole vectors are inside the row of q, the last one is padded; rows of the tile are padded.
                unsafe {
                    let values = if q.len() == LANES {
                        P::Acc::load(q.as_ptr())
                    } else {
                        let mut padded = [0.0; LANES];
                        padded[..q.len()].copy_from_slice(q);
                        P::Acc::load(padded.as_ptr())
                    };
                    let values = if P::STEP == 2 { values.zero_within(SMALLEST) } else { values };
                    P::store(values, to.add(i * LANES));
                }
            }
        }
    }

    /// Where the head's keys or values of up to [`GROUP_BLOCKS`] blocks are; behind the last one it is repeated.
    #[inline(always)]
    fn addresses(&self, blocks: &[u32], side: Side) -> [*const u8; GROUP_BLOCKS] {
        let Cache { layout, k, v } = self.step.cache;
        let mut found = [k.as_ptr(); GROUP_BLOCKS];
        for (i, found) in found.iter_mut().enumerate() {
            let block = blocks[i.min(blocks.len() - 1)] as usize;
            *found = match side {
                Side::Keys => &k[layout.keys_at(block, self.task.head)..][..layout.key_head_bytes()],
                Side::Values => &v[layout.values_at(block, self.task.head)..][..layout.value_head_bytes()],
            }
            .as_ptr();
        }
        found
    }

    /// The blocks at `addresses` as products take them: in the cache, or the first `count` of them decoded to `decoded`.
    #[inline(always)]
    unsafe fn group_at<P: Products>(
        &self,
        addresses: [*const u8; GROUP_BLOCKS],
        count: usize,
        ahead: [*const u8; GROUP_BLOCKS],
        side: Side,
        decoded: *mut u8,
    ) -> Group<P::Element> {
        let layout = self.step.cache.layout;
        let mut blocks = [decoded.cast_const().cast(); GROUP_BLOCKS];
        if layout.dtype.cast().is_none() {
            for (block, address) in blocks.iter_mut().zip(addresses) {
                *block = address.cast();
            }
            return Group { blocks, ahead: Some(ahead) };
        }
        for (i, block) in blocks.iter_mut().enumerate() {
            // SAFETY: the caller's conditions; there is space for every block of the group.
            unsafe {
                let to = decoded.cast::<u16>().add(i.min(count - 1) * LANES * self.pieces.stride);
                if i < count {
                    match side {
                        Side::Keys => layout.decode_keys::<P::Acc>(addresses[i], ahead[i], to),
                        Side::Values => layout.decode_values::<P::Acc>(addresses[i], ahead[i], to),
                    }
                }
                *block = to.cast_const().cast();
            }
        }
        Group { blocks, ahead: None }
    }
}

/// Which part of the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Keys,
    Values,
}

/// Runs a task with `scratch`; leaves its sums in the scratch's [`State`].
#[inline(always)]
unsafe fn attend<P: Products>(job: Job<'_>, scratch: *mut u8) {
    let Job { step, task, pieces } = job;
    let group = job.group();
    let rows = task.rows.len() * group;
    let [state, q, scores, p, sums, seen, _] = pieces.sizes();
    let all = step.seen(task.sequence, &task.rows);
    let table = &step.block_tables[task.sequence * step.max_blocks..][..all.end.div_ceil(LANES)];
    // SAFETY: the pieces are inside the scratch, and large enough for this tile.
    unsafe {
        let at = |bytes: usize| scratch.add(bytes);
        let total = State::at(scratch, pieces);
        total.clear(pieces);
        let tile = Tile::<P::Element> {
            rows,
            dim: pieces.dim,
            stride: pieces.stride,
            q: at(state).cast(),
            scores: at(state + q).cast(),
            p: at(state + q + scores).cast(),
            sums: at(state + q + scores + p).cast(),
            seen: at(state + q + scores + p + sums).cast(),
        };
        let decoded = at(state + q + scores + p + sums + seen);
        job.load_queries::<P>(tile);
        let scale = step.scale * std::f32::consts::LOG2_E;
        for range in task.ranges.clone() {
            let start = range * RANGE_TOKENS;
            // What each row sees of the range; the rows that see something of it.
            let first_to = all.end + 1 - task.rows.len();
            for row in 0..rows {
                let to = first_to + row / group;
                let from = step.window.map_or(0, |window| to.saturating_sub(window));
                let (from, to) =
                    (from.max(start) - start, to.min(start + RANGE_TOKENS).saturating_sub(start));
                *tile.seen.add(row) = [from.min(to) as u32, to as u32];
            }
            let sees = |row: &usize| tile.seen_in_range(*row)[0] < tile.seen_in_range(*row)[1];
            let Some(first_row) = (0..rows).find(sees) else { continue };
            let end_row = (first_row..rows).find(|row| !sees(row)).unwrap_or(rows);
            let (from, to) = (tile.seen_in_range(first_row)[0], tile.seen_in_range(end_row - 1)[1]);
            let blocks = &table[start / LANES..(start + to).div_ceil(LANES)];
            let first_group = from / GROUP_TOKENS * GROUP_BLOCKS;
            let group = |first: usize| &blocks[first..blocks.len().min(first + GROUP_BLOCKS)];
            // Keys of this range, then its values, then the keys of the next one.
            let mut here = job.addresses(group(first_group), Side::Keys);
            for first in (first_group..blocks.len()).step_by(GROUP_BLOCKS) {
                let next = first + GROUP_BLOCKS;
                let ahead = if next < blocks.len() {
                    job.addresses(group(next), Side::Keys)
                } else {
                    job.addresses(group(first_group), Side::Values)
                };
                let keys = job.group_at::<P>(here, group(first).len(), ahead, Side::Keys, decoded);
                kernel::scores::<P>(tile, first_row..end_row, &keys, first * LANES, scale);
                here = ahead;
            }
            std::slice::from_raw_parts_mut(tile.sums, rows * pieces.stride).fill(0.0);
            // Where maxima and sums of the range wait for its values: the scores are done with.
            for row in first_row..end_row {
                let (max, sum) = kernel::probabilities::<P>(tile, row);
                *tile.scores.add(row * RANGE_TOKENS) = max;
                *tile.scores.add(row * RANGE_TOKENS + 1) = sum;
            }
            for first in (first_group..blocks.len()).step_by(GROUP_BLOCKS) {
                let next = first + GROUP_BLOCKS;
                let ahead = if next < blocks.len() {
                    job.addresses(group(next), Side::Values)
                } else {
                    let next_range = (start + RANGE_TOKENS) / LANES;
                    let next_blocks = &table[next_range.min(table.len() - 1)..];
                    job.addresses(&next_blocks[..next_blocks.len().min(GROUP_BLOCKS)], Side::Keys)
                };
                let group_values = job.group_at::<P>(here, group(first).len(), ahead, Side::Values, decoded);
                values::values::<P>(tile, first_row..end_row, &group_values, first * LANES);
                here = ahead;
            }
            for row in first_row..end_row {
                let max = *tile.scores.add(row * RANGE_TOKENS);
                let sum = *tile.scores.add(row * RANGE_TOKENS + 1);
                total.add::<P::Acc>(pieces.stride, row, tile.sums.add(row * pieces.stride), max, sum);
            }
        }
    }
}

#[inline(always)]
unsafe fn attend_f32<L: CacheLanes>(job: Job<'_>, scratch: *mut u8) {
    // SAFETY: the caller's conditions.
    unsafe { attend::<F32Products<L>>(job, scratch) }
}

#[inline(always)]
unsafe fn attend_widened<L: CacheLanes>(job: Job<'_>, scratch: *mut u8) {
    // SAFETY: the caller's conditions.
    unsafe { attend::<WidenedPairs<L>>(job, scratch) }
}

#[inline(always)]
unsafe fn merge_partials<L: CacheLanes>(partials: *mut u8, count: usize, pieces: Pieces) {
    // SAFETY: the caller's conditions.
    unsafe {
        let total = State::at(partials, pieces);
        for index in 1..count {
            let part = State::at(partials.add(index * pieces.state_bytes()), pieces);
            for row in 0..pieces.rows {
                let (max, sum) = (*part.max.add(row), *part.sum.add(row));
                // Zero for a row that sees nothing of the range, else at least 1, or NaN.
                if sum != 0.0 {
                    total.add::<L>(pieces.stride, row, part.out.add(row * pieces.stride), max, sum);
                }
            }
        }
    }
}

dispatch! {
    /// A task over an F32 cache. `scratch` holds the job's pieces.
    pub(super) fn task_f32(job: Job<'_>, scratch: *mut u8) = attend_f32
}
dispatch! {
    /// A task over any other cache.
    pub(super) fn task_widened(job: Job<'_>, scratch: *mut u8) = attend_widened
}
dispatch! {
    /// Merges partial results into the first.
    pub(super) fn merge(partials: *mut u8, count: usize, pieces: Pieces) = merge_partials
}

/// As [`task_widened`], by `vdpbf16ps`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
pub(super) unsafe fn task_avx512bf16(job: Job<'_>, scratch: *mut u8) {
    // SAFETY: the caller's conditions.
    unsafe { attend::<Avx512Pairs>(job, scratch) }
}

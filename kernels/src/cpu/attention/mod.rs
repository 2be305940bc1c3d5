//! Attention over the paged KV cache.
//!
//! The order of every sum depends on positions alone, not on chunks, neighbours, threads or where blocks lie: positions
//! are taken in ranges of 256, which start at multiples of 256, and the ranges one after the other.
//!
//! ```text
//! in a range      s[t] = (sum over d of q[d] k[t, d]) * scale * log2(e)
//!                 m = max s[t],  p[t] = 2^(s[t] - m), 0 below 2^-40
//!                 l = sum of p[t], as a tree over lanes of (in order of blocks: p[16 i + lane])
//!                 o[d] = sum over t of p[t] v[t, d]
//! over ranges     m' = max(M, m);  L = l 2^(m - m') + (L 2^(M - m'));  O likewise;  M = m'
//! result          O / L, as O * (1 / L)
//! ```
//!
//! A cache of F32 is multiplied in F32, in order of d and t. For the other types q and p are rounded to bfloat16 (l is the
//! sum of what was not rounded), keys and values are bfloat16 or MX elements times their scales, which are bfloat16 values
//! too, and sums run over pairs of neighbours, the second before the first, as `vdpbf16ps` does. Each product is added
//! by one fused multiply-add of F32.

mod cache;
mod kernel;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

pub(crate) use self::cache::KvLayout;
use self::cache::SMALLEST;
use self::kernel::{GROUP_BLOCKS, GROUP_TOKENS, RANGE_TOKENS, Tile, exp2};
use super::memory::{Line, Scratch};
use super::pool::{DisjointSlices, Pool};
#[cfg(target_arch = "x86_64")]
use super::simd::pairs::Avx512Pairs;
use super::simd::pairs::{CacheLanes, F32Products, Products, WidenedPairs};
use super::simd::{LANES, Lanes, dispatch};
use crate::backend::KV_BLOCK_TOKENS;
use crate::buffer::MemoryAccount;
use crate::isa::Isa;
use crate::kv_cache_dtype::KvCacheDtype;

const _: () = assert!(KV_BLOCK_TOKENS == LANES, "a block's tokens are one vector");

/// Query rows, of the heads that share a KV head, that go over the keys and values together.
const TILE_ROWS: usize = 48;

/// Tasks per thread below which tasks are cut into ranges.
const TASKS_PER_THREAD: usize = 4;

/// What computes products of bfloat16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PairIsa {
    /// `vdpbf16ps`.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    /// Fused multiply-adds of F32.
    Widened(Isa),
}

impl PairIsa {
    /// What this processor has for `isa`, best first; never empty.
    pub(crate) fn available(isa: Isa) -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        if matches!(isa, Isa::Avx512Vnni | Isa::Avx512) && is_x86_feature_detected!("avx512bf16") {
            found.push(Self::Avx512Bf16);
        }
        found.push(Self::Widened(isa));
        found
    }

    /// Name for people and metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => "avx512bf16",
            Self::Widened(isa) => isa.name(),
        }
    }
}

/// One layer's cache.
#[derive(Clone, Copy)]
pub(crate) struct Cache<'a> {
    /// Sizes and offsets.
    pub(crate) layout: KvLayout,
    /// Keys of all blocks.
    pub(crate) k: &'a [u8],
    /// Values of all blocks.
    pub(crate) v: &'a [u8],
}

/// What every sequence of a step has in common.
#[derive(Clone, Copy)]
pub(crate) struct Step<'a> {
    /// The cache.
    pub(crate) cache: Cache<'a>,
    /// Rows of `[q heads | k heads | v heads] x dim`.
    pub(crate) qkv: &'a [f32],
    /// Scores are multiplied by it.
    pub(crate) scale: f32,
    /// Positions that a row sees at most, its own included.
    pub(crate) window: Option<usize>,
    /// First rows of the sequences, and the number of rows.
    pub(crate) query_start: &'a [u32],
    /// Positions of the sequences after the step.
    pub(crate) context_lens: &'a [u32],
    /// Block numbers of the sequences.
    pub(crate) block_tables: &'a [u32],
    /// Row stride of `block_tables`.
    pub(crate) max_blocks: usize,
}

/// Rows of one sequence and one KV head, over some ranges of positions.
#[derive(Debug, Clone)]
struct Task {
    sequence: usize,
    head: usize,
    /// Rows of the step, one a token.
    rows: Range<usize>,
    /// Ranges of positions.
    ranges: Range<usize>,
    /// Where its partial result goes; `None` if it has all ranges.
    part: Option<Part>,
}

/// One of several tasks with the same rows.
#[derive(Debug, Clone, Copy)]
struct Part {
    /// Which of the counters of unfinished tasks is theirs.
    counter: usize,
    /// First and number of their partial results, and which one is its own.
    first: usize,
    count: usize,
    own: usize,
}

/// Memory of attention, which grows to what the largest step needed.
pub(crate) struct AttentionScratch {
    threads: Scratch<Line>,
    partials: Scratch<Line>,
    tasks: Vec<Task>,
    unfinished: Vec<AtomicU32>,
}

impl AttentionScratch {
    /// Empty scratch whose size is charged to `memory`.
    pub(crate) fn new(memory: &Arc<MemoryAccount>) -> Self {
        Self {
            threads: Scratch::new(memory),
            partials: Scratch::new(memory),
            tasks: Vec::new(),
            unfinished: Vec::new(),
        }
    }
}

impl Step<'_> {
    /// Lists the tasks; returns the number of partial results.
    fn plan(&self, threads: usize, tasks: &mut Vec<Task>, unfinished: &mut Vec<AtomicU32>) -> usize {
        let heads = self.cache.layout.heads;
        let tile_tokens = (TILE_ROWS / (heads.q / heads.kv)).max(1);
        tasks.clear();
        unfinished.clear();
        for (sequence, bounds) in self.query_start.windows(2).enumerate() {
            let (first, last) = (bounds[0] as usize, bounds[1] as usize);
            // Later rows see more: the long tasks come first.
            for start in (first..last).step_by(tile_tokens).rev() {
                let rows = start..(start + tile_tokens).min(last);
                let seen = self.seen(sequence, &rows);
                let ranges = seen.start / RANGE_TOKENS..seen.end.div_ceil(RANGE_TOKENS);
                tasks.extend((0..heads.kv).map(|head| Task {
                    sequence,
                    head,
                    rows: rows.clone(),
                    ranges: ranges.clone(),
                    part: None,
                }));
            }
        }
        if threads == 1 || tasks.len() >= TASKS_PER_THREAD * threads {
            return 0;
        }
        let (mut partials, whole) = (0, tasks.len());
        for index in 0..whole {
            let task = tasks[index].clone();
            let count = task.ranges.len();
            if count > 1 {
                let parts = task.ranges.clone().enumerate().map(|(own, range)| Task {
                    ranges: range..range + 1,
                    part: Some(Part { counter: unfinished.len(), first: partials, count, own }),
                    ..task.clone()
                });
                let mut parts: Vec<_> = parts.collect();
                tasks[index] = parts.swap_remove(0);
                tasks.extend(parts);
                unfinished.push(AtomicU32::new(count as u32));
                partials += count;
            }
        }
        partials
    }

    /// Positions that some of `rows` of `sequence` see.
    fn seen(&self, sequence: usize, rows: &Range<usize>) -> Range<usize> {
        let end = self.query_start[sequence + 1] as usize;
        let context = self.context_lens[sequence] as usize;
        let (first, last) = (context + rows.start + 1 - end, context + rows.end - end);
        self.window.map_or(0, |window| first.saturating_sub(window))..last
    }
}

/// Bytes of a thread's scratch, cut into pieces on cache lines.
#[derive(Debug, Clone, Copy)]
struct Pieces {
    rows: usize,
    dim: usize,
    stride: usize,
}

impl Pieces {
    /// `[rows][stride]` sums over ranges, then maxima and sums of probabilities: a partial result.
    fn state_bytes(self) -> usize {
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

    fn lines(self) -> usize {
        self.sizes().into_iter().map(|bytes| bytes.div_ceil(64)).sum()
    }
}

/// The sums of rows over the ranges so far: `[rows][stride]` outputs, `[rows]` maxima, `[rows]` sums of probabilities.
#[derive(Clone, Copy)]
struct State {
    out: *mut f32,
    max: *mut f32,
    sum: *mut f32,
}

impl State {
    /// The state in the memory at `start`, which holds [`Pieces::state_bytes`].
    unsafe fn at(start: *mut u8, pieces: Pieces) -> Self {
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
struct Job<'a> {
    step: &'a Step<'a>,
    task: &'a Task,
    pieces: Pieces,
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

    /// Up to [`GROUP_BLOCKS`] blocks of keys or values, as products take them: in the cache, or decoded to `decoded`.
    /// Past the end of `blocks` the last one is repeated.
    #[inline(always)]
    unsafe fn group_of<P: Products>(
        &self,
        blocks: &[u32],
        keys: bool,
        decoded: *mut u8,
    ) -> [*const P::Element; GROUP_BLOCKS] {
        let Cache { layout, k, v } = self.step.cache;
        let mut found = [decoded.cast_const().cast(); GROUP_BLOCKS];
        for (i, found) in found.iter_mut().enumerate() {
            let block = blocks[i.min(blocks.len() - 1)] as usize;
            let at = if keys {
                k[layout.keys_at(block, self.task.head)..][..layout.key_head_bytes()].as_ptr()
            } else {
                v[layout.values_at(block, self.task.head)..][..layout.value_head_bytes()].as_ptr()
            };
            if layout.dtype.cast().is_none() {
                *found = at.cast();
            } else if i < blocks.len() {
                // SAFETY: the caller's conditions; there is space for every block of the group.
                unsafe {
                    let to = decoded.cast::<u16>().add(i * LANES * self.pieces.stride);
                    if keys {
                        layout.decode_keys::<P::Acc>(at, to);
                    } else {
                        layout.decode_values::<P::Acc>(at, to);
                    }
                    *found = to.cast_const().cast();
                }
            }
        }
        found
    }
}

/// Runs a task with `scratch`; leaves its sums in the scratch's [`State`].
#[inline(always)]
unsafe fn attend<P: Products>(job: Job<'_>, scratch: *mut u8) {
    let Job { step, task, pieces } = job;
    let group = job.group();
    let rows = task.rows.len() * group;
    let [state, q, scores, p, sums, seen, _] = pieces.sizes();
    let all = step.seen(task.sequence, &task.rows);
    let table = &step.block_tables[task.sequence * step.max_blocks..][..step.max_blocks];
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
            let groups = from / GROUP_TOKENS * GROUP_BLOCKS..blocks.len();
            for first in groups.clone().step_by(GROUP_BLOCKS) {
                let keys =
                    job.group_of::<P>(&blocks[first..blocks.len().min(first + GROUP_BLOCKS)], true, decoded);
                kernel::scores::<P>(tile, first_row..end_row, &keys, first * LANES, scale);
            }
            std::slice::from_raw_parts_mut(tile.sums, rows * pieces.stride).fill(0.0);
            // Where maxima and sums of the range wait for its values: the scores are done with.
            for row in first_row..end_row {
                let (max, sum) = kernel::probabilities::<P>(tile, row);
                *tile.scores.add(row * RANGE_TOKENS) = max;
                *tile.scores.add(row * RANGE_TOKENS + 1) = sum;
            }
            for first in groups.step_by(GROUP_BLOCKS) {
                let values =
                    job.group_of::<P>(&blocks[first..blocks.len().min(first + GROUP_BLOCKS)], false, decoded);
                kernel::values::<P>(tile, first_row..end_row, &values, first * LANES);
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
    fn task_f32(job: Job<'_>, scratch: *mut u8) = attend_f32
}
dispatch! {
    /// A task over any other cache.
    fn task_widened(job: Job<'_>, scratch: *mut u8) = attend_widened
}
dispatch! {
    /// Merges partial results into the first.
    fn merge(partials: *mut u8, count: usize, pieces: Pieces) = merge_partials
}

/// As [`task_widened`], by `vdpbf16ps`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn task_avx512bf16(job: Job<'_>, scratch: *mut u8) {
    // SAFETY: the caller's conditions.
    unsafe { attend::<Avx512Pairs>(job, scratch) }
}

/// Attention of all rows of a step, into `out` `[rows, heads.q_width()]`.
pub(crate) fn attention(
    isa: Isa,
    pairs: PairIsa,
    pool: &mut Pool,
    scratch: &mut AttentionScratch,
    step: &Step<'_>,
    out: &mut [f32],
) {
    let layout = step.cache.layout;
    let heads = layout.heads;
    let group = heads.q / heads.kv;
    let AttentionScratch { threads, partials, tasks, unfinished } = scratch;
    let partial_count = step.plan(pool.threads(), tasks, unfinished);
    let tokens = tasks.iter().map(|task| task.rows.len()).max().unwrap_or(0);
    let pieces = Pieces { rows: tokens * group, dim: heads.dim, stride: layout.stride() };
    let per_thread = pieces.lines();
    let threads = DisjointSlices::new(threads.take(per_thread * pool.threads()), per_thread);
    let per_partial = pieces.state_bytes() / 64;
    let partials = DisjointSlices::new(partials.take(per_partial * partial_count), per_partial);
    let outputs = DisjointSlices::new(out, group * heads.dim);
    let (tasks, unfinished) = (&tasks[..], &unfinished[..]);
    pool.run(tasks.len(), &|index, thread| {
        let task = &tasks[index];
        let job = Job { step, task, pieces };
        // SAFETY: one piece of scratch per thread, one partial result per task; all are large enough for `pieces`. `isa`
        // and `pairs` are available.
        let own = unsafe {
            let own = threads.slice(thread).as_mut_ptr().cast::<u8>();
            match (layout.dtype, pairs) {
                (KvCacheDtype::F32, _) => task_f32(isa, job, own),
                #[cfg(target_arch = "x86_64")]
                (_, PairIsa::Avx512Bf16) => task_avx512bf16(job, own),
                (_, PairIsa::Widened(isa)) => task_widened(isa, job, own),
            }
            own
        };
        let state = match task.part {
            None => own,
            Some(Part { counter, first, count, own: index }) => {
                // SAFETY: as above; the last of the tasks has all the partial results for itself, after their release.
                unsafe {
                    let partial = partials.slice(first + index).as_mut_ptr().cast::<u8>();
                    partial.copy_from_nonoverlapping(own, pieces.state_bytes());
                    if unfinished[counter].fetch_sub(1, Ordering::AcqRel) > 1 {
                        return;
                    }
                    let partials = partials.slice(first).as_mut_ptr().cast::<u8>();
                    merge(isa, partials, count, pieces);
                    partials
                }
            }
        };
        for (token, row) in task.rows.clone().enumerate() {
            // SAFETY: one task, or the last of those with the same rows, writes a row's heads; the state holds all rows.
            unsafe {
                let out = outputs.slice(row * heads.kv + task.head);
                let state = State::at(state, pieces);
                for (head, out) in out.chunks_exact_mut(heads.dim).enumerate() {
                    let row = token * group + head;
                    let factor = 1.0 / *state.sum.add(row);
                    let sums = std::slice::from_raw_parts(state.out.add(row * pieces.stride), heads.dim);
                    for (out, sum) in out.iter_mut().zip(sums) {
                        *out = sum * factor;
                    }
                }
            }
        }
    });
}

/// Writes keys and values of rows to their places in the cache, from several threads.
pub(crate) struct CacheWriter {
    layout: KvLayout,
    k: DisjointBytes,
    v: DisjointBytes,
}

/// Bytes that several threads write, each at its own places.
struct DisjointBytes {
    start: *mut u8,
    len: usize,
}

// SAFETY: `CacheWriter::write` writes disjoint tokens by its contract.
unsafe impl Sync for DisjointBytes {}

impl CacheWriter {
    /// A writer to the cache with keys `k` and values `v`, which the caller keeps borrowed while it is used.
    pub(crate) fn new(layout: KvLayout, k: &mut [u8], v: &mut [u8]) -> Self {
        let bytes = |bytes: &mut [u8]| DisjointBytes { start: bytes.as_mut_ptr(), len: bytes.len() };
        Self { layout, k: bytes(k), v: bytes(v) }
    }

    /// Writes the keys and values `[kv heads, dim]` of one token to `slot`.
    ///
    /// # Safety
    /// The cache is still borrowed, and no two calls at the same time have the same slot.
    pub(crate) unsafe fn write(&self, slot: usize, keys: &[f32], values: &[f32]) {
        let (block, lane) = (slot / LANES, slot % LANES);
        let dim = self.layout.heads.dim;
        for (head, (key, value)) in keys.chunks_exact(dim).zip(values.chunks_exact(dim)).enumerate() {
            let (k, v) = (self.layout.keys_at(block, head), self.layout.values_at(block, head));
            assert!(k + self.layout.key_head_bytes() <= self.k.len, "block {block} is in the cache");
            assert!(v + self.layout.value_head_bytes() <= self.v.len, "block {block} is in the cache");
            // SAFETY: the head's part of the block is inside the cache.
            unsafe { self.layout.write(self.k.start.add(k), self.v.start.add(v), lane, key, value) };
        }
    }
}

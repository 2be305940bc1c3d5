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
mod plan;
mod task;
mod values;
mod writer;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

pub(crate) use self::cache::KvLayout;
use self::kernel::RANGE_TOKENS;
use self::plan::{Part, Task};
use self::task::{Job, Pieces, State};
pub(crate) use self::writer::CacheWriter;
use super::memory::{Line, Scratch};
use super::pool::{DisjointSlices, Pool};
use super::simd::LANES;
use crate::backend::KV_BLOCK_TOKENS;
use crate::buffer::MemoryAccount;
use crate::isa::Isa;
use crate::kv_cache_dtype::KvCacheDtype;

const _: () = assert!(KV_BLOCK_TOKENS == LANES, "a block's tokens are one vector");

/// Products of scores below which a parallel region costs more than it saves: some microseconds' worth.
const SERIAL_PRODUCTS: usize = 256 * 1024;

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
        #[cfg(target_arch = "x86_64")]
        let pairs = (matches!(isa, Isa::Avx512Vnni | Isa::Avx512) && is_x86_feature_detected!("avx512bf16"))
            .then_some(Self::Avx512Bf16);
        #[cfg(not(target_arch = "x86_64"))]
        let pairs = None;
        pairs.into_iter().chain([Self::Widened(isa)]).collect()
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
    let body = |index: usize, thread: usize| {
        let task = &tasks[index];
        let job = Job { step, task, pieces };
        // SAFETY: one piece of scratch per thread, one partial result per task; all are large enough for `pieces`. `isa`
        // and `pairs` are available.
        let own = unsafe {
            let own = threads.slice(thread).as_mut_ptr().cast::<u8>();
            match (layout.dtype, pairs) {
                (KvCacheDtype::F32, _) => task::task_f32(isa, job, own),
                #[cfg(target_arch = "x86_64")]
                (_, PairIsa::Avx512Bf16) => task::task_avx512bf16(job, own),
                (_, PairIsa::Widened(isa)) => task::task_widened(isa, job, own),
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
                    task::merge(isa, partials, count, pieces);
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
    };
    let positions: usize = tasks.iter().map(|task| task.rows.len() * task.ranges.len() * RANGE_TOKENS).sum();
    if positions * group * heads.dim < SERIAL_PRODUCTS {
        (0..tasks.len()).for_each(|index| body(index, 0));
    } else {
        pool.run(tasks.len(), &body);
    }
}

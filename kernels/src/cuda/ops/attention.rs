//! Launchers of `attention_decode.cu`, `attention_prefill.cu` and `attention_prefill_wgmma.cu`.

use std::cell::RefCell;
use std::f32::consts::LOG2_E;
use std::sync::Arc;

use super::{HEAD_DIMS, address, head_dim_index, int};
use crate::backend::{AttentionInputs, Heads, KV_BLOCK_TOKENS, PagedKv};
use crate::buffer::{Buffer, Charge, Component, Dtype, MemoryAccount};
use crate::cuda::launch::Argument;
use crate::cuda::{Context, DeviceBuffer, DevicePtr, Function, Launch};
use crate::error::Result;

/// `DECODE_WARPS`, `DECODE_STAGES`, `HEAD_TILE` and `RESULT_STRIDE - DIM` of `attention_decode.cu`.
const DECODE_WARPS: usize = 4;
const DECODE_STAGES: usize = 2;
const HEAD_TILE: usize = 8;
const RESULT_PADDING: usize = 4;

/// Blocks of the decode kernel that together fill the device when a row's work is cut finest.
const FULL_BLOCKS: usize = 128;
/// Most chunks that a row's keys are cut into.
const MAX_CHUNKS: usize = 64;
/// Shared memory of a multiprocessor, what the driver takes of it for each block, and the most blocks of the decode
/// kernel that registers allow.
const SM_SHARED_BYTES: usize = 228 * 1024;
const RESERVED_BYTES: usize = 1024;
const MAX_BLOCKS_PER_SM: usize = 4;

/// Paged attention.
#[derive(Debug)]
pub(crate) struct AttentionOperator {
    context: Arc<Context>,
    memory: Arc<MemoryAccount>,
    /// For each of [`HEAD_DIMS`].
    decode: [Function; HEAD_DIMS.len()],
    prefill: [Prefill; HEAD_DIMS.len()],
    scratch: RefCell<Option<Scratch>>,
}

/// The kernel for sequences with several rows.
#[derive(Debug)]
struct Prefill {
    kernel: Function,
    /// Rows of a block, its threads, and its dynamic shared memory in bytes for each element of a head.
    rows: usize,
    threads: u32,
    shared_per_element: usize,
}

/// Where blocks that share a row's keys leave their results.
#[derive(Debug)]
struct Scratch {
    results: DeviceBuffer,
    arrivals: DeviceBuffer,
    _charge: Charge,
}

/// `AttentionArguments` of `attention.cuh`.
#[repr(C)]
struct AttentionArguments {
    qkv: DevicePtr,
    k_cache: DevicePtr,
    v_cache: DevicePtr,
    query_start: DevicePtr,
    context_lens: DevicePtr,
    block_tables: DevicePtr,
    out: DevicePtr,
    scale_log2: f32,
    window: i32,
    q_heads: i32,
    kv_heads: i32,
    max_blocks: i32,
    padding: u32,
}

// SAFETY: seven addresses, a float, four integers and what C pads them with.
unsafe impl Argument for AttentionArguments {}

/// `DecodeSplit` of `attention_decode.cu`.
#[repr(C)]
struct DecodeSplit {
    results: DevicePtr,
    arrivals: DevicePtr,
    max_chunks: i32,
    padding: u32,
}

// SAFETY: two addresses, an integer and what C pads it with.
unsafe impl Argument for DecodeSplit {}

/// How the decode kernel cuts the work for some head geometry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cut {
    /// Query heads of one KV head that a block handles at most.
    heads: usize,
    /// Blocks that a row needs: KV heads times tiles of query heads.
    tiles: usize,
    /// Chunks of a row's keys. Like everything that the order of sums depends on, a function of the heads alone.
    max_chunks: usize,
    /// Dynamic shared memory of a block, in bytes.
    shared_bytes: usize,
    /// Blocks that run at a time.
    slots: usize,
}

impl Cut {
    fn new(heads: Heads, sm_count: usize) -> Self {
        let group = heads.q / heads.kv;
        let tiles = heads.kv * group.div_ceil(HEAD_TILE);
        let tile_heads = group.min(HEAD_TILE);
        let stages = DECODE_WARPS * DECODE_STAGES * 2 * KV_BLOCK_TOKENS * heads.dim * 2;
        let shared_bytes = stages + DECODE_WARPS * tile_heads * (heads.dim + RESULT_PADDING) * 4;
        let per_sm = (SM_SHARED_BYTES / (shared_bytes + RESERVED_BYTES)).clamp(1, MAX_BLOCKS_PER_SM);
        let max_chunks = (FULL_BLOCKS / tiles).clamp(1, MAX_CHUNKS);
        Self { heads: tile_heads, tiles, max_chunks, shared_bytes, slots: sm_count * per_sm }
    }

    /// Blocks that share each row: as many as run at a time, each with as many chunks as the others.
    fn parts(&self, sequences: usize) -> usize {
        let most = (self.slots / (sequences * self.tiles)).clamp(1, self.max_chunks);
        self.max_chunks.div_ceil(self.max_chunks.div_ceil(most))
    }

    /// The largest number of rows that [`parts`](Self::parts) shares among several blocks.
    fn most_shared_rows(&self) -> usize {
        if self.max_chunks > 1 { self.slots / 2 / self.tiles } else { 0 }
    }

    /// Floats of one row's results.
    fn result_floats(&self, dim: usize) -> usize {
        self.tiles * self.max_chunks * self.heads * (dim + RESULT_PADDING)
    }
}

impl AttentionOperator {
    pub(crate) fn new(context: &Arc<Context>, memory: &Arc<MemoryAccount>) -> Self {
        let decode = [
            "ops_attention_decode_16",
            "ops_attention_decode_32",
            "ops_attention_decode_64",
            "ops_attention_decode_96",
            "ops_attention_decode_128",
            "ops_attention_decode_256",
        ];
        // Queries, two stages of keys and two of values, 64 rows each; and two stages of 128 keys and values.
        let mma = |name| Prefill {
            kernel: context.function(name),
            rows: 64,
            threads: 128,
            shared_per_element: 5 * 64 * 2,
        };
        let wgmma = |name| Prefill {
            kernel: context.function(name),
            rows: 128,
            threads: 384,
            shared_per_element: 4 * 128 * 2,
        };
        Self {
            decode: decode.map(|name| context.function(name)),
            prefill: [
                mma("ops_attention_prefill_16"),
                mma("ops_attention_prefill_32"),
                wgmma("ops_attention_prefill_wgmma_64"),
                mma("ops_attention_prefill_96"),
                wgmma("ops_attention_prefill_wgmma_128"),
                mma("ops_attention_prefill_256"),
            ],
            scratch: RefCell::new(None),
            context: Arc::clone(context),
            memory: Arc::clone(memory),
        }
    }
}

impl AttentionOperator {
    /// Makes room for what steps of up to any number of sequences with these heads leave in memory. To be called before
    /// [`attend`](Self::attend), not between launches.
    ///
    /// # Errors
    /// Out of memory.
    pub(crate) fn reserve(&self, heads: Heads) -> Result<()> {
        let cut = self.cut(heads);
        let rows = cut.most_shared_rows();
        let (results, arrivals) = (rows * cut.result_floats(heads.dim) * 4, rows * cut.tiles * 4);
        let mut scratch = self.scratch.borrow_mut();
        let enough = |s: &Scratch| s.results.bytes() >= results && s.arrivals.bytes() >= arrivals;
        if results == 0 || scratch.as_ref().is_some_and(enough) {
            return Ok(());
        }
        let (had_results, had_arrivals) =
            scratch.as_ref().map_or((0, 0), |s| (s.results.bytes(), s.arrivals.bytes()));
        let (results, arrivals) = (results.max(had_results), arrivals.max(had_arrivals));
        *scratch = Some(Scratch {
            results: DeviceBuffer::uninitialized(&self.context, results, "attention")?,
            arrivals: DeviceBuffer::zeroed(&self.context, arrivals, "attention")?,
            _charge: self.memory.charge(Component::Workspace, results + arrivals),
        });
        Ok(())
    }

    fn cut(&self, heads: Heads) -> Cut {
        Cut::new(heads, self.context.properties().sm_count as usize)
    }

    /// Causal attention of the q part of `qkv` over a BF16 cache; see [`Backend`](crate::Backend::paged_attention).
    #[allow(clippy::too_many_arguments, reason = "one fused kernel")]
    pub(crate) fn attend(
        &self,
        qkv: &Buffer,
        heads: Heads,
        scale: f32,
        window: Option<usize>,
        inputs: &AttentionInputs<'_>,
        cache: &PagedKv,
        out: &mut Buffer,
    ) {
        let AttentionInputs { rows, sequences, max_blocks, .. } = *inputs;
        if sequences == 0 {
            return;
        }
        let Heads { q, kv, dim } = heads;
        assert!(kv > 0 && q.is_multiple_of(kv), "{q} query heads cannot share {kv} KV heads");
        let cached = cache.blocks * kv * KV_BLOCK_TOKENS * dim;
        let arguments = AttentionArguments {
            qkv: address(qkv, Dtype::Bf16, rows * heads.qkv_width()),
            k_cache: address(&cache.k, Dtype::Bf16, cached),
            v_cache: address(&cache.v, Dtype::Bf16, cached),
            query_start: address(inputs.query_start, Dtype::U32, sequences + 1),
            context_lens: address(inputs.context_lens, Dtype::U32, sequences),
            block_tables: address(inputs.block_tables, Dtype::U32, sequences * max_blocks),
            out: address(out, Dtype::Bf16, rows * heads.q_width()),
            scale_log2: scale * LOG2_E,
            window: window.map_or(0, int),
            q_heads: int(q),
            kv_heads: int(kv),
            max_blocks: int(max_blocks),
            padding: 0,
        };
        let index = head_dim_index(dim);
        // Every sequence has at least one row: with as many rows as sequences, none has more.
        if rows > sequences {
            let Prefill { kernel, rows: tile, threads, shared_per_element } = &self.prefill[index];
            // A tile for each started `tile` rows of a sequence: no more than this, if sequences have more than one row.
            let tiles = rows.div_ceil(*tile) + sequences.min(rows / 2);
            let launch = Launch::new(1, *threads)
                .grid([q as u32, tiles as u32, 1])
                .shared((shared_per_element * dim + RESERVED_BYTES) as u32);
            // SAFETY: every buffer has the elements checked above; tables, lengths and block numbers are of this cache,
            // as every caller of this operator promises.
            unsafe { self.context.launch(kernel, &launch, &[&arguments, &int(sequences)]) };
        }
        let cut = self.cut(heads);
        let mut parts = cut.parts(sequences);
        let scratch = self.scratch.borrow();
        let (results, arrivals) = match &*scratch {
            Some(s)
                if s.results.bytes() >= sequences * cut.result_floats(dim) * 4
                    && s.arrivals.bytes() >= sequences * cut.tiles * 4 =>
            {
                (s.results.ptr(), s.arrivals.ptr())
            }
            _ => {
                parts = 1;
                (0, 0)
            }
        };
        let split = DecodeSplit { results, arrivals, max_chunks: int(cut.max_chunks), padding: 0 };
        let launch = Launch::new(1, (DECODE_WARPS * super::WARP) as u32)
            .grid([cut.tiles as u32, parts as u32, sequences as u32])
            .shared(cut.shared_bytes as u32);
        // SAFETY: as above; the scratch has room for the results of all sequences, or is not used.
        unsafe { self.context.launch(&self.decode[index], &launch, &[&arguments, &split]) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_cut_by_heads_and_shared_by_batch() {
        let heads = Heads { q: 32, kv: 8, dim: 128 };
        let cut = Cut::new(heads, 132);
        assert_eq!((cut.heads, cut.tiles, cut.max_chunks, cut.slots), (4, 8, 16, 396));
        assert_eq!(cut.parts(1), 16, "one row is shared by all");
        assert_eq!(cut.parts(512), 1, "many rows have a block each");
        // 20 query heads for each KV head are three tiles.
        assert_eq!(Cut::new(Heads { q: 40, kv: 2, dim: 64 }, 132).tiles, 6);
        assert_eq!(cut.parts(8), 6, "384 of 396 slots");
        for sequences in 1..600 {
            let parts = cut.parts(sequences);
            assert!((1..=cut.max_chunks).contains(&parts));
            assert_eq!(parts > 1, sequences <= cut.most_shared_rows());
        }
    }
}

//! Launchers of the kernels of `attention_decode.cuh`, `attention_prefill.cuh` and `attention_prefill_wgmma.cuh`.

use std::cell::RefCell;
use std::f32::consts::LOG2_E;
use std::sync::Arc;

use super::kv::{KvKernels, head_block_bytes, kv_addresses};
use super::{WARP, address, int, output_address};
use crate::backend::{AttentionInputs, Heads, KV_BLOCK_TOKENS, PagedKv};
use crate::buffer::{Buffer, Charge, Component, Dtype, MemoryAccount};
use crate::cuda::gemm::PreparationArgument;
use crate::cuda::launch::Argument;
use crate::cuda::{Context, DeviceBuffer, DevicePtr, Function, Launch};
use crate::error::Result;
use crate::input_form::InputForm;
use crate::kv_cache_dtype::KvCacheDtype;
use crate::mx::Block;

/// `DECODE_WARPS`, `HEAD_TILE` and `RESULT_STRIDE - DIM` of `attention_decode.cuh`.
const DECODE_WARPS: usize = 4;
const HEAD_TILE: usize = 8;
const RESULT_PADDING: usize = 4;

/// `STAGES` of the caches in BF16 and in MX there.
const DECODE_STAGES: usize = 2;
const MX_DECODE_STAGES: usize = 4;

/// `ROWS`, `KEYS` and `STAGES` of `attention_prefill_wgmma.cuh`, and `RAW_STAGES` of its producer for MX.
const WGMMA_ROWS: usize = 128;
const WGMMA_KEYS: usize = 128;
const WGMMA_STAGES: usize = 2;
const RAW_STAGES: usize = 3;

/// Chunks that a row's keys are cut into, for all tiles of its heads together: enough that one row fills the device.
const ROW_CHUNKS: usize = 128;
/// Most chunks of one tile of heads.
const MAX_CHUNKS: usize = 64;

/// Shared memory of a multiprocessor, what the driver takes of it for each block, and the most blocks of the decode
/// kernel that registers allow.
const SM_SHARED_BYTES: usize = 228 * 1024;
const RESERVED_BYTES: usize = 1024;
const MAX_BLOCKS_PER_SM: usize = 3;

/// Paged attention.
#[derive(Debug)]
pub(crate) struct AttentionOperator {
    context: Arc<Context>,
    memory: Arc<MemoryAccount>,
    /// For the caches that were reserved.
    loaded: RefCell<Vec<Loaded>>,
    scratch: RefCell<Option<Scratch>>,
}

/// The kernels for a kind of cache.
#[derive(Debug)]
struct Loaded {
    kernels: &'static KvKernels,
    decode: Function,
    prefill: Prefill,
}

/// The kernel for sequences with several rows.
#[derive(Debug)]
struct Prefill {
    kernel: Function,
    /// Rows of a block, its threads, and its dynamic shared memory in bytes.
    rows: usize,
    threads: u32,
    shared_bytes: usize,
}

impl Prefill {
    fn new(context: &Context, kernels: &KvKernels, dtype: KvCacheDtype, dim: usize) -> Self {
        let kernel = context.function(kernels.prefill);
        if !kernels.has_wgmma {
            // Queries, two stages of keys and two of values, 64 rows each.
            return Self { kernel, rows: 64, threads: 128, shared_bytes: 5 * 64 * dim * 2 };
        }
        // Queries, keys and values in BF16, what comes of the cache before it is that, and barriers.
        let tiles = (WGMMA_ROWS + 2 * WGMMA_STAGES * WGMMA_KEYS) * dim * 2;
        let raw = match dtype.cast() {
            Some(_) => RAW_STAGES * WGMMA_KEYS / KV_BLOCK_TOKENS * head_block_bytes(dtype, dim),
            None => 0,
        };
        Self { kernel, rows: WGMMA_ROWS, threads: 384, shared_bytes: tiles + raw + RESERVED_BYTES }
    }
}

/// Where blocks that share a row's keys leave their results: a piece and a counter for each block.
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
    preparation: PreparationArgument,
    padding: u32,
}

// SAFETY: seven addresses, a float, integers, a structure of numbers and what C pads them with.
unsafe impl Argument for AttentionArguments {}

/// `DecodeSplit` of `attention_decode.cu`.
#[repr(C)]
struct DecodeSplit {
    results: DevicePtr,
    arrivals: DevicePtr,
    max_chunks: i32,
    sequences: i32,
}

// SAFETY: two addresses and two integers.
unsafe impl Argument for DecodeSplit {}

/// How the decode kernel cuts the work for some head geometry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cut {
    /// Tiles of query heads: for each KV head, as many as it takes.
    tiles: usize,
    /// Most chunks of a row's keys. Like everything that the order of sums depends on, a function of the heads alone.
    max_chunks: usize,
    /// Dynamic shared memory of a block, in bytes.
    shared_bytes: usize,
    /// Blocks that run at a time.
    blocks: usize,
    /// Floats that a block may leave for others.
    result_floats: usize,
}

impl Cut {
    fn new(heads: Heads, dtype: KvCacheDtype, sm_count: usize) -> Self {
        let group = heads.q / heads.kv;
        let tiles = heads.kv * group.div_ceil(HEAD_TILE);
        let results = group.min(HEAD_TILE) * (heads.dim + RESULT_PADDING);
        let stages = if dtype.cast().is_some() { MX_DECODE_STAGES } else { DECODE_STAGES };
        let stages = DECODE_WARPS * stages * 2 * head_block_bytes(dtype, heads.dim);
        let shared_bytes = stages + DECODE_WARPS * results * 4;
        let per_sm = (SM_SHARED_BYTES / (shared_bytes + RESERVED_BYTES)).clamp(1, MAX_BLOCKS_PER_SM);
        let max_chunks = (ROW_CHUNKS / tiles).clamp(1, MAX_CHUNKS);
        Self {
            tiles,
            max_chunks,
            shared_bytes,
            blocks: sm_count * per_sm,
            result_floats: max_chunks * results,
        }
    }
}

impl AttentionOperator {
    pub(crate) fn new(context: &Arc<Context>, memory: &Arc<MemoryAccount>) -> Self {
        Self {
            loaded: RefCell::default(),
            scratch: RefCell::new(None),
            context: Arc::clone(context),
            memory: Arc::clone(memory),
        }
    }
}

impl AttentionOperator {
    /// Loads the kernels for a cache of `dtype`, and makes room for what blocks leave for each other. To be called for every
    /// geometry that [`attend`](Self::attend) is called with, not between launches.
    ///
    /// # Errors
    /// Out of memory.
    ///
    /// # Panics
    /// There are no kernels for it.
    pub(crate) fn reserve(&self, dtype: KvCacheDtype, heads: Heads) -> Result<()> {
        let mut loaded = self.loaded.borrow_mut();
        if loaded.iter().all(|loaded| !loaded.kernels.are_for(dtype, heads.dim)) {
            let kernels = KvKernels::find(dtype, heads.dim).expect("a cache that the device supports");
            let decode = self.context.function(kernels.decode);
            let prefill = Prefill::new(&self.context, kernels, dtype, heads.dim);
            loaded.push(Loaded { kernels, decode, prefill });
        }
        let cut = self.cut(dtype, heads);
        let mut scratch = self.scratch.borrow_mut();
        let had = scratch.as_ref().map_or((0, 0), |s| (s.results.bytes(), s.arrivals.bytes()));
        let bytes = (had.0.max(cut.blocks * cut.result_floats * 4), had.1.max(cut.blocks * 4));
        if bytes != had {
            *scratch = Some(Scratch {
                results: DeviceBuffer::uninitialized(&self.context, bytes.0, "attention")?,
                arrivals: DeviceBuffer::zeroed(&self.context, bytes.1, "attention")?,
                _charge: self.memory.charge(Component::Workspace, bytes.0 + bytes.1),
            });
        }
        Ok(())
    }

    fn cut(&self, dtype: KvCacheDtype, heads: Heads) -> Cut {
        Cut::new(heads, dtype, self.context.properties().sm_count as usize)
    }

    /// Causal attention of the q part of `qkv` over `cache`, left in `form` if blocks and heads allow it; see
    /// [`Backend`](crate::Backend::paged_attention).
    #[allow(clippy::too_many_arguments, reason = "one fused kernel")]
    pub(crate) fn attend(
        &self,
        qkv: &Buffer,
        heads: Heads,
        scale: f32,
        window: Option<usize>,
        inputs: &AttentionInputs<'_>,
        cache: &PagedKv,
        form: InputForm,
        out: &mut Buffer,
    ) {
        let AttentionInputs { rows, sequences, max_blocks, .. } = *inputs;
        if sequences == 0 {
            return;
        }
        let Heads { q, kv, dim } = heads;
        assert!(kv > 0 && q.is_multiple_of(kv), "{q} query heads cannot share {kv} KV heads");
        let loaded = self.loaded.borrow();
        let loaded = loaded.iter().find(|loaded| loaded.kernels.are_for(cache.dtype, dim));
        let loaded = loaded.expect("the kernels were loaded when the cache was allocated");
        let [k_cache, v_cache] = kv_addresses(cache, heads);
        // Blocks have heads of their own, but a row's factor in E4M3 depends on all heads.
        let (preparation, form) = match form {
            InputForm::Prepared(preparation) if dim.is_multiple_of(Block::OCP.size()) => {
                (Some(preparation), form)
            }
            _ => (None, InputForm::Plain),
        };
        let arguments = AttentionArguments {
            qkv: address(qkv, Dtype::Bf16, rows * heads.qkv_width()),
            k_cache,
            v_cache,
            query_start: address(inputs.query_start, Dtype::U32, sequences + 1),
            context_lens: address(inputs.context_lens, Dtype::U32, sequences),
            block_tables: address(inputs.block_tables, Dtype::U32, sequences * max_blocks),
            out: output_address(out, Dtype::Bf16, rows * heads.q_width()),
            scale_log2: scale * LOG2_E,
            window: window.map_or(0, int),
            q_heads: int(q),
            kv_heads: int(kv),
            max_blocks: int(max_blocks),
            preparation: preparation.into(),
            padding: 0,
        };
        // Every sequence has at least one row: with as many rows as sequences, none has more.
        if rows > sequences {
            let Prefill { kernel, rows: tile, threads, shared_bytes } = &loaded.prefill;
            // A tile for each started `tile` rows of a sequence: no more than this, if sequences have more than one row.
            let tiles = rows.div_ceil(*tile) + sequences.min(rows / 2);
            let launch =
                Launch::new(1, *threads).grid([q as u32, tiles as u32, 1]).shared(*shared_bytes as u32);
            // SAFETY: every buffer has the elements checked above; tables, lengths and block numbers are of this cache,
            // as every caller of this operator promises.
            unsafe { self.context.launch(kernel, &launch, &[&arguments, &int(sequences)]) };
        }
        let cut = self.cut(cache.dtype, heads);
        let blocks = cut.blocks.min(sequences * cut.tiles * cut.max_chunks);
        let scratch = self.scratch.borrow();
        let scratch = scratch.as_ref().filter(|s| {
            s.results.bytes() >= blocks * cut.result_floats * 4 && s.arrivals.bytes() >= blocks * 4
        });
        let scratch = scratch.expect("room was reserved for these heads when the cache was allocated");
        let split = DecodeSplit {
            results: scratch.results.ptr(),
            arrivals: scratch.arrivals.ptr(),
            max_chunks: int(cut.max_chunks),
            sequences: int(sequences),
        };
        let launch =
            Launch::new(blocks as u32, ((DECODE_WARPS + 1) * WARP) as u32).shared(cut.shared_bytes as u32);
        // SAFETY: as above; the scratch has a piece and a counter for each block.
        unsafe { self.context.launch(&loaded.decode, &launch, &[&arguments, &split]) };
        out.set_form(form);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_cut_by_heads() {
        let cut = Cut::new(Heads { q: 32, kv: 8, dim: 128 }, KvCacheDtype::Bf16, 132);
        assert_eq!((cut.tiles, cut.max_chunks, cut.blocks), (8, 16, 396), "128 blocks for one row");
        assert_eq!(cut.shared_bytes, 65_536 + 4 * 4 * 132 * 4);
        // 20 query heads for each KV head are three tiles.
        let cut = Cut::new(Heads { q: 40, kv: 2, dim: 64 }, KvCacheDtype::Bf16, 132);
        assert_eq!((cut.tiles, cut.max_chunks), (6, 21));
        let cut = Cut::new(Heads { q: 256, kv: 256, dim: 16 }, KvCacheDtype::Bf16, 132);
        assert_eq!(cut.max_chunks, 1);
        // Twice the stages of half the bytes, and scales.
        let cut = Cut::new(Heads { q: 32, kv: 8, dim: 128 }, KvCacheDtype::Mxfp8, 132);
        assert_eq!((cut.blocks, cut.shared_bytes), (396, 4 * 4 * 2 * (2048 + 64) + 4 * 4 * 132 * 4));
    }
}

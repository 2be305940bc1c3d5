//! Launchers of the kernels of `attention_decode.cuh`, `attention_prefill.cuh`, `attention_prefill_wgmma.cu` and
//! `kv_expand.cu`.

use std::cell::RefCell;
use std::f32::consts::LOG2_E;
use std::sync::Arc;

use super::kv::{KvKernels, head_block_bytes, kv_addresses};
use super::{WARP, address, int, output_address};
use crate::backend::{AttentionInputs, Heads, HostSpans, KV_BLOCK_TOKENS, PagedKv};
use crate::buffer::{Buffer, Charge, Component, Dtype, MemoryAccount};
use crate::cuda::gemm::PreparationArgument;
use crate::cuda::launch::Argument;
use crate::cuda::memory;
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

/// `ROWS`, `KEYS` and `STAGES` of `attention_prefill_wgmma.cu`.
const WGMMA_ROWS: usize = 128;
const WGMMA_KEYS: usize = 128;
const WGMMA_STAGES: usize = 2;

/// Blocks of MX caches that are expanded together, at least: of so many tokens that a step of prompts is a few launches. And most
/// sequences that they are of.
const LEAST_EXPANDED_BLOCKS: usize = 16_384 / KV_BLOCK_TOKENS;
const EXPANDED_SEQUENCES: usize = 256;
const EXPAND_THREADS: u32 = 256;

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
    /// BF16 caches of prompts whose own ones are MX.
    expanded: RefCell<memory::Scratch>,
}

/// The kernels for a kind of cache.
#[derive(Debug)]
struct Loaded {
    kernels: &'static KvKernels,
    decode: Function,
    prefill: Prefill,
    expand: Option<Function>,
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
    fn new(context: &Context, kernels: &KvKernels, dim: usize) -> Self {
        let kernel = context.function(kernels.prefill);
        if !kernels.has_wgmma {
            // Queries, two stages of keys and two of values, 64 rows each.
            return Self { kernel, rows: 64, threads: 128, shared_bytes: 5 * 64 * dim * 2 };
        }
        // Queries, keys and values, and barriers.
        let tiles = (WGMMA_ROWS + 2 * WGMMA_STAGES * WGMMA_KEYS) * dim * 2;
        Self { kernel, rows: WGMMA_ROWS, threads: 384, shared_bytes: tiles + RESERVED_BYTES }
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
#[derive(Clone, Copy)]
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

/// `ExpandedCache` of `kv_expand.cu`.
#[repr(C)]
struct ExpandedCache {
    keys: DevicePtr,
    values: DevicePtr,
    block_tables: DevicePtr,
}

// SAFETY: three addresses.
unsafe impl Argument for ExpandedCache {}

/// Neighbouring sequences whose contexts are expanded together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Group {
    /// The first of them, and how many they are.
    first: usize,
    sequences: usize,
    rows: usize,
    /// Blocks of those with more than one row.
    blocks: usize,
}

impl Group {
    /// All sequences, in groups of up to `most` blocks, which no sequence has more of, and [`EXPANDED_SEQUENCES`] sequences.
    fn all(host: HostSpans<'_>, most: usize) -> Vec<Self> {
        let mut groups = vec![Self::default()];
        for (first, (rows, context)) in host.query_start.windows(2).zip(host.context_lens).enumerate() {
            let rows = (rows[1] - rows[0]) as usize;
            let blocks = if rows > 1 { (*context as usize).div_ceil(KV_BLOCK_TOKENS) } else { 0 };
            assert!(blocks <= most, "{blocks} blocks of a sequence in a table of {most}");
            let full = groups
                .last()
                .is_some_and(|last| last.blocks + blocks > most || last.sequences == EXPANDED_SEQUENCES);
            if full {
                groups.push(Self { first, ..Self::default() });
            }
            if let Some(last) = groups.last_mut() {
                last.sequences += 1;
                last.rows += rows;
                last.blocks += blocks;
            }
        }
        groups.retain(|group| group.blocks > 0);
        groups
    }
}

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
            expanded: RefCell::new(memory::Scratch::new(context, memory, "expanded KV caches")),
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
            let prefill = Prefill::new(&self.context, kernels, heads.dim);
            let expand = kernels.expand.map(|name| self.context.function(name));
            loaded.push(Loaded { kernels, decode, prefill, expand });
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
            // SAFETY: every buffer has the elements checked above; tables, lengths and block numbers are of this cache,
            // as every caller of this operator promises.
            unsafe {
                match &loaded.expand {
                    None => self.prefill(&loaded.prefill, &arguments, rows, sequences),
                    Some(expand) => {
                        self.prefill_expanded(&loaded.prefill, expand, &arguments, heads, inputs.host);
                    }
                }
            }
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

    /// Attention of the sequences with more than one row, of `sequences` with `rows` rows together.
    ///
    /// # Safety
    /// `arguments` has them.
    unsafe fn prefill(
        &self,
        prefill: &Prefill,
        arguments: &AttentionArguments,
        rows: usize,
        sequences: usize,
    ) {
        let Prefill { kernel, rows: tile, threads, shared_bytes } = prefill;
        // A tile for each started `tile` rows of a sequence: no more than this, if sequences have more than one row.
        let tiles = rows.div_ceil(*tile) + sequences.min(rows / 2);
        let grid = [arguments.q_heads as u32, tiles as u32, 1];
        let launch = Launch::new(1, *threads).grid(grid).shared(*shared_bytes as u32);
        // SAFETY: the caller's promise; the kernel waits for its inputs.
        unsafe { self.context.launch(kernel, &launch, &[arguments, &int(sequences)]) };
    }

    /// As [`Self::prefill`], over an MX cache, which `expand` makes a BF16 one in scratch, as many sequences at a time as have
    /// room there.
    ///
    /// # Safety
    /// As there; `host` says the same.
    unsafe fn prefill_expanded(
        &self,
        prefill: &Prefill,
        expand: &Function,
        arguments: &AttentionArguments,
        heads: Heads,
        host: HostSpans<'_>,
    ) {
        let max_blocks = arguments.max_blocks as usize;
        let most = max_blocks.max(LEAST_EXPANDED_BLOCKS);
        let bytes = most * heads.kv * head_block_bytes(KvCacheDtype::Bf16, heads.dim);
        let tables = EXPANDED_SEQUENCES * max_blocks * size_of::<u32>();
        let keys = self.expanded.borrow_mut().reserve(2 * bytes + tables);
        let cache =
            ExpandedCache { keys, values: keys + bytes as u64, block_tables: keys + 2 * bytes as u64 };
        for Group { first, sequences, rows, blocks } in Group::all(host, most) {
            let u32s = |address, index: usize| address + (index * size_of::<u32>()) as u64;
            let stored = AttentionArguments {
                query_start: u32s(arguments.query_start, first),
                context_lens: u32s(arguments.context_lens, first),
                block_tables: u32s(arguments.block_tables, first * max_blocks),
                ..*arguments
            };
            let expanded = AttentionArguments {
                k_cache: cache.keys,
                v_cache: cache.values,
                block_tables: cache.block_tables,
                ..stored
            };
            let launch = Launch::new(1, EXPAND_THREADS).grid([blocks as u32, 2, 1]);
            // SAFETY: the scratch has room for the group's blocks and tables; the kernels wait for their inputs, and for
            // those who read the scratch before.
            unsafe {
                self.context.launch(expand, &launch, &[&stored, &int(sequences), &cache]);
                self.prefill(prefill, &expanded, rows, sequences);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_are_expanded_in_groups_that_have_room() {
        // 40 rows of 40, one of 1000, 2 of 33, 30 of 64, and one of 5.
        let host = HostSpans { query_start: &[0, 40, 41, 43, 73, 74], context_lens: &[40, 1000, 33, 64, 5] };
        let group = |first, sequences, rows, blocks| Group { first, sequences, rows, blocks };
        assert_eq!(Group::all(host, 10), [group(0, 5, 74, 10)]);
        assert_eq!(Group::all(host, 9), [group(0, 3, 43, 6), group(3, 2, 31, 4)]);
        assert_eq!(Group::all(host, 4), [group(0, 2, 41, 3), group(2, 1, 2, 3), group(3, 2, 31, 4)]);
        let decode: Vec<u32> = (0..=300).collect();
        let host = HostSpans { query_start: &decode, context_lens: &[100; 300] };
        assert_eq!(Group::all(host, 10), []);
    }

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

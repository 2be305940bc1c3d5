// MX caches of prompts, turned into BF16 ones: attention of many rows reads each key and value once per tile of rows and
// query head, and would expand it as often.
#include "ops/attention.cuh"
#include "ops/attention_tiles.cuh"
#include "ops/kv.cuh"
#include "ops/kv_mx.cuh"
#include "ptx/launch.cuh"

namespace ops {

/// Where to: keys and values `[blocks, kv_heads]` as in kv.cuh, and tables `[sequences, max_blocks]` of their blocks.
/// Mirrored on the host: keep the order of the fields.
struct ExpandedCache {
    uint8_t* keys;
    uint8_t* values;
    uint32_t* block_tables;
};

/// Block `block` of sequence `sequence`, whose rows see positions from `from` on; no sequence beyond the last block.
struct ContextBlock {
    int sequence, block, from;
};

/// Block `index` of the contexts of all sequences with more than one row, one sequence after the other. To be called by
/// whole warps, all with one `index`.
__device__ __forceinline__ ContextBlock find_block(const AttentionArguments& a, int sequences, int index) {
    const int lane = threadIdx.x % WARP;
    int before = 0;
    for (int base = 0; base < sequences; base += WARP) {
        const int sequence = base + lane;
        const bool present = sequence < sequences;
        const int rows = present ? a.query_start[sequence + 1] - a.query_start[sequence] : 0;
        const int context = present ? a.context_lens[sequence] : 0;
        const int blocks = rows > 1 ? (context + BLOCK_TOKENS - 1) / BLOCK_TOKENS : 0;
        int end = blocks;
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) {
            const int lower = __shfl_up_sync(0xFFFFFFFFu, end, step);
            if (lane >= step) end += lower;
        }
        end += before;
        const unsigned holders = __ballot_sync(0xFFFFFFFFu, index < end);
        if (holders != 0) {
            const int holder = __ffs(holders) - 1;
            const int block = index - __shfl_sync(0xFFFFFFFFu, end - blocks, holder);
            const int first = __shfl_sync(0xFFFFFFFFu, context - rows, holder);
            return {base + holder, block, a.window > 0 ? max(0, first + 1 - a.window) : 0};
        }
        before = __shfl_sync(0xFFFFFFFFu, end, WARP - 1);
    }
    return {sequences, 0, 0};
}

/// Expands block blockIdx.x of the contexts; blockIdx.y: keys, values.
template <KvFormat FORMAT, int DIM>
__device__ __forceinline__ void expand_cache(const AttentionArguments& a, int sequences, const ExpandedCache& out) {
    using Block = MxKvBlock<FORMAT, DIM>;
    constexpr int PIECES = DIM / 8, HEAD_PIECES = BLOCK_TOKENS * PIECES;
    ptx::launch_dependents();
    ptx::wait_for_dependencies();
    const int index = blockIdx.x;
    const ContextBlock at = find_block(a, sequences, index);
    if (at.sequence == sequences) return;
    const size_t entry = static_cast<size_t>(at.sequence) * a.max_blocks + at.block;
    if (blockIdx.y == 0 && threadIdx.x == 0) out.block_tables[entry] = index;
    // Nobody sees the block: its table entry is all that it needs.
    if ((at.block + 1) * BLOCK_TOKENS <= at.from) return;
    const uint8_t* const cache = blockIdx.y == 0 ? a.k_cache : a.v_cache;
    uint8_t* const to = blockIdx.y == 0 ? out.keys : out.values;
    const uint32_t block = a.block_tables[entry];
    // Elements are 2^-32 of their values.
    const __nv_bfloat162 unit = tile::as_pair(0x4F804F80u);
#pragma unroll 4
    for (int i = threadIdx.x; i < a.kv_heads * HEAD_PIECES; i += blockDim.x) {
        const int head = i / HEAD_PIECES, token = i % HEAD_PIECES / PIECES, piece = i % PIECES;
        typename Block::Piece stored;
        stored.load(cache + Block::offset(block, head, a.kv_heads), token, piece);
        uint4 x = stored.decode();
        uint32_t* const pairs[4] = {&x.x, &x.y, &x.z, &x.w};
#pragma unroll
        for (int p = 0; p < 4; ++p) *pairs[p] = tile::as_bits(__hmul2_rn(tile::as_pair(*pairs[p]), unit));
        *reinterpret_cast<uint4*>(to + block_offset<DIM>(index, head, a.kv_heads) + piece_offset<DIM>(token, piece)) = x;
    }
}

}  // namespace ops

/// Grid: (blocks of the contexts of sequences with more than one row, 2). Block: 256.
#define OPS_KV_EXPAND(NAME, FORMAT, DIM)                                                                            \
    extern "C" __global__ void __launch_bounds__(256) ops_kv_expand_##NAME##_##DIM(                                 \
        const __grid_constant__ ops::AttentionArguments a, int sequences, const __grid_constant__ ops::ExpandedCache out) { \
        ops::expand_cache<ops::KvFormat::FORMAT, DIM>(a, sequences, out);                                           \
    }

OPS_KV_EXPAND(mxfp8, Mxfp8, 64)
OPS_KV_EXPAND(mxfp8, Mxfp8, 128)
OPS_KV_EXPAND(mxint8, Mxint8, 64)
OPS_KV_EXPAND(mxint8, Mxint8, 128)
OPS_KV_EXPAND(mxfp4, Mxfp4, 64)
OPS_KV_EXPAND(mxfp4, Mxfp4, 128)

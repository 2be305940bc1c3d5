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

/// Expands block blockIdx.x of the contexts; blockIdx.y: keys, values.
template <KvFormat FORMAT, int DIM>
__device__ __forceinline__ void expand_cache(const AttentionArguments& a, int sequences, const ExpandedCache& out) {
    using Block = MxKvBlock<FORMAT, DIM>;
    constexpr int PIECES = DIM / 8, HEAD_PIECES = BLOCK_TOKENS * PIECES;
    ptx::launch_dependents();
    ptx::wait_for_dependencies();
    const int index = blockIdx.x;
    const auto rows_of = [&](int sequence) { return static_cast<int>(a.query_start[sequence + 1] - a.query_start[sequence]); };
    const Piece here = find_piece(sequences, index, [&](int sequence) {
        return rows_of(sequence) > 1 ? static_cast<int>(a.context_lens[sequence] + BLOCK_TOKENS - 1) / BLOCK_TOKENS : 0;
    });
    if (here.sequence == sequences) return;
    const size_t entry = static_cast<size_t>(here.sequence) * a.max_blocks + here.number;
    if (blockIdx.y == 0 && threadIdx.x == 0) out.block_tables[entry] = index;
    // A block that nobody sees needs no more than its table entry.
    const int first = static_cast<int>(a.context_lens[here.sequence]) - rows_of(here.sequence);
    if (a.window > 0 && (here.number + 1) * BLOCK_TOKENS <= first + 1 - a.window) return;
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

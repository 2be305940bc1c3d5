// Causal attention of sequences with several new rows, over the paged cache: 64 rows of a query head at a time, keys in
// tiles of 64 at multiples of 64 positions, in order, with an online softmax (FlashAttention-2). A row's result depends
// neither on the rows beside it nor on where its tile begins.
#pragma once

#include "ops/attention.cuh"
#include "ops/attention_tiles.cuh"
#include "ops/kv.cuh"
#include "ops/vector.cuh"
#include "ptx/async_copy.cuh"
#include "ptx/barrier.cuh"
#include "ptx/launch.cuh"
#include "ptx/mma.cuh"

namespace ops {

/// `Cache` says where an element of the cache is, and brings it to shared memory.
template <typename Cache>
struct PrefillAttention {
    static constexpr int DIM = Cache::DIM;
    static constexpr int WARPS = 4, THREADS = WARPS * WARP;
    /// Rows of a CTA, 16 for each warp; keys of a tile.
    static constexpr int ROWS = WARPS * 16, KEYS = 64;
    static constexpr int PIECES = DIM / 8, STEPS = DIM / 16;
    static constexpr int TILE_BYTES = KEYS * DIM * 2, STAGES = 2;

    static __device__ __forceinline__ void load_queries(const AttentionArguments& a, uint32_t shared,
                                                        const QueryTile& tile, int head) {
        const size_t stride = static_cast<size_t>(a.q_heads + 2 * a.kv_heads) * DIM;
        const __nv_bfloat16* q = a.qkv + tile.row * stride + static_cast<size_t>(head) * DIM;
#pragma unroll
        for (int i = threadIdx.x; i < ROWS * PIECES; i += THREADS) {
            const int row = i / PIECES, piece = i % PIECES;
            const bool present = row < tile.rows;
            ptx::copy_async(shared + piece_offset<DIM, ROWS>(row, piece), q + (present ? row : 0) * stride + piece * 8, present);
        }
    }

    /// Starts loading 64 tokens of keys or values, those at `from <= position < context`; the rest is zero.
    static __device__ __forceinline__ void load_tile(const uint8_t* cache, uint32_t shared, const uint32_t* table,
                                                     int start, int from, int context, int kv_head,
                                                     int kv_heads) {
#pragma unroll
        for (int i = threadIdx.x; i < KEYS * PIECES; i += THREADS) {
            const int token = i / PIECES, position = start + token, piece = i % PIECES;
            const bool present = position >= from && position < context;
            const uint32_t block = present ? table[position / BLOCK_TOKENS] : 0;
            const uint8_t* from_block = cache + Cache::offset(block, kv_head, kv_heads);
            Cache::load(shared + piece_offset<DIM, KEYS>(token, piece), from_block, token % BLOCK_TOKENS, piece, present);
        }
    }

    /// Sixteen rows times 64 keys.
    static __device__ __forceinline__ void scores(float (&s)[KEYS / 8][4], uint32_t queries, uint32_t keys) {
        const int lane = threadIdx.x % WARP, warp_row = threadIdx.x / WARP * 16;
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            uint32_t q[4];
            ptx::load_matrices(q, queries + piece_offset<DIM, ROWS>(warp_row + lane % 16, step * 2 + lane / 16));
#pragma unroll
            for (int n = 0; n < KEYS / 16; ++n) {
                uint32_t k[4];
                const int token = n * 16 + lane % 8 + lane / 16 * 8;
                ptx::load_matrices(k, keys + piece_offset<DIM, KEYS>(token, step * 2 + lane / 8 % 2));
                ptx::mma_bf16(s[2 * n], q, k[0], k[1]);
                ptx::mma_bf16(s[2 * n + 1], q, k[2], k[3]);
            }
        }
    }

    /// Scores of positions that the rows do not see become -inf; `position` is that of the lane's first row.
    static __device__ __forceinline__ void mask(float (&s)[KEYS / 8][4], int position, int start, int window) {
        const int lane = threadIdx.x % WARP;
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int key = start + n * 8 + lane % 4 * 2 + i % 2, row = position + i / 2 * 8;
                if (key > row || (window > 0 && key <= row - window)) s[n][i] = -INFINITY;
            }
        }
    }

    /// Turns scores into weights and rescales the running result. `sum` is of this lane's keys alone.
    static __device__ __forceinline__ void softmax(float (&s)[KEYS / 8][4], float (&o)[DIM / 8][4], Softmax (&state)[2],
                                                   float scale_log2) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float max = -INFINITY;
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) max = fmaxf(max, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
            max = fmaxf(max, __shfl_xor_sync(0xFFFFFFFFu, max, 1));
            max = fmaxf(max, __shfl_xor_sync(0xFFFFFFFFu, max, 2));
            max = fmaxf(state[r].max, max * scale_log2);
            const float reference = finite_max(max), keep = exp2_approx(state[r].max - reference);
            state[r].max = max;
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; ++i) {
                    s[n][i] = exp2_approx(fmaf(s[n][i], scale_log2, -reference));
                    sum += s[n][i];
                }
            }
            state[r].sum = fmaf(state[r].sum, keep, sum);
#pragma unroll
            for (int n = 0; n < DIM / 8; ++n) o[n][2 * r] *= keep, o[n][2 * r + 1] *= keep;
        }
    }

    static __device__ __forceinline__ void accumulate(float (&o)[DIM / 8][4], const float (&p)[KEYS / 8][4],
                                                      uint32_t values) {
        const int lane = threadIdx.x % WARP;
#pragma unroll
        for (int step = 0; step < KEYS / 16; ++step) {
            const float(&low)[4] = p[2 * step], (&high)[4] = p[2 * step + 1];
            const uint32_t weights[4] = {pack_bf16(low[0], low[1]), pack_bf16(low[2], low[3]),
                                         pack_bf16(high[0], high[1]), pack_bf16(high[2], high[3])};
#pragma unroll
            for (int n = 0; n < DIM / 16; ++n) {
                uint32_t v[4];
                const int token = step * 16 + lane % 16;
                ptx::load_matrices_transposed(v, values + piece_offset<DIM, KEYS>(token, n * 2 + lane / 16));
                ptx::mma_bf16(o[2 * n], weights, v[0], v[1]);
                ptx::mma_bf16(o[2 * n + 1], weights, v[2], v[3]);
            }
        }
    }

    static __device__ __forceinline__ void store(const AttentionArguments& a, const QueryTile& tile, int head,
                                                 const float (&o)[DIM / 8][4], Softmax (&state)[2]) {
        const int lane = threadIdx.x % WARP, warp_row = threadIdx.x / WARP * 16;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float sum = state[r].sum;
            sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
            sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
            const float factor = Cache::UNIT / sum;
            const int row = warp_row + lane / 4 + r * 8;
            store_row<DIM>(a, tile.row + row, head, row < tile.rows,
                           [&](int j, int i) { return o[j][2 * r + i] * factor; });
        }
    }

    static __device__ __forceinline__ void run(const AttentionArguments& a, int sequences) {
        extern __shared__ __align__(128) uint8_t shared[];
        const QueryTile tile = find_tile<ROWS>(a.query_start, a.context_lens, sequences, blockIdx.y);
        // Before any return: whoever waits for this kernel waits for the ones before it, too.
        ptx::wait_for_dependencies();
        ptx::launch_dependents();
        if (tile.rows == 0) return;
        const int head = blockIdx.x, kv_head = head / (a.q_heads / a.kv_heads), lane = threadIdx.x % WARP;
        const uint32_t* table = a.block_tables + static_cast<size_t>(tile.sequence) * a.max_blocks;
        const uint32_t queries = ptx::shared_address(shared), keys = queries + ROWS * DIM * 2;
        const uint32_t values = keys + STAGES * TILE_BYTES;
        const int context = tile.position + tile.rows;
        const int from = a.window > 0 ? max(0, tile.position + 1 - a.window) : 0;
        const int first = from / KEYS, last = (context - 1) / KEYS;

        const auto load = [&](const uint8_t* cache, uint32_t to, int index) {
            if (index <= last)
                load_tile(cache, to + (index - first) % STAGES * TILE_BYTES, table, index * KEYS, from, context, kv_head,
                          a.kv_heads);
            ptx::copy_commit();
        };
        load_queries(a, queries, tile, head);
        load(a.k_cache, keys, first);
        load(a.v_cache, values, first);
        load(a.k_cache, keys, first + 1);

        float o[DIM / 8][4] = {};
        Softmax state[2] = {{-INFINITY, 0.0f}, {-INFINITY, 0.0f}};
        const int position = tile.position + threadIdx.x / WARP * 16 + lane / 4;
        for (int index = first; index <= last; ++index) {
            // In flight, oldest first: keys of this tile, its values, the next tile's keys.
            const int offset = (index - first) % STAGES * TILE_BYTES, start = index * KEYS;
            ptx::copy_wait<2>();
            __syncthreads();
            load(a.v_cache, values, index + 1);
            float s[KEYS / 8][4];
            scores(s, queries, keys + offset);
            const bool whole = start + KEYS - 1 <= tile.position && (a.window == 0 || start > context - 1 - a.window);
            if (!whole) mask(s, position, start, a.window);
            softmax(s, o, state, a.scale_log2 * Cache::UNIT);
            ptx::copy_wait<2>();
            __syncthreads();
            load(a.k_cache, keys, index + 2);
            accumulate(o, s, values + offset);
        }
        store(a, tile, head, o, state);
    }
};

}  // namespace ops

// Causal attention of sequences with several new rows, over the paged cache, for head dimensions 64 and 128: the tensor
// cores' way (wgmma; after FlashAttention-3). 128 rows of a query head at a time, 64 for each of two warpgroups, keys in
// tiles of 128 at multiples of 128 positions, in order, with an online softmax. A row's result depends neither on the
// rows beside it nor on where its tile begins.
//
// A warp of a third warpgroup brings blocks of the cache, which is BF16 (or was made so by kv_expand.cu), two tiles ahead. While
// a warpgroup's product with the values of one tile runs, it turns the scores of the next into weights.
#include "ops/attention.cuh"
#include "ops/attention_tiles.cuh"
#include "ops/kv.cuh"
#include "ops/vector.cuh"
#include "ptx/barrier.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/launch.cuh"
#include "ptx/wgmma.cuh"
#include "ptx/wgmma_rows.cuh"

namespace ops {

/// What the warpgroups share: queries, tiles of keys and values, and how far they are.
template <int DIM>
struct WgmmaTiles {
    static constexpr int GROUPS = 2, GROUP_ROWS = 64, GROUP_WARPS = 4, ROWS = GROUPS * GROUP_ROWS;
    static constexpr int KEYS = 128, STAGES = 2;
    static constexpr int TILE_BYTES = KEYS * DIM * 2, TILE_BLOCKS = KEYS / BLOCK_TOKENS;
    /// A tile is DIM / 64 groups of dimensions, each [KEYS, 128 bytes]; the queries are [ROWS, 128 bytes] likewise.
    static constexpr int GROUP_BYTES = KEYS * 128, QUERY_GROUP_BYTES = ROWS * 128;

    uint8_t queries[ROWS * DIM * 2];
    uint8_t keys[STAGES][TILE_BYTES];
    uint8_t values[STAGES][TILE_BYTES];
    uint64_t keys_full[STAGES], keys_empty[STAGES], values_full[STAGES], values_empty[STAGES];
    /// Values that have come, but for zeros in place of those that nobody sees.
    uint64_t values_partial;

    /// By one thread; `groups` warpgroups multiply.
    __device__ __forceinline__ void init_barriers(int groups) {
        for (int stage = 0; stage < STAGES; ++stage) {
            ptx::barrier_init(ptx::shared_address(&keys_full[stage]), 1);
            ptx::barrier_init(ptx::shared_address(&values_full[stage]), 1);
            ptx::barrier_init(ptx::shared_address(&keys_empty[stage]), groups * GROUP_WARPS);
            ptx::barrier_init(ptx::shared_address(&values_empty[stage]), groups * GROUP_WARPS);
        }
        ptx::barrier_init(ptx::shared_address(&values_partial), 1);
    }
};

/// A tile of rows and the positions it sees: `from .. context`, key tiles `first .. last`.
struct WgmmaWork {
    QueryTile tile;
    int head, kv_head, from, context, first;

    /// The last key tile, of `keys` keys each, that rows before `rows` see.
    __device__ __forceinline__ int last(int rows, int keys) const {
        return (tile.position + min(rows, tile.rows) - 1) / keys;
    }
};

/// One warp copies blocks of the cache into the tiles as they are.
template <int DIM>
struct WgmmaProducer {
    using Tiles = WgmmaTiles<DIM>;
    static constexpr int KEYS = Tiles::KEYS, STAGES = Tiles::STAGES, TILE_BLOCKS = Tiles::TILE_BLOCKS;
    static constexpr int GROUP_BYTES = Tiles::GROUP_BYTES;
    /// The groups of a block's dimensions are copied each for itself.
    static constexpr int PART_BYTES = BLOCK_TOKENS * 128, COPIES = TILE_BLOCKS * (DIM / 64);
    static_assert(COPIES <= WARP, "each lane copies one part at most");

    /// Starts copying the blocks of key tile `index` that hold positions `from .. context`.
    static __device__ __forceinline__ void copy(const WgmmaWork& w, const uint32_t* table, const uint8_t* cache, int kv_heads,
                                                uint32_t to, uint32_t barrier, int index) {
        const int lane = threadIdx.x % WARP, block = index * TILE_BLOCKS + lane % TILE_BLOCKS;
        const bool present =
            lane < COPIES && block >= w.from / BLOCK_TOKENS && block <= (w.context - 1) / BLOCK_TOKENS;
        const int copies = __popc(__ballot_sync(0xFFFFFFFFu, present));
        if (lane == 0) ptx::barrier_arrive_expect(barrier, copies * PART_BYTES);
        __syncwarp();
        if (present) {
            const int part = lane / TILE_BLOCKS;
            const uint8_t* source = cache + block_offset<DIM>(table[block], w.kv_head, kv_heads) + part * PART_BYTES;
            ptx::bulk_load(to + part * GROUP_BYTES + lane % TILE_BLOCKS * PART_BYTES, source, PART_BYTES, barrier,
                           ptx::L2_EVICT_NORMAL);
        }
    }

    static __device__ __forceinline__ void produce(Tiles& shared, const AttentionArguments& a, const WgmmaWork& w) {
        if (threadIdx.x / WARP % Tiles::GROUP_WARPS != 0) return;
        const uint32_t* table = a.block_tables + static_cast<size_t>(w.tile.sequence) * a.max_blocks;
        const int last = w.last(Tiles::ROWS, KEYS), lane = threadIdx.x % WARP;
        int partial_phase = 0;
        for (int i = 0; w.first + i <= last; ++i) {
            const int stage = i % STAGES, phase = i / STAGES % 2, index = w.first + i;
            ptx::barrier_wait(ptx::shared_address(&shared.keys_empty[stage]), phase ^ 1);
            copy(w, table, a.k_cache, a.kv_heads, ptx::shared_address(shared.keys[stage]),
                 ptx::shared_address(&shared.keys_full[stage]), index);
            ptx::barrier_wait(ptx::shared_address(&shared.values_empty[stage]), phase ^ 1);
            const uint32_t full = ptx::shared_address(&shared.values_full[stage]);
            const int from = w.from - index * KEYS, to = w.context - index * KEYS;
            if (from <= 0 && to >= KEYS) {
                copy(w, table, a.v_cache, a.kv_heads, ptx::shared_address(shared.values[stage]), full, index);
                continue;
            }
            // Values that nobody sees must be numbers: their weight is zero, and zero times NaN is NaN.
            const uint32_t partial = ptx::shared_address(&shared.values_partial);
            copy(w, table, a.v_cache, a.kv_heads, ptx::shared_address(shared.values[stage]), partial, index);
            ptx::barrier_wait(partial, partial_phase);
            partial_phase ^= 1;
            for (int token = 0; token < KEYS; ++token) {
                if (token >= from && token < to) continue;
                if (lane < DIM / 8)
                    *reinterpret_cast<uint4*>(shared.values[stage] + piece_offset<DIM, KEYS>(token, lane)) = uint4{};
            }
            ptx::fence_proxy_async();
            __syncwarp();
            if (lane == 0) ptx::barrier_arrive(full);
        }
    }
};

template <int DIM>
struct WgmmaAttention {
    using Tiles = WgmmaTiles<DIM>;
    using Work = WgmmaWork;
    static constexpr int GROUPS = Tiles::GROUPS, GROUP_ROWS = Tiles::GROUP_ROWS;
    static constexpr int GROUP_WARPS = Tiles::GROUP_WARPS, ROWS = Tiles::ROWS, KEYS = Tiles::KEYS;
    static constexpr int STAGES = Tiles::STAGES, GROUP_BYTES = Tiles::GROUP_BYTES, STEPS = DIM / 16;
    /// Named barriers, one per warpgroup.
    static constexpr uint32_t QUERIES_BARRIER = 1;

    /// Brings the rows of warpgroup `group` to shared memory: from registers each product would take longer.
    static __device__ __forceinline__ void load_queries(Tiles& shared, const AttentionArguments& a, const Work& w,
                                                        int group) {
        constexpr int PIECES = DIM / 8, THREADS = GROUP_WARPS * WARP;
        const size_t stride = static_cast<size_t>(a.q_heads + 2 * a.kv_heads) * DIM;
        const __nv_bfloat16* base = a.qkv + w.tile.row * stride + static_cast<size_t>(w.head) * DIM;
#pragma unroll
        for (int i = 0; i < GROUP_ROWS * PIECES / THREADS; ++i) {
            const int index = i * THREADS + threadIdx.x % THREADS;
            const int row = group * GROUP_ROWS + index / PIECES, piece = index % PIECES;
            uint4 x = {};
            if (row < w.tile.rows) x = *reinterpret_cast<const uint4*>(base + row * stride + piece * 8);
            *reinterpret_cast<uint4*>(shared.queries + piece_offset<DIM, ROWS>(row, piece)) = x;
        }
        ptx::fence_proxy_async();
        ptx::named_barrier(QUERIES_BARRIER + group, THREADS);
    }

    /// Starts s = Q K^T for the 64 rows at `queries`.
    static __device__ __forceinline__ void start_scores(float (&s)[KEYS / 2], uint32_t queries, uint32_t keys) {
        const uint64_t q = ptx::uniform_descriptor(queries), k = ptx::uniform_descriptor(keys);
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const uint64_t a = q + ptx::descriptor_step(step / 4 * Tiles::QUERY_GROUP_BYTES + step % 4 * 32);
            const uint64_t b = k + ptx::descriptor_step(step / 4 * GROUP_BYTES + step % 4 * 32);
            ptx::SharedWgmma<ptx::Operand::Bf16, KEYS>::run(s, a, b, step > 0);
        }
        ptx::wgmma_commit();
    }

    /// Starts o += P V.
    static __device__ __forceinline__ void start_values(float (&o)[DIM / 2], const uint32_t (&p)[KEYS / 16][4],
                                                        uint32_t values) {
        const uint64_t v = ptx::uniform_row_descriptor(values, GROUP_BYTES);
#pragma unroll
        for (int step = 0; step < KEYS / 16; ++step)
            ptx::WgmmaRows<DIM>::run(o, p[step], v + ptx::descriptor_step(step * 16 * 128));
        ptx::wgmma_commit();
    }

    /// Scores of positions that the rows do not see become -inf; `position` is that of the lane's first row.
    static __device__ __forceinline__ void mask(float (&s)[KEYS / 2], int position, int start, int window) {
        const int column = start + threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < KEYS / 2; ++i) {
            const int key = column + i / 4 * 8 + i % 2, row = position + i / 2 % 2 * 8;
            if (key > row || (window > 0 && key <= row - window)) s[i] = -INFINITY;
        }
    }

    /// Turns scores into weights; `keep` is what the result so far is to be multiplied by. Sums are of this lane's keys.
    static __device__ __forceinline__ void softmax(float (&s)[KEYS / 2], Softmax (&state)[2], float (&keep)[2],
                                                   float scale_log2) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float max = -INFINITY;
#pragma unroll
            for (int j = 0; j < KEYS / 8; ++j) max = fmaxf(max, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
            max = fmaxf(max, __shfl_xor_sync(0xFFFFFFFFu, max, 1));
            max = fmaxf(max, __shfl_xor_sync(0xFFFFFFFFu, max, 2));
            max = fmaxf(state[r].max, max * scale_log2);
            const float reference = finite_max(max);
            keep[r] = exp2_approx(state[r].max - reference);
            state[r].max = max;
            float even = 0.0f, odd = 0.0f;
#pragma unroll
            for (int j = 0; j < KEYS / 8; ++j) {
                float &a = s[4 * j + 2 * r], &b = s[4 * j + 2 * r + 1];
                a = exp2_approx(fmaf(a, scale_log2, -reference));
                b = exp2_approx(fmaf(b, scale_log2, -reference));
                even += a, odd += b;
            }
            state[r].sum = fmaf(state[r].sum, keep[r], even + odd);
        }
    }

    static __device__ __forceinline__ void pack_weights(uint32_t (&p)[KEYS / 16][4], const float (&s)[KEYS / 2]) {
#pragma unroll
        for (int i = 0; i < KEYS / 4; ++i) p[i / 4][i % 4] = pack_bf16(s[2 * i], s[2 * i + 1]);
    }

    static __device__ __forceinline__ void store(const AttentionArguments& a, const Work& w, int row,
                                                 const float (&o)[DIM / 2], const Softmax (&state)[2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float sum = state[r].sum;
            sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
            sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
            const float factor = 1.0f / sum;
            store_row<DIM>(a, w.tile.row + row + r * 8, w.head, row + r * 8 < w.tile.rows,
                           [&](int j, int i) { return o[4 * j + 2 * r + i] * factor; });
        }
    }

    static __device__ __forceinline__ void consume(Tiles& shared, const AttentionArguments& a, const Work& w, int group) {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % GROUP_WARPS;
        const int row = group * GROUP_ROWS + warp * 16 + lane / 4;
        const int first_position = w.tile.position + group * GROUP_ROWS, last_position = first_position + GROUP_ROWS - 1;
        const int last = w.last((group + 1) * GROUP_ROWS, KEYS);
        const auto release = [&](uint64_t& empty) {
            if (lane == 0) ptx::barrier_arrive(ptx::shared_address(&empty));
        };
        const auto hide = [&](float(&s)[KEYS / 2], int index) {
            const int start = index * KEYS;
            const bool whole = start + KEYS - 1 <= first_position && (a.window == 0 || start > last_position - a.window);
            if (!whole) mask(s, w.tile.position + row, start, a.window);
        };
        uint32_t p[KEYS / 16][4];
        load_queries(shared, a, w, group);
        const uint32_t queries = ptx::shared_address(shared.queries) + group * GROUP_ROWS * 128;
        float s[KEYS / 2], o[DIM / 2], keep[2];
#pragma unroll
        for (int i = 0; i < DIM / 2; ++i) o[i] = 0.0f;
        Softmax state[2] = {{-INFINITY, 0.0f}, {-INFINITY, 0.0f}};

        ptx::barrier_wait(ptx::shared_address(&shared.keys_full[0]), 0);
        ptx::wgmma_fence();
        start_scores(s, queries, ptx::shared_address(shared.keys[0]));
        ptx::wgmma_wait<0>();
        ptx::pin(s);
        release(shared.keys_empty[0]);
        hide(s, w.first);
        softmax(s, state, keep, a.scale_log2);
        pack_weights(p, s);
        for (int i = 1; w.first + i <= last; ++i) {
            const int stage = i % STAGES, before = (i - 1) % STAGES;
            ptx::barrier_wait(ptx::shared_address(&shared.keys_full[stage]), i / STAGES % 2);
            ptx::wgmma_fence();
            start_scores(s, queries, ptx::shared_address(shared.keys[stage]));
            ptx::barrier_wait(ptx::shared_address(&shared.values_full[before]), (i - 1) / STAGES % 2);
            ptx::wgmma_fence();
            start_values(o, p, ptx::shared_address(shared.values[before]));
            ptx::wgmma_wait<1>();
            ptx::pin(s);
            release(shared.keys_empty[stage]);
            hide(s, w.first + i);
            softmax(s, state, keep, a.scale_log2);
            ptx::wgmma_wait<0>();
            ptx::pin(o);
            release(shared.values_empty[before]);
            pack_weights(p, s);
#pragma unroll
            for (int j = 0; j < DIM / 2; ++j) o[j] *= keep[j / 2 % 2];
        }
        const int i = last - w.first;
        ptx::barrier_wait(ptx::shared_address(&shared.values_full[i % STAGES]), i / STAGES % 2);
        ptx::wgmma_fence();
        start_values(o, p, ptx::shared_address(shared.values[i % STAGES]));
        ptx::wgmma_wait<0>();
        ptx::pin(o);
        release(shared.values_empty[i % STAGES]);
        store(a, w, row, o, state);
    }

    static __device__ __forceinline__ void run(const AttentionArguments& a, int sequences) {
        extern __shared__ __align__(1024) uint8_t bytes[];
        Tiles& shared = *reinterpret_cast<Tiles*>(bytes);
        Work w;
        w.tile = find_tile<ROWS>(a.query_start, a.context_lens, sequences, blockIdx.y);
        // Before any return: whoever waits for this kernel waits for the ones before it, too.
        ptx::wait_for_dependencies();
        ptx::launch_dependents();
        if (w.tile.rows == 0) return;
        w.head = blockIdx.x;
        w.kv_head = w.head / (a.q_heads / a.kv_heads);
        w.context = w.tile.position + w.tile.rows;
        w.from = a.window > 0 ? max(0, w.tile.position + 1 - a.window) : 0;
        w.first = w.from / KEYS;
        const int groups = (w.tile.rows + GROUP_ROWS - 1) / GROUP_ROWS;
        if (threadIdx.x == 0) {
            shared.init_barriers(groups);
            ptx::barrier_init_fence();
        }
        __syncthreads();
        const int group = threadIdx.x / (GROUP_WARPS * WARP);
        if (group == GROUPS) {
            ptx::shrink_registers<40>();
            WgmmaProducer<DIM>::produce(shared, a, w);
        } else {
            ptx::grow_registers<232>();
            if (group < groups) consume(shared, a, w, group);
        }
    }
};

}  // namespace ops

/// Rows of sequences that have more than one. Grid: (q_heads, at least as many tiles of 128 rows as the sequences have).
/// Block: 384. Shared: 1 KB more than five tiles of 128 * DIM * 2 bytes.
#define OPS_ATTENTION_PREFILL_WGMMA(DIM)                                                                    \
    extern "C" __global__ void __launch_bounds__(384, 1)                                                    \
        ops_attention_prefill_wgmma_##DIM(const __grid_constant__ ops::AttentionArguments a, int sequences) { \
        ops::WgmmaAttention<DIM>::run(a, sequences);                                                        \
    }

OPS_ATTENTION_PREFILL_WGMMA(64)
OPS_ATTENTION_PREFILL_WGMMA(128)

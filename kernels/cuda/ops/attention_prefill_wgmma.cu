// Prefill attention by wgmma over a BF16 cache: one warp copies its blocks into the tiles as they are.
#include "ops/attention_prefill_wgmma.cuh"

namespace ops {

template <int DIMENSION>
struct Bf16Producer {
    static constexpr int DIM = DIMENSION;
    using Tiles = WgmmaTiles<DIM>;
    static constexpr int KEYS = Tiles::KEYS, STAGES = Tiles::STAGES, TILE_BLOCKS = Tiles::TILE_BLOCKS;
    static constexpr int GROUP_BYTES = Tiles::GROUP_BYTES, REGISTERS = 40;
    /// Elements times this are the values.
    static constexpr float UNIT = 1.0f;
    /// The groups of a block's dimensions are copied each for itself.
    static constexpr int PART_BYTES = BLOCK_TOKENS * 128, COPIES = TILE_BLOCKS * (DIM / 64);
    static_assert(COPIES <= WARP, "each lane copies one part at most");

    struct Shared {
        Tiles tiles;
        uint64_t values_partial;
    };

    static __device__ __forceinline__ void init_barriers(Shared& shared) {
        ptx::barrier_init(ptx::shared_address(&shared.values_partial), 1);
    }

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

    static __device__ __forceinline__ void produce(Shared& storage, const AttentionArguments& a, const WgmmaWork& w) {
        if (threadIdx.x / WARP % Tiles::GROUP_WARPS != 0) return;
        Tiles& shared = storage.tiles;
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
            const uint32_t partial = ptx::shared_address(&storage.values_partial);
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

}  // namespace ops

/// Rows of sequences that have more than one. Grid: (q_heads, at least as many tiles of 128 rows as the sequences have).
/// Block: 384. Shared: 1 KB more than five tiles of 128 * DIM * 2 bytes.
#define OPS_ATTENTION_PREFILL_WGMMA(DIM)                                                                    \
    extern "C" __global__ void __launch_bounds__(384, 1)                                                    \
        ops_attention_prefill_wgmma_##DIM(const __grid_constant__ ops::AttentionArguments a, int sequences) { \
        ops::WgmmaAttention<ops::Bf16Producer<DIM>>::run(a, sequences);                                     \
    }

OPS_ATTENTION_PREFILL_WGMMA(64)
OPS_ATTENTION_PREFILL_WGMMA(128)

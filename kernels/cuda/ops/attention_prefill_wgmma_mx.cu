// Prefill attention by wgmma over a cache in MX: four warps turn its blocks, which come by bulk copies, into BF16 tiles.
#include "ops/attention_prefill_wgmma.cuh"
#include "ops/kv_mx.cuh"

namespace ops {

template <KvFormat FORMAT, int DIMENSION>
struct MxProducer {
    static constexpr int DIM = DIMENSION;
    using Tiles = WgmmaTiles<DIM>;
    using Block = MxKvBlock<FORMAT, DIM>;
    static constexpr int KEYS = Tiles::KEYS, STAGES = Tiles::STAGES, TILE_BLOCKS = Tiles::TILE_BLOCKS;
    static constexpr int THREADS = Tiles::GROUP_WARPS * WARP, REGISTERS = 40, PIECES = DIM / 8;
    /// Elements times this are the values.
    static constexpr float UNIT = KV_UNIT;
    /// Tokens that all threads together have a piece of, such steps in a block, and blocks whose pieces are in registers at
    /// a time: four pieces of a thread.
    static constexpr int ROWS = THREADS / PIECES, PARTS = BLOCK_TOKENS / ROWS, BATCH_BLOCKS = 4 / PARTS;
    static_assert(ROWS % 8 == 0 && PARTS >= 1, "steps are whole swizzles");
    /// Tiles of keys or of values that are under way as they are in the cache.
    static constexpr int RAW_STAGES = 3;

    struct Shared {
        Tiles tiles;
        alignas(16) uint8_t raw[RAW_STAGES][TILE_BLOCKS * Block::BYTES];
        uint64_t raw_full[RAW_STAGES];
    };

    static __device__ __forceinline__ void init_barriers(Shared& shared) {
        for (uint64_t& full : shared.raw_full) ptx::barrier_init(ptx::shared_address(&full), 1);
    }

    /// Keys and values of the key tiles in turn: item 2 i are the keys of tile `first` + i, item 2 i + 1 its values.
    /// Starts copying the blocks of an item that hold positions `from .. context`; for one warp.
    static __device__ __forceinline__ void copy(Shared& shared, const AttentionArguments& a, const WgmmaWork& w,
                                                const uint32_t* table, int item) {
        const int lane = threadIdx.x % WARP, block = (w.first + item / 2) * TILE_BLOCKS + lane;
        const bool present =
            lane < TILE_BLOCKS && block >= w.from / BLOCK_TOKENS && block <= (w.context - 1) / BLOCK_TOKENS;
        const int copies = __popc(__ballot_sync(0xFFFFFFFFu, present));
        const uint32_t full = ptx::shared_address(&shared.raw_full[item % RAW_STAGES]);
        if (lane == 0) ptx::barrier_arrive_expect(full, copies * Block::BYTES);
        __syncwarp();
        if (present) {
            const uint8_t* cache = item % 2 == 0 ? a.k_cache : a.v_cache;
            ptx::bulk_load(ptx::shared_address(shared.raw[item % RAW_STAGES] + lane * Block::BYTES),
                           cache + Block::offset(table[block], w.kv_head, a.kv_heads), Block::BYTES, full,
                           ptx::L2_EVICT_NORMAL);
        }
    }

    /// Tokens `from .. to` of a tile to BF16; zeros for the others, which nobody sees, but which must be numbers.
    static __device__ __forceinline__ void expand(const uint8_t* raw, uint8_t* tile, int from, int to) {
        // A thread has the same piece of all its tokens, which are a multiple of eight apart: what permutes pieces is the
        // same for all of them, and their addresses differ by constants.
        const int first = threadIdx.x % THREADS / PIECES, piece = threadIdx.x % PIECES;
        const bool whole = from <= 0 && to >= KEYS;
#pragma unroll 1
        for (int block = 0; block < TILE_BLOCKS; block += BATCH_BLOCKS) {
            // All on their way before the first is stored: for all that the compiler knows, they come from there.
            typename Block::Piece stored[BATCH_BLOCKS * PARTS];
#pragma unroll
            for (int i = 0; i < BATCH_BLOCKS * PARTS; ++i)
                stored[i].load(raw + (block + i / PARTS) * Block::BYTES, first + i % PARTS * ROWS, piece);
#pragma unroll
            for (int i = 0; i < BATCH_BLOCKS * PARTS; ++i) {
                const int token = block * BLOCK_TOKENS + i * ROWS + first;
                uint4 x = stored[i].decode();
                if (!whole && (token < from || token >= to)) x = uint4{};
                *reinterpret_cast<uint4*>(tile + piece_offset<DIM, KEYS>(token, piece)) = x;
            }
        }
    }

    static __device__ __forceinline__ void produce(Shared& shared, const AttentionArguments& a, const WgmmaWork& w) {
        const uint32_t* table = a.block_tables + static_cast<size_t>(w.tile.sequence) * a.max_blocks;
        const int items = 2 * (w.last(Tiles::ROWS, KEYS) - w.first + 1), thread = threadIdx.x % THREADS;
        Tiles& tiles = shared.tiles;
        for (int item = 0; thread < WARP && item < min(items, RAW_STAGES); ++item) copy(shared, a, w, table, item);
        for (int item = 0; item < items; ++item) {
            const int stage = item / 2 % STAGES, phase = item / 2 / STAGES % 2, index = w.first + item / 2;
            const bool is_keys = item % 2 == 0;
            ptx::barrier_wait(ptx::shared_address(&shared.raw_full[item % RAW_STAGES]), item / RAW_STAGES % 2);
            uint64_t* const empty = is_keys ? &tiles.keys_empty[stage] : &tiles.values_empty[stage];
            uint64_t* const full = is_keys ? &tiles.keys_full[stage] : &tiles.values_full[stage];
            ptx::barrier_wait(ptx::shared_address(empty), phase ^ 1);
            expand(shared.raw[item % RAW_STAGES], is_keys ? tiles.keys[stage] : tiles.values[stage], w.from - index * KEYS,
                   w.context - index * KEYS);
            // Before anyone hears of it: wgmma reads what these threads wrote.
            ptx::fence_proxy_async();
            ptx::named_barrier(1, THREADS);
            if (thread == 0) ptx::barrier_arrive(ptx::shared_address(full));
            if (thread < WARP && item + RAW_STAGES < items) copy(shared, a, w, table, item + RAW_STAGES);
        }
    }
};

}  // namespace ops

/// As in attention_prefill_wgmma.cu; shared memory is what MxProducer::Shared takes.
#define OPS_ATTENTION_PREFILL_WGMMA(NAME, FORMAT, DIM)                                                            \
    extern "C" __global__ void __launch_bounds__(384, 1) ops_attention_prefill_wgmma_##NAME##_##DIM(              \
        const __grid_constant__ ops::AttentionArguments a, int sequences) {                                       \
        ops::WgmmaAttention<ops::MxProducer<ops::KvFormat::FORMAT, DIM>>::run(a, sequences);                      \
    }

OPS_ATTENTION_PREFILL_WGMMA(mxfp8, Mxfp8, 64)
OPS_ATTENTION_PREFILL_WGMMA(mxfp8, Mxfp8, 128)
OPS_ATTENTION_PREFILL_WGMMA(mxint8, Mxint8, 64)
OPS_ATTENTION_PREFILL_WGMMA(mxint8, Mxint8, 128)
OPS_ATTENTION_PREFILL_WGMMA(mxfp4, Mxfp4, 64)
OPS_ATTENTION_PREFILL_WGMMA(mxfp4, Mxfp4, 128)

// What the products of one row (decode_one.cuh) and of a few rows (decode.cuh) have in common.
#pragma once

#include <cuda_bf16.h>

#include <type_traits>

#include "gemm/decode_sums.cuh"
#include "mx/tile.cuh"
#include "ptx/barrier.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/launch.cuh"

namespace decode {

/// Warps of a CTA.
constexpr int WARPS = 16;

/// What a product is of; passed by value.
struct Params {
    const uint8_t* tiles;    // [row_tiles][k_tiles] of tile::bytes(FORMAT)
    const float* factors;    // [16 * row_tiles]
    const float* bias;       // [n] or null
    const __nv_bfloat16* x;  // [m][k], k a multiple of 8
    void* out;               // [m][out_width], BF16 or F32
    int m, n, k;
    int row_tiles, k_tiles;
    int cluster;             // CTAs of a cluster: 1, 2, 4, 8; for one row there are none
    int out_width, column;   // the product's first column in a row of `out`
    int out_is_f32;
    int is_gated;            // rows g and g + 8 of tile i are gate and up of result 8 i + g: `out` is silu(gate) * up
};

/// The sum of `COUNT` values, `stride` apart: neighbours first, then pairs of them, and so on.
template <int COUNT>
__device__ __forceinline__ float tree_sum(const float* values, int stride) {
    if constexpr (COUNT == 1) {
        return *values;
    } else {
        return tree_sum<COUNT / 2>(values, stride) + tree_sum<COUNT / 2>(values + COUNT / 2 * stride, stride);
    }
}

/// The eight BF16 of `values` times 2^EXPONENT.
template <int EXPONENT>
__device__ __forceinline__ uint4 scaled(uint4 values) {
    if constexpr (EXPONENT == 0) return values;
    constexpr uint32_t FACTOR = (127 + EXPONENT) << 7;
    return make_uint4(tile::multiply_low(values.x, FACTOR), tile::multiply_low(values.y, FACTOR),
                      tile::multiply_low(values.z, FACTOR), tile::multiply_low(values.w, FACTOR));
}

/// The weights of one warp: `tiles` tiles along K of one row of tiles after the other, streamed through stages of shared
/// memory by bulk copies.
template <tile::Format FORMAT, int STAGE_TILES, int STAGES>
struct WarpRing {
    static constexpr int TILE_BYTES = tile::bytes(FORMAT), STAGE_BYTES = STAGE_TILES * TILE_BYTES;
    static constexpr int BYTES = STAGES * STAGE_BYTES;

    uint32_t ring, barriers;
    /// The next tile to fetch, how many more of its row, and from the last one of a row to the first of the next.
    int next, left, gap, tiles;
    /// The stage to be read next.
    int read = 0;
    uint32_t phase = 0;

    /// Shared memory at `ring` and `barriers`. The warp has the tiles from `first_k` on of row of tiles `first_row`, and every
    /// `row_step` further.
    __device__ __forceinline__ WarpRing(const Params& p, uint32_t ring, uint32_t barriers, int first_row, int row_step,
                                        int first_k, int tiles, int lane)
        : ring(ring), barriers(barriers), left(tiles), tiles(tiles) {
        next = tiles > 0 ? first_row * p.k_tiles + first_k : p.row_tiles * p.k_tiles;
        gap = row_step * p.k_tiles - tiles;
        if (lane < STAGES) ptx::barrier_init(barriers + lane * 8, 1);
        ptx::barrier_init_fence();
        __syncwarp();
    }

    /// Asks for the next tiles, which come to `stage`.
    __device__ __forceinline__ void fetch(const Params& p, int stage) {
        if (next >= p.row_tiles * p.k_tiles) return;
        const int count = STAGE_TILES == 1 ? 1 : min(STAGE_TILES, left);
        if (ptx::elect_one()) {
            const uint32_t bytes = count * TILE_BYTES;
            ptx::barrier_arrive_expect(barriers + stage * 8, bytes);
            ptx::bulk_load(ring + stage * STAGE_BYTES, p.tiles + size_t(uint32_t(next)) * TILE_BYTES, bytes, barriers + stage * 8,
                           ptx::L2_EVICT_FIRST);
        }
        next += count;
        left -= count;
        if (left == 0) left = tiles, next += gap;
    }

    /// Waits for the next tiles; where they are.
    __device__ __forceinline__ uint32_t wait() const {
        ptx::barrier_wait(barriers + read * 8, phase);
        return ring + read * STAGE_BYTES;
    }

    /// Says that the tiles of the last `wait` are not needed any more.
    __device__ __forceinline__ void release(const Params& p) {
        __syncwarp();
        fetch(p, read);
        if (++read == STAGES) read = 0, phase ^= 1;
    }
};

/// Multiplies the tiles of a group, of which there are `left`, stage by stage: `arrived` waits for the next one and says
/// where its tiles are, `done` says that they are not needed any more.
template <int STAGE_TILES, typename WarpSums, typename Arrived, typename Done>
__device__ __forceinline__ void multiply_stages(WarpSums& sums, int left, Arrived arrived, Done done, int lane) {
    constexpr int TILE_BYTES = WarpSums::TILE_BYTES;
    auto tiles_of = [&](auto first, bool all) {
        constexpr int FIRST = decltype(first)::value;
        const uint8_t* tiles = arrived();
        if constexpr (STAGE_TILES >= 1) sums.template multiply<FIRST>(tiles, lane);
        if constexpr (STAGE_TILES >= 2) {
            if (all || left > FIRST + 1) sums.template multiply<FIRST + 1>(tiles + TILE_BYTES, lane);
        }
        if constexpr (STAGE_TILES >= 4) {
            if (all || left > FIRST + 2) sums.template multiply<FIRST + 2>(tiles + 2 * TILE_BYTES, lane);
            if (all || left > FIRST + 3) sums.template multiply<FIRST + 3>(tiles + 3 * TILE_BYTES, lane);
        }
        done();
    };
    auto stages = [&](bool all) {
        tiles_of(std::integral_constant<int, 0>{}, all);
        if constexpr (STAGE_TILES == 1) {
            if (all || left > 1) tiles_of(std::integral_constant<int, 1>{}, all);
        }
        if constexpr (STAGE_TILES <= 2) {
            if (all || left > 2) tiles_of(std::integral_constant<int, 2>{}, all);
        }
        if constexpr (STAGE_TILES == 1) {
            if (all || left > 3) tiles_of(std::integral_constant<int, 3>{}, all);
        }
    };
    // Most groups are whole: without questions.
    if (left >= GROUP_TILES) {
        stages(true);
    } else {
        stages(false);
    }
}

}  // namespace decode

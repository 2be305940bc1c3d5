// Packed weight tiles to E4M3: exact where the row's scales are close enough (E2M1: 14 binades, E2M3: 11, E3M2: 9),
// nearest even for E4M3 with scales below the row's largest.
//
// The result is what wgmma reads in shared memory: for each 128 rows and 128 of K, 16 KiB in the 128-byte swizzle. Within
// each 16 columns the order is that of activations in E4M3: see `mx::lane_order`.

#include "mx/tile.cuh"
#include "ptx/launch.cuh"

namespace {

/// BF16 pairs `low` and `high`, times `factor`, as four E4M3 in `mx::lane_order`.
__device__ __forceinline__ uint32_t to_e4m3(uint32_t low, uint32_t high, float factor) {
    uint16_t first, second;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
        : "=h"(first)
        : "f"(__uint_as_float(low << 16) * factor), "f"(__uint_as_float(high << 16) * factor));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
        : "=h"(second)
        : "f"(__uint_as_float(low & 0xFFFF0000u) * factor), "f"(__uint_as_float(high & 0xFFFF0000u) * factor));
    return first | uint32_t(second) << 16;
}

/// Transposes the 4 x 4 words of lanes 4g .. 4g + 3: word i of lane 4g + t becomes word t of lane 4g + i.
__device__ __forceinline__ void transpose(uint32_t (&words)[4]) {
    const uint32_t t = threadIdx.x % 4;
    // Lanes t and t ^ 1 exchange the words that differ from t in bit 0, then likewise with bit 1.
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        const bool upper = (t & bit) != 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & bit) continue;
            const uint32_t mine = upper ? words[i] : words[i + bit];
            const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, mine, bit);
            (upper ? words[i] : words[i + bit]) = other;
        }
    }
}

/// `out` = `row_tiles` x `k_tiles` tiles times `factor`. A warp per tile; `k_tiles` is made even with zeros.
template <tile::Format FORMAT>
__device__ __forceinline__ void expand(
    const uint8_t* tiles, uint32_t row_tiles, uint32_t k_tiles, float factor, uint8_t* out) {
    ptx::launch_dependents();
    ptx::wait_for_dependencies();
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warps = gridDim.x * blockDim.x / 32;
    const uint32_t boxes = (k_tiles + 1) / 2, count = row_tiles * boxes * 2;
    for (uint32_t i = (blockIdx.x * blockDim.x + threadIdx.x) / 32; i < count; i += warps) {
        const uint32_t row_tile = i / (2 * boxes), k_tile = i % (2 * boxes);
        uint32_t rows[2][4] = {};
        if (k_tile < k_tiles) {
            tile::Lane<FORMAT> packed;
            packed.load(tiles + (size_t(row_tile) * k_tiles + k_tile) * tile::bytes(FORMAT), lane);
            uint32_t a[4][4];
            packed.template fragment<0>(a[0]);
            packed.template fragment<1>(a[1]);
            packed.template fragment<2>(a[2]);
            packed.template fragment<3>(a[3]);
#pragma unroll
            for (int step = 0; step < 4; ++step) {
                rows[0][step] = to_e4m3(a[step][0], a[step][2], factor);
                rows[1][step] = to_e4m3(a[step][1], a[step][3], factor);
            }
            transpose(rows[0]);
            transpose(rows[1]);
        }
        // Now this lane has the 16 columns of step t, of rows g and g + 8.
        uint8_t* const box = out + (size_t(row_tile / 8) * boxes + k_tile / 2) * 16384;
        const uint32_t unit = (k_tile % 2 * 4 + t) ^ g;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t row = row_tile % 8 * 16 + 8 * h + g;
            *reinterpret_cast<uint4*>(box + row * 128 + unit * 16) =
                make_uint4(rows[h][0], rows[h][1], rows[h][2], rows[h][3]);
        }
    }
}

}  // namespace

#define EXPAND(FORMAT, NAME)                                                                    \
    extern "C" __global__ void __launch_bounds__(256) NAME(                                     \
        const uint8_t* __restrict__ tiles, uint32_t row_tiles, uint32_t k_tiles, float factor,  \
        uint8_t* __restrict__ out) {                                                            \
        expand<tile::Format::FORMAT>(tiles, row_tiles, k_tiles, factor, out);                   \
    }

EXPAND(E2m1, expand_e2m1)
EXPAND(E2m3, expand_e2m3)
EXPAND(E3m2, expand_e3m2)
EXPAND(E4m3, expand_e4m3)

// The products of `decode.cuh` and `decode_one.cuh` for every weight format and tile of M. The launcher
// (src/cuda/gemm/decode.rs) knows these names and sizes.

#include "gemm/decode.cuh"
#include "gemm/decode_one.cuh"

#define DECODE_ONE(NAME, FORMAT, SEGMENTS, STAGE_TILES, STAGES)                                 \
    extern "C" __global__ void __launch_bounds__(32 * decode::WARPS, 1)                         \
        decode_##NAME##_one_k##SEGMENTS(const __grid_constant__ decode::Params p) {             \
        decode::gemm_one_row<tile::Format::FORMAT, SEGMENTS, STAGE_TILES, STAGES>(p);           \
    }

#define DECODE(NAME, FORMAT, M_TILE, SEGMENTS, STAGE_TILES, STAGES)                             \
    extern "C" __global__ void __launch_bounds__(32 * decode::WARPS, 1)                         \
        decode_##NAME##_m##M_TILE##_k##SEGMENTS(const __grid_constant__ decode::Params p) {     \
        decode::gemm<tile::Format::FORMAT, M_TILE, SEGMENTS, STAGE_TILES, STAGES>(p);           \
    }

// A few rows leave room for a deep ring; with more of them x needs the space. One row is there so soon that a deep ring would
// delay it.
#define DECODE_FORMAT(NAME, FORMAT, SEGMENTS, STAGE_TILES, ONE_STAGES, STAGES, SMALL_STAGE_TILES, SMALL_STAGES) \
    DECODE_ONE(NAME, FORMAT, SEGMENTS, STAGE_TILES, ONE_STAGES)                                                 \
    DECODE(NAME, FORMAT, 8, SEGMENTS, STAGE_TILES, STAGES)                                                      \
    DECODE(NAME, FORMAT, 16, SEGMENTS, SMALL_STAGE_TILES, SMALL_STAGES)

DECODE_FORMAT(e2m1, E2m1, 4, 4, 2, 3, 2, 3)
DECODE_FORMAT(e2m1, E2m1, 8, 4, 2, 3, 2, 3)
DECODE_FORMAT(e2m3, E2m3, 8, 4, 2, 2, 2, 2)
DECODE_FORMAT(e3m2, E3m2, 8, 4, 2, 2, 2, 2)
DECODE_FORMAT(e4m3, E4m3, 8, 2, 2, 3, 1, 3)
DECODE_FORMAT(e5m2, E5m2, 8, 2, 2, 3, 1, 3)
DECODE_FORMAT(int8, Int8, 8, 2, 2, 3, 1, 3)
DECODE_FORMAT(bf16, Bf16, 8, 1, 4, 4, 1, 2)

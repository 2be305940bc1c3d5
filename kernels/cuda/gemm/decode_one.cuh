// out[n] = sum_k x[k] w[n][k] for one row of x: as decode.cuh computes it, and by the same order of sums, but without clusters.
//
// The SEGMENTS warps of a group take rows of tiles of their own, without regard to the other groups. The first warp of a group
// finishes its results.
#pragma once

#include "gemm/decode_parts.cuh"
#include "ops/swiglu.cuh"
#include "ptx/async_copy.cuh"

namespace decode {

/// Shared memory: rings | barriers | sums | factors | x, and as much as a group of tiles has of it, which may be read beyond
/// the end.
template <tile::Format FORMAT, int SEGMENTS, int STAGE_TILES, int STAGES>
struct OneShape {
    using Ring = WarpRing<FORMAT, STAGE_TILES, STAGES>;
    static constexpr int GROUPS = WARPS / SEGMENTS;
    /// Barriers: of the rings; two per group of warps, for its two buffers of sums.
    static constexpr int BARRIERS = WARPS * Ring::BYTES, GROUP_BARRIERS = BARRIERS + WARPS * STAGES * 8;
    static constexpr int SUMS = (GROUP_BARRIERS + 2 * GROUPS * 8 + 15) / 16 * 16;
    /// Sums of the round before are read while those of this round are computed.
    static constexpr int BUFFER = WARPS * tile::ROWS * 4;
    /// Factors of the rows that the groups finish, a buffer for each of those.
    static constexpr int FACTORS = SUMS + 2 * BUFFER, FACTOR_BUFFER = GROUPS * tile::ROWS * 4;
    static constexpr int X = FACTORS + 2 * FACTOR_BUFFER;
};

/// Brings x, times 2^EXPONENT, to shared memory; columns beyond K, a multiple of 8, are zeros.
template <int EXPONENT>
__device__ __forceinline__ void load_one_row(uint8_t* shared, const Params& p) {
    constexpr int VECTOR = 8, COUNT = 4, STEP = 32 * WARPS * VECTOR;
    const int columns = p.k_tiles * tile::COLS;
    for (int start = threadIdx.x * VECTOR; start < columns; start += COUNT * STEP) {
        uint4 values[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int column = start + i * STEP;
            values[i] = column < p.k ? *reinterpret_cast<const uint4*>(p.x + column) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int column = start + i * STEP;
            if (column < columns) *reinterpret_cast<uint4*>(shared + column * 2) = scaled<EXPONENT>(values[i]);
        }
    }
}

/// Adds up the segments of a row of tiles and writes the results; by one warp, a lane of the lower half for each of the 16.
/// `factor` is the lane's.
template <int SEGMENTS>
__device__ __forceinline__ void finish_one_row(const Params& p, const float* sums, int row_tile, int lane, float factor) {
    constexpr int ROWS = tile::ROWS;
    const int row = lane % ROWS;
    const float sum = tree_sum<SEGMENTS>(sums + row, ROWS);
    if (p.is_gated) {
        const int n = row_tile * (ROWS / 2) + row % (ROWS / 2), half = p.n / 2;
        const bool has_bias = p.bias != nullptr && n < half;
        const float value = sum * factor + (has_bias ? p.bias[n + row / (ROWS / 2) * half] : 0.0f);
        const float up = __shfl_down_sync(~0u, value, ROWS / 2);
        if (lane >= ROWS / 2 || n >= half) return;
        static_cast<__nv_bfloat16*>(p.out)[n] = __float2bfloat16(ops::swiglu(value, up));
    } else {
        const int n = row_tile * ROWS + row;
        if (lane >= ROWS || n >= p.n) return;
        const float value = sum * factor + (p.bias != nullptr ? p.bias[n] : 0.0f);
        if (p.out_is_f32) {
            static_cast<float*>(p.out)[p.column + n] = value;
        } else {
            static_cast<__nv_bfloat16*>(p.out)[p.column + n] = __float2bfloat16(value);
        }
    }
}

template <tile::Format FORMAT, int SEGMENTS, int STAGE_TILES, int STAGES>
__device__ __forceinline__ void gemm_one_row(const Params& p) {
    using S = OneShape<FORMAT, SEGMENTS, STAGE_TILES, STAGES>;
    extern __shared__ __align__(128) uint8_t shared[];
    // The same in all lanes, and known to be so by the compiler.
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int group = warp / SEGMENTS, segment = warp % SEGMENTS;
    const int first_k = p.k_tiles * segment / SEGMENTS, tiles = p.k_tiles * (segment + 1) / SEGMENTS - first_k;
    const int first_row = gridDim.x * group + blockIdx.x, row_step = gridDim.x * S::GROUPS;

    const uint32_t base = ptx::shared_address(shared);
    const uint32_t group_barriers = base + S::GROUP_BARRIERS + group * 16;
    if (segment == 0 && lane < 2) ptx::barrier_init(group_barriers + lane * 8, SEGMENTS);
    typename S::Ring ring(p, base + warp * S::Ring::BYTES, base + S::BARRIERS + warp * STAGES * 8, first_row, row_step,
                          first_k, tiles, lane);
    // x waits behind what is asked for before it: not the whole ring.
    constexpr int AHEAD = STAGES / 2;
    for (int stage = 0; stage < AHEAD; ++stage) ring.fetch(p, stage);
    ptx::launch_dependents();
    ptx::wait_for_dependencies();
    load_one_row<X_EXPONENT<FORMAT>>(shared + S::X, p);
    for (int stage = AHEAD; stage < STAGES; ++stage) ring.fetch(p, stage);
    __syncthreads();

    const uint32_t x = base + S::X + OneTokenSums<FORMAT>::x_place(lane) + first_k * 128;
    const float unit = __uint_as_float(uint32_t(127 - X_EXPONENT<FORMAT>) << 23);
    uint8_t* const group_sums = shared + S::SUMS + group * SEGMENTS * tile::ROWS * 4;
    uint8_t* const group_factors = shared + S::FACTORS + group * tile::ROWS * 4;
    auto finish_round = [&](uint32_t round) {
        ptx::barrier_wait(group_barriers + round % 2 * 8, round / 2 % 2);
        if (segment > 0) return;
        ptx::copy_wait_all();
        const float* sums = reinterpret_cast<const float*>(group_sums + round % 2 * S::BUFFER);
        const float* factors = reinterpret_cast<const float*>(group_factors + round % 2 * S::FACTOR_BUFFER);
        finish_one_row<SEGMENTS>(p, sums, first_row + round * row_step, lane, factors[lane % tile::ROWS] * unit);
    };
    uint32_t round = 0;
    for (; first_row + round * row_step < p.row_tiles; ++round) {
        const int row = first_row + round * row_step;
        // The factors come from memory: asked for now, they are there when the results are finished.
        if (segment == 0 && lane < tile::ROWS) {
            const uint32_t factor = ptx::shared_address(group_factors + round % 2 * S::FACTOR_BUFFER) + lane * 4;
            ptx::copy_word_async(factor, p.factors + row * tile::ROWS + lane);
        }
        OneTokenSums<FORMAT> sums;
        for (int left = tiles; left > 0; left -= GROUP_TILES) {
            sums.begin(x + (tiles - left) * 128);
            multiply_stages<STAGE_TILES>(sums, left, [&] { return shared + (ring.wait() - base); },
                                         [&] { ring.release(p); }, lane);
            sums.end();
        }
        const float2 totals = sums.total();
        // Results are finished a round later, when the sums of the slowest warp are likely there too. A buffer is
        // written again when it has been read: that follows from the sums of the round between having arrived.
        if (round > 0) finish_round(round - 1);
        if (lane % 4 == 0) {
            float* const mine = reinterpret_cast<float*>(group_sums + round % 2 * S::BUFFER) + segment * tile::ROWS + lane / 4;
            mine[0] = totals.x, mine[8] = totals.y;
        }
        __syncwarp();
        if (lane == 0) ptx::barrier_arrive(group_barriers + round % 2 * 8);
    }
    if (round > 0 && segment == 0) finish_round(round - 1);
}

}  // namespace decode

// What is done to activations before they multiply: blocks of 32 along K are rotated, or take the values of an MX format,
// or both. Here it happens to values in registers, so that the kernel that computes activations can leave them prepared.
//
// Values are rounded to BF16 first, as they would be on their way through memory: the result is the same to the bit
// whether their producer prepares them or a kernel of its own (gemm/quantize.cu).
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "mx/quantize.cuh"

namespace mx {

/// Mirrored on the host: keep the order of the fields.
struct Preparation {
    /// Of the format, if there is one.
    MxGrid grid;
    uint32_t is_rotated;
    uint32_t is_quantized;

    __device__ __forceinline__ bool is_needed() const { return (is_rotated | is_quantized) != 0; }
};

/// The form in which a row operator leaves activations for a product. Mirrored on the host: keep the order of the fields.
struct InputForm {
    Preparation preparation;
    /// Null for BF16. Otherwise values become E4M3, one byte each, in the order of gemm/quantize.cu, and these are the
    /// factors of rows.
    float* factors;
    /// Counts the rows that E4M3 had to round.
    uint32_t* inexact;
};

/// How a block lies in a warp. This one: `COUNT` values side by side in each of 32 / COUNT neighbouring lanes.
template <int COUNT>
struct SideBySide {
    static constexpr int VALUES = COUNT;
    /// What tells two elements apart that are `distance`, a power of two, from each other: lanes that differ in these bits,
    /// or, if none, places in a lane that do.
    __host__ __device__ static constexpr int lane_bits(int distance) { return distance / COUNT; }
    __host__ __device__ static constexpr int value_bits(int distance) { return distance; }
};

/// As the tensor core leaves the results of a row: value 2 j + i of lane t, of four, is element 8 j + 2 t + i.
struct Accumulators {
    static constexpr int VALUES = 8;
    __host__ __device__ static constexpr int lane_bits(int distance) { return distance == 4 || distance == 2 ? distance / 2 : 0; }
    __host__ __device__ static constexpr int value_bits(int distance) { return distance == 1 ? 1 : distance / 4; }
};

/// One stage of the transform: elements `DISTANCE` apart become their sum and their difference.
template <class Layout, int DISTANCE>
__device__ __forceinline__ void add_and_subtract(float (&v)[Layout::VALUES], uint32_t lanes) {
    constexpr int LANE_BITS = Layout::lane_bits(DISTANCE), VALUE_BITS = Layout::value_bits(DISTANCE);
    if constexpr (LANE_BITS != 0) {
        const bool is_upper = (threadIdx.x & LANE_BITS) != 0;
#pragma unroll
        for (int i = 0; i < Layout::VALUES; ++i) {
            const float other = __shfl_xor_sync(lanes, v[i], LANE_BITS);
            v[i] = is_upper ? other - v[i] : v[i] + other;
        }
    } else {
#pragma unroll
        for (int i = 0; i < Layout::VALUES; ++i) {
            if (i & VALUE_BITS) continue;
            const float a = v[i], b = v[i + VALUE_BITS];
            v[i] = a + b;
            v[i + VALUE_BITS] = a - b;
        }
    }
}

/// The values times the Hadamard matrix of their block, Sylvester's, over the square root of 32, with the sums in the order
/// of the host library, so that both round the same. `lanes` are those that call.
template <class Layout>
__device__ __forceinline__ void rotate(float (&v)[Layout::VALUES], uint32_t lanes) {
    add_and_subtract<Layout, 16>(v, lanes);
    add_and_subtract<Layout, 8>(v, lanes);
    add_and_subtract<Layout, 4>(v, lanes);
    add_and_subtract<Layout, 2>(v, lanes);
    add_and_subtract<Layout, 1>(v, lanes);
    // 1 / sqrt(32).
#pragma unroll
    for (int i = 0; i < Layout::VALUES; ++i) v[i] = __fmul_rn(v[i], 0.17677669f);
}

/// The scale byte of the values' block.
template <class Layout>
__device__ __forceinline__ uint32_t block_scale(const MxGrid& grid, const float (&v)[Layout::VALUES], uint32_t lanes) {
    uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < Layout::VALUES; ++i) amax = max(amax, __float_as_uint(v[i]) & 0x7FFFFFFFu);
#pragma unroll
    for (int distance = 1; distance < BLOCK; distance *= 2) {
        if (Layout::lane_bits(distance) != 0) amax = max(amax, __shfl_xor_sync(lanes, amax, Layout::lane_bits(distance)));
    }
    return shared_scale(grid, amax);
}

/// The values as they come from memory: rounded to BF16, and rotated if that is asked for.
template <class Layout>
__device__ __forceinline__ void begin_preparation(const Preparation& preparation, float (&v)[Layout::VALUES],
                                                  uint32_t lanes) {
#pragma unroll
    for (int i = 0; i < Layout::VALUES; ++i) v[i] = __bfloat162float(__float2bfloat16_rn(v[i]));
    if (preparation.is_rotated) rotate<Layout>(v, lanes);
}

/// The values prepared; BF16 holds MX values exactly (but for parts of blocks below 2^-126), and rounds those that are
/// rotated alone. A block with NaN or Inf is NaN.
template <class Layout>
__device__ __forceinline__ void prepare(const Preparation& preparation, float (&v)[Layout::VALUES], uint32_t lanes) {
    begin_preparation<Layout>(preparation, v, lanes);
    if (!preparation.is_quantized) return;
    const uint32_t byte = block_scale<Layout>(preparation.grid, v, lanes);
    const float scale = scale_value(byte), reciprocal = scale_reciprocal(min(byte, 254u));
#pragma unroll
    for (int i = 0; i < Layout::VALUES; ++i) v[i] = nearest(preparation.grid, v[i] * reciprocal) * scale;
}

/// Four E4M3 in the order in which they lie along K in memory, which is that in which a lane gets those of a weight tile: of
/// each 16 columns, 2t + 8, 2t, 2t + 9 and 2t + 1 are together. `low` has columns 2t and 2t + 1 in its low bytes, `high` the
/// other two.
__device__ __forceinline__ uint32_t lane_order(uint32_t low, uint32_t high) { return __byte_perm(low, high, 0x1504); }

/// A block of a token on its way to E4M3: its values are relative to the largest scale of the token, `top`.
struct Rebased {
    float reciprocal, factor;
    /// Not zero if E4M3 has not all of the values.
    uint32_t differences;

    __device__ __forceinline__ Rebased(const MxGrid& grid, uint32_t byte, uint32_t top) {
        reciprocal = scale_reciprocal(min(byte, 254u));
        // So far below the top nothing is left of a block.
        const int distance = min(int(top - byte), 100);
        factor = __uint_as_float(uint32_t(127 + grid.e4m3_shift - distance) << 23);
        // A block up to 15 binades below the top is exact in F16. Farther ones, unless they are zero, are not in E4M3.
        differences = byte != 0 && distance > 15;
    }

    /// Two values in E4M3, nearest even, saturating, in the low 16 bits.
    __device__ __forceinline__ uint32_t pair(const MxGrid& grid, float low, float high) {
        low = nearest(grid, low * reciprocal) * factor;
        high = nearest(grid, high * reciprocal) * factor;
        uint16_t codes;
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
        uint32_t exact, held;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(exact) : "f"(high), "f"(low));
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(held) : "h"(codes));
        differences |= held ^ exact;
        return codes;
    }
};

/// The largest scale of a token whose blocks the threads of this CTA, whole warps, have: `mine` is a thread's largest. A zero
/// block has byte 0 and takes no part; NaN, 255, wins.
__device__ __forceinline__ uint32_t token_top(uint32_t mine) {
    __shared__ uint32_t largest;
    if (threadIdx.x == 0) largest = 0;
    mine = __reduce_max_sync(0xFFFFFFFFu, mine);
    __syncthreads();
    if (threadIdx.x % 32 == 0) atomicMax(&largest, mine);
    __syncthreads();
    return largest;
}

/// Writes a token's factor, NaN for one with NaN or Inf, and adds to `inexact` if E4M3 had to round it. For all threads.
__device__ __forceinline__ void finish_token(const MxGrid& grid, uint32_t top, uint32_t differences, float* factor,
                                             uint32_t* inexact) {
    const bool rounded = __syncthreads_or(differences != 0);
    if (threadIdx.x == 0) {
        *factor = scale_value(top) * __uint_as_float(uint32_t(127 - grid.e4m3_shift) << 23);
        if (rounded && top != SCALE_NAN) atomicAdd(inexact, 1);
    }
}

}  // namespace mx

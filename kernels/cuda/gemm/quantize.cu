// Activations [M, K] in BF16, K a multiple of 32: rotated block by block, to the values they have in an MX format, or both.
//
// Two lanes hold a block of 32: 16 consecutive values each.

#include "gemm/chunk.cuh"
#include "mx/quantize.cuh"
#include "ptx/launch.cuh"

namespace gemm {

/// Chunks that a thread of quantize_to_e4m3 has.
constexpr int HELD = 4;

/// As E4M3, nearest even, saturating, in the low 16 bits.
__device__ __forceinline__ uint32_t pack_e4m3(float low, float high) {
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

/// E4M3 as F16, exactly.
__device__ __forceinline__ uint32_t e4m3_to_f16(uint32_t pair) {
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(uint16_t(pair)));
    return halves;
}

/// `out` = what `convert` makes of every chunk of `x`: BF16 pairs. `chunks` is M * K / 16.
template <class Chunk, class Convert>
__device__ __forceinline__ void to_bf16(const uint4* x, uint32_t chunks, uint4* out, Convert convert) {
    ptx::launch_dependents();
    ptx::wait_for_dependencies();
    const uint32_t stride = gridDim.x * blockDim.x;
    for (uint32_t index = blockIdx.x * blockDim.x + threadIdx.x; index < chunks; index += stride) {
        // `chunks` is even, so both lanes of a block are here.
        const uint32_t lanes = __activemask();
        Chunk chunk;
        chunk.load(x, index, lanes);
        uint32_t values[CHUNK / 2];
        convert(chunk, lanes, values);
        out[2 * index] = make_uint4(values[0], values[1], values[2], values[3]);
        out[2 * index + 1] = make_uint4(values[4], values[5], values[6], values[7]);
    }
}

/// `out` = the MX values of `x` in BF16, which holds them exactly (but for parts of blocks below 2^-126). A block with NaN
/// or Inf is NaN.
template <class Chunk>
__device__ __forceinline__ void quantize_to_bf16(const uint4* x, const mx::MxGrid& grid, uint32_t chunks, uint4* out) {
    to_bf16<Chunk>(x, chunks, out, [&](const Chunk& chunk, uint32_t lanes, uint32_t (&values)[CHUNK / 2]) {
        const uint32_t byte = chunk.scale(grid, lanes);
        const float scale = mx::scale_value(byte);
        const float reciprocal = mx::scale_reciprocal(min(byte, 254u));
#pragma unroll
        for (int i = 0; i < CHUNK / 2; ++i) {
            values[i] = pack_bf16(mx::nearest(grid, chunk.low(i) * reciprocal) * scale,
                                  mx::nearest(grid, chunk.high(i) * reciprocal) * scale);
        }
    });
}

/// `out` `[M, K]` = the MX values of `x` as E4M3 times one power of two per token, `factors` `[M]`; a token with NaN or
/// Inf has the factor NaN. One CTA per token, whose threads hold HELD chunks each: `row_chunks` = K / 16 is at most
/// HELD * blockDim.x, and blockDim.x a multiple of 32. Adds to `inexact` the tokens some of whose values E4M3 had to
/// round: those whose blocks are so many binades apart that the smallest do not reach its grid.
///
/// Within each 16 values along K the order is that in which a lane holds a weight tile: position 4t + i has the value at
/// 2t + i for i < 2, and at 8 + 2t + i - 2 for the others.
template <class Chunk>
__device__ __forceinline__ void quantize_to_e4m3(const uint4* x, const mx::MxGrid& grid, uint32_t row_chunks, uint4* out,
                                                 float* factors, uint32_t* inexact) {
    __shared__ uint32_t largest;
    ptx::launch_dependents();
    if (threadIdx.x == 0) largest = 0;
    ptx::wait_for_dependencies();
    const size_t row = size_t(blockIdx.x) * row_chunks;

    Chunk chunks[Chunk::IS_SMALL ? HELD : 1];
    uint32_t bytes[HELD];
    // The token's largest scale. A zero block has byte 0 and takes no part; NaN, 255, wins.
    uint32_t top = 0;
#pragma unroll
    for (int h = 0; h < HELD; ++h) {
        const uint32_t index = h * blockDim.x + threadIdx.x;
        if (index >= row_chunks) continue;
        const uint32_t lanes = __activemask();
        Chunk& chunk = chunks[Chunk::IS_SMALL ? h : 0];
        chunk.load(x, row + index, lanes);
        bytes[h] = chunk.scale(grid, lanes);
        top = max(top, bytes[h]);
    }
    top = __reduce_max_sync(0xFFFFFFFFu, top);
    __syncthreads();
    if (threadIdx.x % 32 == 0) atomicMax(&largest, top);
    __syncthreads();
    top = largest;

    uint32_t differences = 0;
#pragma unroll
    for (int h = 0; h < HELD; ++h) {
        const uint32_t index = h * blockDim.x + threadIdx.x;
        if (index >= row_chunks) continue;
        Chunk& chunk = chunks[Chunk::IS_SMALL ? h : 0];
        if constexpr (!Chunk::IS_SMALL) chunk.load(x, row + index, __activemask());
        const float reciprocal = mx::scale_reciprocal(min(bytes[h], 254u));
        // So far below the top nothing is left of a block.
        const int distance = min(int(top - bytes[h]), 100);
        const float rebase = __uint_as_float(uint32_t(127 + grid.e4m3_shift - distance) << 23);
        // A block up to 15 binades below the top is exact in F16. Farther ones, unless they are zero, are not in E4M3.
        differences |= bytes[h] != 0 && distance > 15;
        uint32_t pairs[CHUNK / 2];
#pragma unroll
        for (int i = 0; i < CHUNK / 2; ++i) {
            const float low = mx::nearest(grid, chunk.low(i) * reciprocal) * rebase;
            const float high = mx::nearest(grid, chunk.high(i) * reciprocal) * rebase;
            pairs[i] = pack_e4m3(low, high);
            differences |= e4m3_to_f16(pairs[i]) ^ pack_f16(low, high);
        }
        out[row + index] = make_uint4(pairs[0] | pairs[4] << 16, pairs[1] | pairs[5] << 16, pairs[2] | pairs[6] << 16,
                                      pairs[3] | pairs[7] << 16);
    }
    const bool rounded = __syncthreads_or(differences != 0);
    if (threadIdx.x == 0) {
        factors[blockIdx.x] = mx::scale_value(top) * __uint_as_float(uint32_t(127 - grid.e4m3_shift) << 23);
        if (rounded && top != mx::SCALE_NAN) atomicAdd(inexact, 1);
    }
}

}  // namespace gemm

/// Kernels that take the activations as they are, and those that rotate them first.
#define QUANTIZE(NAME, CHUNK)                                                                                        \
    extern "C" __global__ void __launch_bounds__(256) NAME##_to_bf16(                                                \
        const uint4* __restrict__ x, mx::MxGrid grid, uint32_t chunks, uint4* __restrict__ out) {                    \
        gemm::quantize_to_bf16<gemm::CHUNK>(x, grid, chunks, out);                                                   \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(1024)                                                               \
        NAME##_to_e4m3(const uint4* __restrict__ x, mx::MxGrid grid, uint32_t row_chunks, uint4* __restrict__ out,   \
                       float* __restrict__ factors, uint32_t* __restrict__ inexact) {                                \
        gemm::quantize_to_e4m3<gemm::CHUNK>(x, grid, row_chunks, out, factors, inexact);                             \
    }

QUANTIZE(quantize, PlainChunk)
QUANTIZE(quantize_rotated, RotatedChunk)

/// `out` = the rotated `x`, rounded to BF16.
extern "C" __global__ void __launch_bounds__(256)
    rotate_to_bf16(const uint4* __restrict__ x, uint32_t chunks, uint4* __restrict__ out) {
    using gemm::RotatedChunk;
    gemm::to_bf16<RotatedChunk>(x, chunks, out, [](const RotatedChunk& chunk, uint32_t, uint32_t (&values)[8]) {
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] = gemm::pack_bf16(chunk.low(i), chunk.high(i));
    });
}

// Sixteen consecutive activations of a row, the other half of whose block of 32 the neighbouring lane has.
#pragma once

#include "mx/prepare.cuh"

namespace gemm {

constexpr int CHUNK = 16;

/// The values as they are: BF16 pairs.
struct PlainChunk {
    /// Whether it is so small that a thread keeps a few, rather than load them twice.
    static constexpr bool IS_SMALL = true;

    uint32_t pairs[CHUNK / 2];

    /// Chunk `index` of `x`; `lanes` are those that call, neighbours together.
    __device__ __forceinline__ void load(const uint4* x, size_t index, uint32_t /*lanes*/) {
        const uint4 a = x[2 * index], b = x[2 * index + 1];
        pairs[0] = a.x, pairs[1] = a.y, pairs[2] = a.z, pairs[3] = a.w;
        pairs[4] = b.x, pairs[5] = b.y, pairs[6] = b.z, pairs[7] = b.w;
    }

    __device__ __forceinline__ float low(int i) const { return __uint_as_float(pairs[i] << 16); }
    __device__ __forceinline__ float high(int i) const { return __uint_as_float(pairs[i] & 0xFFFF0000u); }

    /// The scale byte of the block.
    __device__ __forceinline__ uint32_t scale(const mx::MxGrid& grid, uint32_t lanes) const {
        uint32_t amax = 0;
#pragma unroll
        for (int i = 0; i < CHUNK / 2; ++i) amax = __vmaxu2(amax, pairs[i] & 0x7FFF7FFFu);
        amax = __vmaxu2(amax, __shfl_xor_sync(lanes, amax, 1));
        return mx::shared_scale(grid, max(amax << 16, amax & 0xFFFF0000u));
    }
};

/// The values rotated, in F32.
struct RotatedChunk {
    static constexpr bool IS_SMALL = false;
    using Layout = mx::SideBySide<CHUNK>;

    float values[CHUNK];

    /// As `PlainChunk::load`.
    __device__ __forceinline__ void load(const uint4* x, size_t index, uint32_t lanes) {
        PlainChunk plain;
        plain.load(x, index, lanes);
#pragma unroll
        for (int i = 0; i < CHUNK / 2; ++i) values[2 * i] = plain.low(i), values[2 * i + 1] = plain.high(i);
        mx::rotate<Layout>(values, lanes);
    }

    __device__ __forceinline__ float low(int i) const { return values[2 * i]; }
    __device__ __forceinline__ float high(int i) const { return values[2 * i + 1]; }

    /// As `PlainChunk::scale`.
    __device__ __forceinline__ uint32_t scale(const mx::MxGrid& grid, uint32_t lanes) const {
        return mx::block_scale<Layout>(grid, values, lanes);
    }
};

}  // namespace gemm

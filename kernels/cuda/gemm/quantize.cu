// Activations [M, K] in BF16, K a multiple of 32: rotated block by block, to the values they have in an MX format, or both.

#include "gemm/chunk.cuh"
#include "ops/vector.cuh"
#include "ptx/launch.cuh"

namespace gemm {

/// Chunks that a thread of quantize_to_e4m3 has.
constexpr int HELD = 4;

/// `out` `[M, K]` = the MX values of `x` as E4M3 times one power of two per token, `factors` `[M]`; a token with NaN or
/// Inf has the factor NaN. One CTA per token, whose threads hold HELD chunks each: `row_chunks` = K / 16 is at most
/// HELD * blockDim.x, and blockDim.x a multiple of 32. Adds to `inexact` the tokens some of whose values E4M3 had to
/// round: those whose blocks are so many binades apart that the smallest do not reach its grid.
///
/// Within each 16 values along K the order is that of `mx::lane_order`.
template <class Chunk>
__device__ __forceinline__ void quantize_to_e4m3(const uint4* x, const mx::MxGrid& grid, uint32_t row_chunks, uint4* out,
                                                 float* factors, uint32_t* inexact) {
    ptx::launch_dependents();
    ptx::wait_for_dependencies();
    const size_t row = size_t(blockIdx.x) * row_chunks;

    Chunk chunks[Chunk::IS_SMALL ? HELD : 1];
    uint32_t bytes[HELD];
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
    top = mx::token_top(top);

    uint32_t differences = 0;
#pragma unroll
    for (int h = 0; h < HELD; ++h) {
        const uint32_t index = h * blockDim.x + threadIdx.x;
        if (index >= row_chunks) continue;
        Chunk& chunk = chunks[Chunk::IS_SMALL ? h : 0];
        if constexpr (!Chunk::IS_SMALL) chunk.load(x, row + index, __activemask());
        mx::Rebased block(grid, bytes[h], top);
        uint32_t pairs[CHUNK / 2];
#pragma unroll
        for (int i = 0; i < CHUNK / 2; ++i) pairs[i] = block.pair(grid, chunk.low(i), chunk.high(i));
        differences |= block.differences;
        out[row + index] = make_uint4(mx::lane_order(pairs[0], pairs[4]), mx::lane_order(pairs[1], pairs[5]),
                                      mx::lane_order(pairs[2], pairs[6]), mx::lane_order(pairs[3], pairs[7]));
    }
    mx::finish_token(grid, top, differences, factors + blockIdx.x, inexact);
}

}  // namespace gemm

/// Kernels that take the activations as they are, and those that rotate them first.
#define QUANTIZE_TO_E4M3(NAME, CHUNK)                                                                       \
    extern "C" __global__ void __launch_bounds__(1024)                                                      \
        NAME(const uint4* __restrict__ x, mx::MxGrid grid, uint32_t row_chunks, uint4* __restrict__ out,    \
             float* __restrict__ factors, uint32_t* __restrict__ inexact) {                                 \
        gemm::quantize_to_e4m3<gemm::CHUNK>(x, grid, row_chunks, out, factors, inexact);                    \
    }

QUANTIZE_TO_E4M3(quantize_to_e4m3, PlainChunk)
QUANTIZE_TO_E4M3(quantize_rotated_to_e4m3, RotatedChunk)

/// `out` = `x` prepared, in BF16; `pieces` is M * K / 8.
extern "C" __global__ void __launch_bounds__(256) prepare_to_bf16(const __nv_bfloat16* __restrict__ x,
                                                                  mx::Preparation preparation, uint32_t pieces,
                                                                  __nv_bfloat16* __restrict__ out) {
    ptx::launch_dependents();
    ptx::wait_for_dependencies();
    const uint32_t stride = gridDim.x * blockDim.x;
    for (uint32_t index = blockIdx.x * blockDim.x + threadIdx.x; index < pieces; index += stride) {
        float v[ops::VECTOR];
        ops::load_vector(x + size_t(index) * ops::VECTOR, v);
        // Blocks are whole, so the four lanes of each are here.
        mx::prepare<mx::SideBySide<ops::VECTOR>>(preparation, v, __activemask());
        ops::store_vector(out + size_t(index) * ops::VECTOR, v);
    }
}

// Rows of a weight in tiles (mx/tile.cuh): the embedding, which may be the output head as well and is held once.
#include "mx/tile.cuh"
#include "ops/vector.cuh"
#include "ptx/launch.cuh"

namespace ops {

/// out[m] = table[tokens[m]], `cols` columns; rows outside the table are zero. Four threads decode a row's part of a
/// tile, each its pairs of columns.
template <tile::Format FORMAT, typename T>
__device__ __forceinline__ void embed(const uint8_t* tiles, const float* factors, const uint32_t* tokens, T* out,
                                      uint32_t rows, int cols) {
    // In this order: kernels of this step may read what steps before wrote without waiting for it.
    ptx::wait_for_dependencies();
    ptx::launch_dependents();
    const int tiles_per_row = (cols + tile::COLS - 1) / tile::COLS, pair = threadIdx.x % 4;
    const uint32_t token = tokens[blockIdx.x];
    const bool known = token < rows;
    const uint32_t row_tile = known ? token / tile::ROWS : 0, row = token % tile::ROWS;
    const float factor = known ? factors[token] : 0.0f;
    const uint8_t* row_tiles = tiles + static_cast<size_t>(row_tile) * tiles_per_row * tile::bytes(FORMAT);
    T* to = out + static_cast<size_t>(blockIdx.x) * cols;
    for (int index = threadIdx.x / 4; index < tiles_per_row; index += blockDim.x / 4) {
        tile::Lane<FORMAT> lane;
        lane.load(row_tiles + static_cast<size_t>(index) * tile::bytes(FORMAT), row % 8 * 4 + pair);
        uint32_t a[tile::STEPS][4];
        lane.template fragment<0>(a[0]);
        lane.template fragment<1>(a[1]);
        lane.template fragment<2>(a[2]);
        lane.template fragment<3>(a[3]);
#pragma unroll
        for (int step = 0; step < tile::STEPS; ++step) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int column = index * tile::COLS + step * 16 + half * 8 + pair * 2;
                float low, high;
                unpack_bf16(row < 8 ? a[step][2 * half] : a[step][2 * half + 1], low, high);
                if (column < cols) to[column] = from_float<T>(known ? low * factor : 0.0f);
                if (column + 1 < cols) to[column + 1] = from_float<T>(known ? high * factor : 0.0f);
            }
        }
    }
}

}  // namespace ops

// Grid: rows of the result. Block: a multiple of 4. `factors` has one F32 per row of the table.
#define OPS_EMBED(NAME, FORMAT)                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) ops_embed_##NAME##_f32(                                       \
        const uint8_t* tiles, const float* factors, const uint32_t* tokens, float* out, uint32_t rows, int cols) {  \
        ops::embed<tile::Format::FORMAT>(tiles, factors, tokens, out, rows, cols);                                  \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(256)                                                               \
        ops_embed_##NAME##_bf16(const uint8_t* tiles, const float* factors, const uint32_t* tokens,                 \
                                __nv_bfloat16* out, uint32_t rows, int cols) {                                      \
        ops::embed<tile::Format::FORMAT>(tiles, factors, tokens, out, rows, cols);                                  \
    }

OPS_EMBED(e2m1, E2m1)
OPS_EMBED(e2m3, E2m3)
OPS_EMBED(e3m2, E3m2)
OPS_EMBED(e4m3, E4m3)
OPS_EMBED(e5m2, E5m2)
OPS_EMBED(int8, Int8)
OPS_EMBED(bf16, Bf16)

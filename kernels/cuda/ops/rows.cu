// Row operators without arithmetic to speak of: gathering rows, SwiGLU.
#include "ops/swiglu.cuh"
#include "ops/vector.cuh"
#include "ptx/launch.cuh"

/// out[m] = x[indices[m]]; rows of `row_bytes` bytes, a multiple of 2. Grid: rows.
extern "C" __global__ void __launch_bounds__(256)
    ops_gather_rows(const uint8_t* x, const uint32_t* indices, uint8_t* out, int row_bytes) {
    ptx::wait_for_dependencies();
    ptx::launch_dependents();
    const uint8_t* from = x + static_cast<size_t>(indices[blockIdx.x]) * row_bytes;
    uint8_t* to = out + static_cast<size_t>(blockIdx.x) * row_bytes;
    if (row_bytes % 16 == 0) {
        for (int i = threadIdx.x; i < row_bytes / 16; i += blockDim.x)
            reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
    } else {
        for (int i = threadIdx.x; i < row_bytes / 2; i += blockDim.x)
            reinterpret_cast<uint16_t*>(to)[i] = reinterpret_cast<const uint16_t*>(from)[i];
    }
}

namespace ops {

template <bool ALIGNED>
__device__ __forceinline__ void silu_mul(const __nv_bfloat16* gate_up, __nv_bfloat16* out, int width) {
    const int at = (blockIdx.x * blockDim.x + threadIdx.x) * VECTOR;
    if (at >= width) return;
    const __nv_bfloat16* row = gate_up + static_cast<size_t>(blockIdx.y) * 2 * width;
    float gate[VECTOR], up[VECTOR];
    load_piece<ALIGNED>(row, at, width, gate);
    load_piece<ALIGNED>(row + width, at, width, up);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) gate[i] = swiglu(gate[i], up[i]);
    store_piece<ALIGNED>(out + static_cast<size_t>(blockIdx.y) * width, at, width, gate);
}

}  // namespace ops

/// out[m, i] = silu(gate_up[m, i]) * gate_up[m, width + i]; gate_up [rows, 2 * width], out [rows, width].
/// Grid: (width / 8 / blockDim.x rounded up, rows).
extern "C" __global__ void __launch_bounds__(256)
    ops_silu_mul(const __nv_bfloat16* gate_up, __nv_bfloat16* out, int width) {
    ptx::launch_dependents();
    ptx::wait_for_dependencies();
    if (width % ops::VECTOR == 0) {
        ops::silu_mul<true>(gate_up, out, width);
    } else {
        ops::silu_mul<false>(gate_up, out, width);
    }
}

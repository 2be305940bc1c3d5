// RMS norm, alone and behind the addition to the residual stream. One CTA per row; a row stays in registers.
//
//     residual[m] += delta[m]                                      (add_rms_norm only)
//     out[m, i]    = x[m, i] / sqrt(mean(x[m]^2) + eps) * weight[i]
//
// x, residual: [rows, width], F32 or BF16. delta, out: BF16. weight: F32 [width]. Statistics are F32 in an order that
// depends on `width` alone.
#include "ops/vector.cuh"
#include "ptx/launch.cuh"

namespace ops {

/// Each thread holds `PIECES` vectors of the row.
template <typename T, bool ADD, bool ALIGNED, int PIECES>
__device__ __forceinline__ void rms_norm_row(const __nv_bfloat16* delta, T* x, const float* weight, __nv_bfloat16* out,
                                             int width, float eps) {
    const size_t start = static_cast<size_t>(blockIdx.x) * width;
    x += start, out += start;
    float v[PIECES][VECTOR], w[PIECES][VECTOR];
    // Weights depend on no kernel: they arrive while the one before this finishes.
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
        const int at = (piece * blockDim.x + threadIdx.x) * VECTOR;
        if (at < width) load_piece<ALIGNED>(weight, at, width, w[piece]);
    }
    // The product that follows may fetch its first weights from now on; for the result it waits.
    ptx::launch_dependents();
    ptx::wait_for_dependencies();
    float squares = 0.0f;
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
        const int at = (piece * blockDim.x + threadIdx.x) * VECTOR;
        if (at >= width) continue;
        load_piece<ALIGNED>(x, at, width, v[piece]);
        if constexpr (ADD) {
            float d[VECTOR];
            load_piece<ALIGNED>(delta + start, at, width, d);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) v[piece][i] = to_float(from_float<T>(v[piece][i] + d[i]));
            store_piece<ALIGNED>(x, at, width, v[piece]);
        }
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) squares = fmaf(v[piece][i], v[piece][i], squares);
    }
    const float scale = 1.0f / sqrtf(sum_threads(squares) / static_cast<float>(width) + eps);
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
        const int at = (piece * blockDim.x + threadIdx.x) * VECTOR;
        if (at >= width) continue;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) v[piece][i] = v[piece][i] * scale * w[piece][i];
        store_piece<ALIGNED>(out, at, width, v[piece]);
    }
}

template <typename T, bool ADD, int PIECES>
__device__ __forceinline__ void rms_norm(const __nv_bfloat16* delta, T* x, const float* weight, __nv_bfloat16* out,
                                         int width, float eps) {
    if (width % VECTOR == 0) {
        rms_norm_row<T, ADD, true, PIECES>(delta, x, weight, out, width, eps);
    } else {
        rms_norm_row<T, ADD, false, PIECES>(delta, x, weight, out, width, eps);
    }
}

}  // namespace ops

// Grid: rows. Block: whole warps, `width <= PIECES * 8 * blockDim.x`.
#define OPS_NORM(SUFFIX, T, PIECES)                                                                               \
    extern "C" __global__ void __launch_bounds__(512) ops_rms_norm_##SUFFIX##_##PIECES(                            \
        const T* x, const float* weight, __nv_bfloat16* out, int width, float eps) {                              \
        ops::rms_norm<T, false, PIECES>(nullptr, const_cast<T*>(x), weight, out, width, eps);                     \
    }                                                                                                             \
    extern "C" __global__ void __launch_bounds__(512) ops_add_rms_norm_##SUFFIX##_##PIECES(                        \
        const __nv_bfloat16* delta, T* residual, const float* weight, __nv_bfloat16* out, int width, float eps) { \
        ops::rms_norm<T, true, PIECES>(delta, residual, weight, out, width, eps);                                 \
    }

OPS_NORM(f32, float, 1)
OPS_NORM(f32, float, 4)
OPS_NORM(bf16, __nv_bfloat16, 1)
OPS_NORM(bf16, __nv_bfloat16, 4)

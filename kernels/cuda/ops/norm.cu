// RMS norm, alone and behind the addition to the residual stream. One CTA per row; a row stays in registers.
//
//     residual[m] += delta[m]                                      (add_rms_norm only)
//     out[m, i]    = x[m, i] / sqrt(mean(x[m]^2) + eps) * weight[i]
//
// x, residual: [rows, width], F32 or BF16. delta: BF16. out: BF16, or as the product that follows takes it (`form`; `width`
// is then a multiple of 32). weight: F32 [width]. Statistics are F32 in an order that depends on `width` alone.
#include "mx/prepare.cuh"
#include "ops/vector.cuh"
#include "ptx/launch.cuh"

namespace ops {

/// Four lanes have a block of 32.
using NormLayout = mx::SideBySide<VECTOR>;

/// Writes a thread's `v` of row blockIdx.x, prepared, to `out` in BF16.
template <int PIECES>
__device__ __forceinline__ void store_prepared(const mx::Preparation& preparation, float (&v)[PIECES][VECTOR], int width,
                                               __nv_bfloat16* out) {
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
        const int at = (piece * blockDim.x + threadIdx.x) * VECTOR;
        if (at >= width) continue;
        mx::prepare<NormLayout>(preparation, v[piece], __activemask());
        store_vector(out + at, v[piece]);
    }
}

/// As store_prepared, to E4M3.
template <int PIECES>
__device__ __forceinline__ void store_e4m3(const mx::InputForm& form, float (&v)[PIECES][VECTOR], int width, uint8_t* out) {
    const mx::MxGrid& grid = form.preparation.grid;
    uint32_t bytes[PIECES], top = 0;
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
        if ((piece * blockDim.x + threadIdx.x) * VECTOR >= width) continue;
        const uint32_t lanes = __activemask();
        mx::begin_preparation<NormLayout>(form.preparation, v[piece], lanes);
        bytes[piece] = mx::block_scale<NormLayout>(grid, v[piece], lanes);
        top = max(top, bytes[piece]);
    }
    top = mx::token_top(top);
    uint32_t differences = 0;
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
        const int at = (piece * blockDim.x + threadIdx.x) * VECTOR;
        if (at >= width) continue;
        mx::Rebased block(grid, bytes[piece], top);
        uint32_t pairs[VECTOR / 2];
#pragma unroll
        for (int i = 0; i < VECTOR / 2; ++i) pairs[i] = block.pair(grid, v[piece][2 * i], v[piece][2 * i + 1]);
        differences |= block.differences;
        // Two lanes have 16 values: a word is two of the one and the two eight after them of the other.
        const bool is_upper = threadIdx.x % 2 != 0;
        const uint32_t mine = is_upper ? pairs[0] | pairs[1] << 16 : pairs[2] | pairs[3] << 16;
        const uint32_t other = __shfl_xor_sync(__activemask(), mine, 1);
        const uint32_t low = is_upper ? other : pairs[0] | pairs[1] << 16;
        const uint32_t high = is_upper ? pairs[2] | pairs[3] << 16 : other;
        *reinterpret_cast<uint2*>(out + at) = make_uint2(mx::lane_order(low, high), mx::lane_order(low >> 16, high >> 16));
    }
    mx::finish_token(grid, top, differences, form.factors + blockIdx.x, form.inexact);
}

/// Each thread holds `PIECES` vectors of the row.
template <typename T, bool ADD, bool ALIGNED, int PIECES>
__device__ __forceinline__ void rms_norm_row(const __nv_bfloat16* delta, T* x, const float* weight, __nv_bfloat16* out,
                                             int width, float eps, const mx::InputForm& form) {
    const size_t start = static_cast<size_t>(blockIdx.x) * width;
    x += start;
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
        if (!ALIGNED || !form.preparation.is_needed()) store_piece<ALIGNED>(out + start, at, width, v[piece]);
    }
    if (!ALIGNED || !form.preparation.is_needed()) return;
    if (form.factors == nullptr) {
        store_prepared(form.preparation, v, width, out + start);
    } else {
        store_e4m3(form, v, width, reinterpret_cast<uint8_t*>(out) + start);
    }
}

template <typename T, bool ADD, int PIECES>
__device__ __forceinline__ void rms_norm(const __nv_bfloat16* delta, T* x, const float* weight, __nv_bfloat16* out,
                                         int width, float eps, const mx::InputForm& form) {
    if (width % VECTOR == 0) {
        rms_norm_row<T, ADD, true, PIECES>(delta, x, weight, out, width, eps, form);
    } else {
        rms_norm_row<T, ADD, false, PIECES>(delta, x, weight, out, width, eps, form);
    }
}

}  // namespace ops

// Grid: rows. Block: whole warps, `width <= PIECES * 8 * blockDim.x`.
#define OPS_NORM(SUFFIX, T, PIECES)                                                                             \
    extern "C" __global__ void __launch_bounds__(512) ops_rms_norm_##SUFFIX##_##PIECES(                         \
        const T* x, const float* weight, __nv_bfloat16* out, int width, float eps,                              \
        const __grid_constant__ mx::InputForm form) {                                                           \
        ops::rms_norm<T, false, PIECES>(nullptr, const_cast<T*>(x), weight, out, width, eps, form);             \
    }                                                                                                           \
    extern "C" __global__ void __launch_bounds__(512) ops_add_rms_norm_##SUFFIX##_##PIECES(                     \
        const __nv_bfloat16* delta, T* residual, const float* weight, __nv_bfloat16* out, int width, float eps, \
        const __grid_constant__ mx::InputForm form) {                                                           \
        ops::rms_norm<T, true, PIECES>(delta, residual, weight, out, width, eps, form);                         \
    }

OPS_NORM(f32, float, 1)
OPS_NORM(f32, float, 4)
OPS_NORM(bf16, __nv_bfloat16, 1)
OPS_NORM(bf16, __nv_bfloat16, 4)

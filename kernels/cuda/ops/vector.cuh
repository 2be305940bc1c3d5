// What the row operators share: 16-byte pieces of activations, and sums in a fixed order.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace ops {

constexpr int WARP = 32;

/// Elements of one vector access: 16 bytes of BF16, two 16-byte accesses of F32.
constexpr int VECTOR = 8;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

/// Two floats as BF16, `low` in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

/// The two BF16 of a word are the upper halves of two floats.
__device__ __forceinline__ void unpack_bf16(uint32_t word, float& low, float& high) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xFFFF0000u);
}

/// Eight elements at a 16-byte aligned address.
__device__ __forceinline__ void load_vector(const __nv_bfloat16* p, float (&v)[VECTOR]) {
    const uint4 words = *reinterpret_cast<const uint4*>(p);
    unpack_bf16(words.x, v[0], v[1]);
    unpack_bf16(words.y, v[2], v[3]);
    unpack_bf16(words.z, v[4], v[5]);
    unpack_bf16(words.w, v[6], v[7]);
}

__device__ __forceinline__ void load_vector(const float* p, float (&v)[VECTOR]) {
    const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
    v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

__device__ __forceinline__ void store_vector(__nv_bfloat16* p, const float (&v)[VECTOR]) {
    *reinterpret_cast<uint4*>(p) = make_uint4(
        pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
}

__device__ __forceinline__ void store_vector(float* p, const float (&v)[VECTOR]) {
    reinterpret_cast<float4*>(p)[0] = make_float4(v[0], v[1], v[2], v[3]);
    reinterpret_cast<float4*>(p)[1] = make_float4(v[4], v[5], v[6], v[7]);
}

/// Elements `at .. at + 8` of a row of `width`; zero past its end. `ALIGNED`: rows are whole vectors.
template <bool ALIGNED, typename T>
__device__ __forceinline__ void load_piece(const T* row, int at, int width, float (&v)[VECTOR]) {
    if constexpr (ALIGNED) {
        load_vector(row + at, v);
    } else {
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) v[i] = at + i < width ? to_float(row[at + i]) : 0.0f;
    }
}

template <bool ALIGNED, typename T>
__device__ __forceinline__ void store_piece(T* row, int at, int width, const float (&v)[VECTOR]) {
    if constexpr (ALIGNED) {
        store_vector(row + at, v);
    } else {
#pragma unroll
        for (int i = 0; i < VECTOR; ++i)
            if (at + i < width) row[at + i] = from_float<T>(v[i]);
    }
}

/// The sum over the lanes of each aligned group of `LANES`, in all of them, as a tree.
template <int LANES = WARP>
__device__ __forceinline__ float sum_lanes(float x) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
    return x;
}

/// The sum over all threads of the CTA (whole warps), in all of them: lanes as a tree, then warps in order.
__device__ __forceinline__ float sum_threads(float x) {
    __shared__ float warp_sums[WARP];
    const int warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = sum_lanes(x);
    if (threadIdx.x % WARP == 0) warp_sums[warp] = x;
    __syncthreads();
    float sum = 0.0f;
    for (int i = 0; i < warps; ++i) sum += warp_sums[i];
    return sum;
}

}  // namespace ops

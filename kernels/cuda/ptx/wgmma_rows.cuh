// As wgmma.cuh with BF16, but B in shared memory with N contiguous: D[64, N] += A[64, 16] * B[16, N].
//
// Rows of B are cut into groups of 64 columns: a group is [K, 128 bytes] in the 128-byte swizzle.
#pragma once

#include <cstdint>

namespace ptx {

/// Describes 16 rows of B from `shared` on (1024-byte aligned); groups of 64 columns are `group_stride` bytes apart. For a
/// warp whose lanes all have the same address: see `uniform_descriptor`.
__device__ __forceinline__ uint64_t uniform_row_descriptor(uint32_t shared, uint32_t group_stride) {
    constexpr uint64_t SWIZZLE_128B = 1, ATOM_STRIDE = 1024 >> 4;
    return (SWIZZLE_128B << 62) | (ATOM_STRIDE << 32) | (uint64_t(group_stride >> 4) << 16) |
           ((__shfl_sync(0xFFFFFFFFu, shared, 0) >> 4) & 0x3FFF);
}

/// One instruction on N columns.
template <int N>
struct WgmmaRows;

#define MX_D8(i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define MX_D32(i) MX_D8(i), MX_D8(i + 8), MX_D8(i + 16), MX_D8(i + 24)

template <>
struct WgmmaRows<64> {
    static __device__ __forceinline__ void run(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
            "%13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
            "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
            : MX_D32(0)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
};

template <>
struct WgmmaRows<128> {
    static __device__ __forceinline__ void run(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
            "%13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, "
            "%35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, "
            "%57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
            : MX_D32(0), MX_D32(32)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
};

#undef MX_D32
#undef MX_D8

}  // namespace ptx

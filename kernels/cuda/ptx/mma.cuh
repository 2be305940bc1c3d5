// Warp-wide matrix multiply-accumulate (mma.sync) and the loads that feed it.
//
// For D[16, 8] += A[16, 16] * B[16, 8] with BF16 operands and FP32 accumulators, lane l = 4 g + t holds
//   a[0]: A[g][2t, 2t+1]    a[1]: A[g+8][2t, 2t+1]    a[2]: A[g][2t+8, 2t+9]    a[3]: A[g+8][2t+8, 2t+9]
//   b[0]: B[2t, 2t+1][g]    b[1]: B[2t+8, 2t+9][g]
//   d[0], d[1]: D[g][2t], D[g][2t+1]                  d[2], d[3]: D[g+8][2t], D[g+8][2t+1]
// An 8x8 matrix of 16-bit elements in registers is: lane 4 g + t holds [g][2t, 2t+1].
#pragma once

#include <cstdint>

namespace ptx {

/// D += A * B, as above.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Loads four 8x8 matrices of 16-bit elements: lane l gives the shared address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row)
                 : "memory");
}

/// As `load_matrices`, each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&m)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row)
                 : "memory");
}

/// An 8x8 matrix in registers, transposed.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t m) {
    uint32_t transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(m));
    return transposed;
}

}  // namespace ptx

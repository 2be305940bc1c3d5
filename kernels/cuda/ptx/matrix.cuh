// Warp-wide 8x8 matrix moves between registers and shared memory.
#pragma once

#include <cstdint>

namespace ptx {

/// Stores four 8x8 matrices of 16-bit elements, each transposed: lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices_transposed(uint32_t row, const uint32_t (&m)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(m[0]),
                 "r"(m[1]), "r"(m[2]), "r"(m[3])
                 : "memory");
}

}  // namespace ptx

// Products of many rows with weights in FP4.

#include "gemm/prefill_kernels.cuh"

PREFILL_PACKED(E2m1, prefill_e2m1)

// Each tile that is decoded to E4M3 is worth as many tokens as there are registers for.
PREFILL_KERNEL(prefill_e2m1_e4m3_256, gemm::PackedE4m3, 256, 1, 2)

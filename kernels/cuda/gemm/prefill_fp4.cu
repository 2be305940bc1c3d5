// Products of many rows with weights in FP4.

#include "gemm/prefill_kernels.cuh"

PREFILL_PACKED(E2m1, prefill_e2m1)

// Products of many rows with weights in FP6.

#include "gemm/prefill_kernels.cuh"

PREFILL_PACKED(E2m3, prefill_e2m3)
PREFILL_PACKED(E3m2, prefill_e3m2)

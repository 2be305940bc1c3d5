// Products of many rows with weights in FP8.

#include "gemm/prefill_kernels.cuh"

PREFILL_PACKED(E4m3, prefill_e4m3)
PREFILL_PACKED(E5m2, prefill_e5m2)

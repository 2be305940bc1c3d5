// Products of many rows with weights in INT8 and BF16.

#include "gemm/prefill_kernels.cuh"

PREFILL_PACKED(Int8, prefill_int8)
PREFILL_PACKED(Bf16, prefill_bf16)

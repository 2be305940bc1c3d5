// Products of many rows in E4M3, with weights that were expanded to it.

#include "gemm/prefill_kernels.cuh"

PREFILL_KERNEL(prefill_expanded_256, gemm::Expanded, 256, 1, 2)

// Products of many rows in E4M3, with weights that were expanded to it.

#include "gemm/prefill_kernels.cuh"

// As many tokens as there are registers for two sets of accumulators: the more, the less often shared memory is read.
PREFILL_KERNEL(prefill_expanded_192, gemm::Expanded, 192, 1, 2)

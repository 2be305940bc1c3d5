// Instantiations: `prefill_<format>_<tokens>`.
#pragma once

#include "gemm/prefill.cuh"

#define PREFILL_KERNEL(NAME, WEIGHTS, TOKENS, CLUSTER, GROUPS)              \
    extern "C" __global__ void __launch_bounds__(gemm::THREADS<GROUPS>, 1)  \
        NAME(const __grid_constant__ gemm::PrefillArgs args) {              \
        gemm::Prefill<WEIGHTS, TOKENS, CLUSTER, GROUPS>(args).run();        \
    }

#define PREFILL_PACKED(FORMAT, NAME)                                          \
    PREFILL_KERNEL(NAME##_64, gemm::Packed<tile::Format::FORMAT>, 64, 1, 4)   \
    PREFILL_KERNEL(NAME##_128, gemm::Packed<tile::Format::FORMAT>, 128, 1, 2) \
    PREFILL_KERNEL(NAME##_256, gemm::Packed<tile::Format::FORMAT>, 256, 2, 2)

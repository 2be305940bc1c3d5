// The copy engine: bulk copies and tensor-map (TMA) copies between global and shared memory.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace ptx {

/// L2 hints for bulk copies: the encodings that createpolicy gives for a fraction of 1.
constexpr uint64_t L2_EVICT_NORMAL = 0x1000000000000000;
constexpr uint64_t L2_EVICT_FIRST = 0x12F0000000000000;
constexpr uint64_t L2_EVICT_LAST = 0x14F0000000000000;

/// Copies `bytes` (a multiple of 16; both addresses 16-byte aligned) to shared memory and counts them at `barrier`.
__device__ __forceinline__ void bulk_load(
    uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier, uint64_t l2_hint) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], %4;" ::"r"(shared),
                 "l"(global), "r"(bytes), "r"(barrier), "l"(l2_hint)
                 : "memory");
}

/// Copies the box at column `x`, row `y` of a two-dimensional tensor map; what lies outside the tensor is zero.
__device__ __forceinline__ void tensor_load(
    uint32_t shared, const CUtensorMap* map, int x, int y, uint32_t barrier, uint64_t l2_hint) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared),
                 "l"(map), "r"(x), "r"(y), "r"(barrier), "l"(l2_hint)
                 : "memory");
}

/// As `tensor_load`, into the same place of every CTA of the cluster in `cta_mask`, each counting at its own barrier.
__device__ __forceinline__ void tensor_load_multicast(uint32_t shared, const CUtensorMap* map, int x, int y,
                                                      uint32_t barrier, uint16_t cta_mask, uint64_t l2_hint) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
        "[%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(shared),
        "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(cta_mask), "l"(l2_hint)
        : "memory");
}

}  // namespace ptx

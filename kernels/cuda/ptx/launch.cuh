// What a kernel says about its grid: dependent launch, clusters, registers per warpgroup.
#pragma once

#include <cstdint>

namespace ptx {

/// Waits until the kernels this one depends on are done and their writes are visible. Returns at once without
/// programmatic dependent launch.
__device__ __forceinline__ void wait_for_dependencies() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

/// Lets the next kernel of the stream start its independent part.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

/// Gives registers back until each thread of the warpgroup has `COUNT` (a multiple of 8).
template <int COUNT>
__device__ __forceinline__ void shrink_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

/// Waits for registers until each thread of the warpgroup has `COUNT` (a multiple of 8).
template <int COUNT>
__device__ __forceinline__ void grow_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/// Barrier among all threads of the cluster.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

}  // namespace ptx

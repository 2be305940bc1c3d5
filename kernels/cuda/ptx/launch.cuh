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

/// Whether this is the one lane of the (converged) warp that is chosen; known to be a single one by the compiler.
__device__ __forceinline__ bool elect_one() {
    uint32_t chosen;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xFFFFFFFF;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(chosen));
    return chosen != 0;
}

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/// Says that this thread has arrived at the cluster's barrier. Orders no memory accesses.
__device__ __forceinline__ void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}

/// Waits until all threads of the cluster have arrived.
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait;" ::: "memory"); }

/// The address at which this thread reaches `shared` of CTA `rank` of the cluster.
__device__ __forceinline__ uint32_t remote_address(uint32_t shared, uint32_t rank) {
    uint32_t remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared), "r"(rank));
    return remote;
}

/// Writes two values to another CTA's shared memory and counts their 8 bytes at a barrier there: both addresses are from
/// `remote_address`.
__device__ __forceinline__ void store_remote(uint32_t remote, float a, float b, uint32_t remote_barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(remote),
                 "f"(a), "f"(b), "r"(remote_barrier)
                 : "memory");
}

/// Barrier among all threads of the cluster.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

}  // namespace ptx

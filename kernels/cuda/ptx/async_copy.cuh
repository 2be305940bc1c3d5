// Copies from global to shared memory by a thread's own instructions (cp.async).
#pragma once

#include <cstdint>

namespace ptx {

/// Starts copying 16 bytes past L1; writes zeros instead where `present` is false. Both addresses are 16-byte aligned.
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global, bool present) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
                 "r"(present ? 16 : 0)
                 : "memory");
}

/// Starts copying 4 bytes. Both addresses are 4-byte aligned.
__device__ __forceinline__ void copy_word_async(uint32_t shared, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
}

/// Brings the cache line at `global` to L2.
__device__ __forceinline__ void prefetch_l2(const void* global) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

/// Closes the group of this thread's copies so far; it may be empty.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits until all but the newest `PENDING` groups of this thread have arrived.
template <int PENDING>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

/// Waits until all copies of this thread have arrived.
__device__ __forceinline__ void copy_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace ptx

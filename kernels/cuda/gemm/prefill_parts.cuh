// Products whose K is cut into parts: the CTAs of a block of results exchange their sums through memory, which stays in
// L2, and each adds up those of some tokens, in the order of K.
#pragma once

#include <cstdint>

#include "gemm/prefill_store.cuh"
#include "ptx/barrier.cuh"

namespace gemm {

/// Counts one arrival, of all that the CTA wrote before its last barrier, and waits for all of them. The last to come through
/// with what was exchanged sets the counter to zero: see `leave_parts`. One thread's release for all, and no fence: a fence
/// would be sequentially consistent, and each thread would wait for its own.
__device__ __forceinline__ void await_parts(uint32_t* arrivals, uint32_t parts) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrivals) : "memory");
    uint32_t seen;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrivals) : "memory");
    } while ((seen & 0xFFFF) != parts);
}

__device__ __forceinline__ void leave_parts(uint32_t* arrivals, uint32_t parts) {
    if (atomicAdd(arrivals, 0x10000) >> 16 == parts - 1) *arrivals = 0;
}

/// Adds up eights of tokens from `first` on, of all parts in order; all loads may be on their way at once.
template <int PARTS, int EIGHTS, int COUNT, int VALUES>
__device__ __forceinline__ void add_slice(const float4* first, float (&acc)[VALUES]) {
#pragma unroll
    for (int j = 0; j < EIGHTS / PARTS; ++j) {
        float4 sum = __ldcg(first + j * COUNT);
#pragma unroll
        for (int part = 1; part < PARTS; ++part) {
            const float4 next = __ldcg(first + (part * EIGHTS + j) * COUNT);
            sum.x += next.x, sum.y += next.y, sum.z += next.z, sum.w += next.w;
        }
        acc[4 * j] = sum.x, acc[4 * j + 1] = sum.y, acc[4 * j + 2] = sum.z, acc[4 * j + 3] = sum.w;
    }
}

/// The tokens of a block whose results are written where part `part` is computed.
template <int TOKENS>
__device__ __forceinline__ TokenRange tokens_of(uint32_t part, uint32_t parts) {
    return {part * (TOKENS / parts), TOKENS / parts};
}

/// Exchanges `acc`, the sums of part `part` of block `result`, for the sums of all parts (2, 4 or 8) for `tokens_of` the
/// part: `acc` has them from its start. For all threads of the GROUPS warpgroups that multiply.
template <int TOKENS, int GROUPS>
__device__ __forceinline__ void add_parts(const PrefillArgs& args, float (&acc)[TOKENS / 2], uint32_t result, uint32_t part,
                                          uint32_t barrier) {
    constexpr int EIGHTS = TOKENS / 8, COUNT = 128 * GROUPS;
    const uint32_t thread = threadIdx.x - 128, parts = args.parts;
    // A thread has four results of every eight tokens.
    float4* const all = args.partial_sums + size_t(result) * parts * EIGHTS * COUNT + thread;
    float4* const mine = all + part * EIGHTS * COUNT;
#pragma unroll
    for (int j = 0; j < EIGHTS; ++j) {
        __stcg(mine + j * COUNT, make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]));
    }
    ptx::named_barrier(barrier, COUNT);
    if (thread == 0) await_parts(args.arrivals + result, parts);
    ptx::named_barrier(barrier, COUNT);
    const uint32_t eights = EIGHTS / parts;
    const float4* const slice = all + part * eights * COUNT;
    if (parts == 2) {
        add_slice<2, EIGHTS, COUNT>(slice, acc);
    } else if (parts == 4) {
        add_slice<4, EIGHTS, COUNT>(slice, acc);
    } else {
        add_slice<8, EIGHTS, COUNT>(slice, acc);
    }
    ptx::named_barrier(barrier, COUNT);
    if (thread == 0) leave_parts(args.arrivals + result, parts);
}

}  // namespace gemm

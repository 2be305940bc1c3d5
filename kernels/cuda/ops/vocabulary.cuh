// Work over one row of logits by a cluster of CTAs: who looks at which tokens, and results that all of them get.
//
// Reductions are over integers, so that no order matters: a weight in [0, 1] counts in units of 2^-44, and the sum over
// 2^19 tokens fits 64 bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "ops/vector.cuh"
#include "ptx/barrier.cuh"
#include "ptx/launch.cuh"

namespace ops {

/// CTAs and threads that share a row.
constexpr int ROW_CTAS = 8, ROW_THREADS = 512, ROW_WARPS = ROW_THREADS / WARP;

/// A weight in [0, 1] as an integer.
__device__ __forceinline__ uint64_t fixed_point(float weight) {
    return __float2ull_rn(weight * 17592186044416.0f);
}

/// A number whose order as an integer is that of (logit, lower id first); 0 for NaN.
__device__ __forceinline__ uint64_t order_key(float x, int id) {
    if (x != x) return 0;
    const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 equals 0
    const uint32_t ordered = bits ^ (bits >> 31 != 0 ? 0xFFFFFFFFu : 0x80000000u);
    return static_cast<uint64_t>(ordered) << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(id));
}

__device__ __forceinline__ int key_id(uint64_t key) {
    return key == 0 ? 0 : static_cast<int>(0xFFFFFFFFu - static_cast<uint32_t>(key));
}

__device__ __forceinline__ float key_logit(uint64_t key) {
    const uint32_t ordered = static_cast<uint32_t>(key >> 32);
    return __uint_as_float(ordered ^ (ordered >> 31 != 0 ? 0x80000000u : 0xFFFFFFFFu));
}

struct Sum {
    static __device__ __forceinline__ uint64_t apply(uint64_t a, uint64_t b) { return a + b; }
};
struct Max {
    static __device__ __forceinline__ uint64_t apply(uint64_t a, uint64_t b) { return a > b ? a : b; }
};

/// Shared memory of a `RowCluster`.
template <int VALUES>
struct RowShared {
    uint64_t warps[ROW_WARPS][VALUES];
    /// What this CTA tells the others, in turns: a turn's values are read before the turn after the next is written.
    uint64_t published[2][VALUES];
};

/// The tokens of a thread: every 32nd of a warp's range; warps and CTAs have consecutive ranges.
struct TokenRange {
    /// Token ids of this CTA start at `first`; the warp's are `begin .. end`, counted from there.
    int first, begin, end;

    __device__ __forceinline__ TokenRange(int rank, int width) {
        const int cta = (width + ROW_CTAS - 1) / ROW_CTAS;
        first = min(rank * cta, width);
        const int tokens = min(cta, width - first);
        const int warp = (cta + ROW_THREADS - 1) / ROW_THREADS * WARP, index = threadIdx.x / WARP;
        begin = min(index * warp, tokens);
        end = min(begin + warp, tokens);
    }
};

/// The CTAs of a row.
template <int VALUES>
struct RowCluster {
    RowShared<VALUES>& shared;
    int rank, turn = 0;

    __device__ __forceinline__ explicit RowCluster(RowShared<VALUES>& s) : shared(s), rank(ptx::cluster_rank()) {}

    /// Replaces each value by its reduction over all threads of the cluster; `before` receives the reduction over the
    /// CTAs of lower rank.
    template <typename Operation, int COUNT>
    __device__ __forceinline__ void reduce(uint64_t (&values)[COUNT], uint64_t (&before)[COUNT]) {
        static_assert(COUNT <= VALUES, "shared memory holds every value");
        const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
#pragma unroll
            for (int step = WARP / 2; step > 0; step /= 2)
                values[i] = Operation::apply(values[i], __shfl_xor_sync(0xFFFFFFFFu, values[i], step));
            if (lane == 0) shared.warps[warp][i] = values[i];
        }
        __syncthreads();
        if (threadIdx.x < COUNT) {
            uint64_t value = shared.warps[0][threadIdx.x];
            for (int i = 1; i < ROW_WARPS; ++i) value = Operation::apply(value, shared.warps[i][threadIdx.x]);
            shared.published[turn][threadIdx.x] = value;
        }
        ptx::cluster_sync();
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const uint64_t other = lane < ROW_CTAS ? read_remote(&shared.published[turn][i], lane) : 0;
            values[i] = before[i] = 0;
#pragma unroll
            for (int cta = 0; cta < ROW_CTAS; ++cta) {
                if (cta == rank) before[i] = values[i];
                values[i] = Operation::apply(values[i], __shfl_sync(0xFFFFFFFFu, other, cta));
            }
        }
        turn ^= 1;
    }

    template <typename Operation, int COUNT>
    __device__ __forceinline__ void reduce(uint64_t (&values)[COUNT]) {
        uint64_t before[COUNT];
        reduce<Operation>(values, before);
    }

    template <typename Operation>
    __device__ __forceinline__ uint64_t reduce(uint64_t value) {
        uint64_t values[1] = {value};
        reduce<Operation>(values);
        return values[0];
    }

    /// `pointer` of CTA `cta`.
    static __device__ __forceinline__ uint64_t read_remote(const uint64_t* pointer, int cta) {
        uint64_t value;
        asm volatile("{\n.reg .b32 remote;\n"
                     "mapa.shared::cluster.u32 remote, %1, %2;\n"
                     "ld.shared::cluster.u64 %0, [remote];\n}"
                     : "=l"(value)
                     : "r"(ptx::shared_address(pointer)), "r"(cta)
                     : "memory");
        return value;
    }

    /// The largest key of the row: the largest logit, the lowest id among equals.
    __device__ __forceinline__ uint64_t largest(const float* row, const TokenRange& range, uint64_t below) {
        uint64_t best = 0;
#pragma unroll 8
        for (int i = range.begin + threadIdx.x % WARP; i < range.end; i += WARP) {
            const uint64_t key = order_key(row[range.first + i], range.first + i);
            if (key < below) best = Max::apply(best, key);
        }
        return reduce<Max>(best);
    }
};

}  // namespace ops

// What the attention kernels share: their arguments and the state of an online softmax.
//
// Scores are kept in units of log2: s = scale * log2(e) * (q . k), p = 2^(s - max).
#pragma once

#include <cuda_bf16.h>

#include <cmath>
#include <cstdint>

#include "mx/prepare.cuh"

namespace ops {

struct AttentionArguments {
    /// [rows, (q_heads + 2 kv_heads) * DIM]; only q is read.
    const __nv_bfloat16* qkv;
    const uint8_t* k_cache;
    const uint8_t* v_cache;
    /// [sequences + 1]
    const uint32_t* query_start;
    /// [sequences]: tokens in the cache, at least 1.
    const uint32_t* context_lens;
    /// [sequences, max_blocks]
    const uint32_t* block_tables;
    /// [rows, q_heads * DIM]
    __nv_bfloat16* out;
    /// scale * log2(e)
    float scale_log2;
    /// Positions a row sees, its own included; 0 for all.
    int window;
    int q_heads, kv_heads, max_blocks;
    /// What is done to `out` for the product that follows; nothing unless DIM is a multiple of 32.
    mx::Preparation preparation;
};

/// 2^x to about two units in the last place; 0 for -inf and what underflows, NaN for NaN.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// What is subtracted from scores: the maximum, unless all scores so far are -inf.
__device__ __forceinline__ float finite_max(float max) { return max == -INFINITY ? 0.0f : max; }

/// An unnormalized result over some keys: o = sum of p v, sum of p, and the maximum that p refers to.
struct Softmax {
    float max, sum;
};

}  // namespace ops

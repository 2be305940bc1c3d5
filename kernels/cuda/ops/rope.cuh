// Rotary embedding, together with norms of heads and the write to the KV cache, for any kind of cache.
#pragma once

#include "ops/kv.cuh"
#include "ops/vector.cuh"
#include "ptx/launch.cuh"

namespace ops {

struct RopeArguments {
    __nv_bfloat16* qkv;
    const float* rope;
    const float* q_norm;
    const float* k_norm;
    const uint32_t* slots;
    uint8_t* k_cache;
    uint8_t* v_cache;
    int q_heads, kv_heads;
    float eps;
};

/// Threads that hold one head, 16 elements each: a piece of the first half and its partner in the second.
template <int DIM>
constexpr int HEAD_THREADS = DIM <= 16 ? 1 : DIM <= 32 ? 2 : DIM <= 64 ? 4 : DIM <= 128 ? 8 : 16;

/// `Writer` puts keys and values into the cache.
template <int DIM, typename Writer>
__device__ __forceinline__ void rope_and_cache(const RopeArguments& a, const Writer& writer) {
    constexpr int HALF = DIM / 2, THREADS = HEAD_THREADS<DIM>;
    const int row = blockIdx.x, member = threadIdx.x % THREADS, at = member * VECTOR;
    const int heads = a.q_heads + 2 * a.kv_heads;
    __nv_bfloat16* heads_of_row = a.qkv + static_cast<size_t>(row) * heads * DIM;
    ptx::launch_dependents();
    ptx::wait_for_dependencies();
    const uint32_t slot = a.slots[row];
    const bool used = at < HALF;
    float cosine[VECTOR] = {}, sine[VECTOR] = {};
    if (used) {
        const float* table = a.rope + static_cast<size_t>(row) * DIM;
        load_vector(table + at, cosine);
        load_vector(table + HALF + at, sine);
    }
    // Whole warps take part in every round: the sums below are over lanes.
    const int rounds = (heads * THREADS + blockDim.x - 1) / blockDim.x;
    for (int round = 0; round < rounds; ++round) {
        const int head = (round * blockDim.x + threadIdx.x) / THREADS;
        const bool active = used && head < heads;
        float first[VECTOR] = {}, second[VECTOR] = {};
        __nv_bfloat16* p = heads_of_row + static_cast<size_t>(head) * DIM + at;
        if (active) {
            load_vector(p, first);
            load_vector(p + HALF, second);
        }
        if (a.q_norm != nullptr) {
            float squares = 0.0f;
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) squares = fmaf(first[i], first[i], fmaf(second[i], second[i], squares));
            const float scale = 1.0f / sqrtf(sum_lanes<THREADS>(squares) / static_cast<float>(DIM) + a.eps);
            if (active && head < a.q_heads + a.kv_heads) {
                const float* weight = head < a.q_heads ? a.q_norm : a.k_norm;
                float w[VECTOR];
                load_vector(weight + at, w);
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) first[i] *= scale * w[i];
                load_vector(weight + HALF + at, w);
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) second[i] *= scale * w[i];
            }
        }
        if (head < a.q_heads + a.kv_heads) {
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                const float x = first[i], y = second[i];
                first[i] = x * cosine[i] - y * sine[i];
                second[i] = y * cosine[i] + x * sine[i];
            }
        }
        const auto largest = writer.largest(first, second);
        if (!active) continue;
        if (head >= a.q_heads) {
            const bool is_key = head < a.q_heads + a.kv_heads;
            const int kv_head = head - a.q_heads - (is_key ? 0 : a.kv_heads);
            uint8_t* block = (is_key ? a.k_cache : a.v_cache) + Writer::offset(slot / BLOCK_TOKENS, kv_head, a.kv_heads);
            writer.write(block, slot % BLOCK_TOKENS, at, first, second, largest);
            continue;
        }
        store_vector(p, first);
        store_vector(p + HALF, second);
    }
}

}  // namespace ops

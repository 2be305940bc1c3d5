// Rotary embedding: the table of a step, and its application together with head norms and the write to the KV cache.
#include "ops/kv.cuh"
#include "ops/vector.cuh"
#include "ptx/launch.cuh"

/// out[m] = factor * [cos(p f_0) .. cos(p f_{d-1}) | sin(p f_0) .. ], p = positions[m], f = inv_freq F32 [d]; F32
/// [rows, 2 d]. Grid: rows.
extern "C" __global__ void __launch_bounds__(256)
    ops_rope_table(const uint32_t* positions, const float* inv_freq, float* out, int half, float factor) {
    ptx::wait_for_dependencies();
    ptx::launch_dependents();
    float* row = out + static_cast<size_t>(blockIdx.x) * 2 * half;
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        // The angle is an F32 product, as in the reference; its turns are counted in F64, so that large positions lose
        // nothing, and sincospi has nothing left to reduce.
        const float angle = static_cast<float>(positions[blockIdx.x]) * inv_freq[i];
        const double half_turns = static_cast<double>(angle) * 0.318309886183790671538;
        const double rest = half_turns - 2.0 * rint(0.5 * half_turns);
        float sine, cosine;
        sincospif(static_cast<float>(rest), &sine, &cosine);
        row[i] = cosine * factor;
        row[half + i] = sine * factor;
    }
}

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

template <int DIM>
__device__ __forceinline__ void rope_and_cache(const RopeArguments& a) {
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
        if (!active) continue;
        if (head < a.q_heads + a.kv_heads) {
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                const float x = first[i], y = second[i];
                first[i] = x * cosine[i] - y * sine[i];
                second[i] = y * cosine[i] + x * sine[i];
            }
        }
        if (head >= a.q_heads) {
            const bool is_key = head < a.q_heads + a.kv_heads;
            const int kv_head = head - a.q_heads - (is_key ? 0 : a.kv_heads);
            uint8_t* block = (is_key ? a.k_cache : a.v_cache) + block_offset<DIM>(slot / BLOCK_TOKENS, kv_head, a.kv_heads);
            const int token = slot % BLOCK_TOKENS;
            store_vector(reinterpret_cast<__nv_bfloat16*>(block + piece_offset<DIM>(token, member)), first);
            store_vector(reinterpret_cast<__nv_bfloat16*>(block + piece_offset<DIM>(token, member + HALF / 8)), second);
            continue;
        }
        store_vector(p, first);
        store_vector(p + HALF, second);
    }
}

}  // namespace ops

/// Norms (if `q_norm` is given) and rotates q and k of `qkv` [rows, (q_heads + 2 kv_heads) * DIM], q in place; k and v go
/// to `slots` of the cache. `rope` is the table above, [rows, DIM]; norm weights are F32 [DIM]. Grid: rows.
#define OPS_ROPE(DIM)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(512) ops_rope_and_cache_##DIM(                                       \
        __nv_bfloat16* qkv, const float* rope, const float* q_norm, const float* k_norm, const uint32_t* slots,       \
        uint8_t* k_cache, uint8_t* v_cache, int q_heads, int kv_heads, float eps) {                       \
        ops::rope_and_cache<DIM>({qkv, rope, q_norm, k_norm, slots, k_cache, v_cache, q_heads, kv_heads, eps});       \
    }

OPS_ROPE(16)
OPS_ROPE(32)
OPS_ROPE(64)
OPS_ROPE(96)
OPS_ROPE(128)
OPS_ROPE(256)

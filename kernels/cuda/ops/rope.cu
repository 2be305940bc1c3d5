// Rotary embedding: the table of a step, and its application with a BF16 cache.
#include "ops/rope.cuh"

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

/// Writes keys and values in BF16.
template <int DIM>
struct Bf16Writer {
    struct Nothing {};

    __device__ __forceinline__ Nothing largest(const float (&)[VECTOR], const float (&)[VECTOR]) const { return {}; }

    static __device__ __forceinline__ size_t offset(uint32_t block, int head, int kv_heads) {
        return block_offset<DIM>(block, head, kv_heads);
    }

    /// Elements `at .. at + 8` of a token, and as many half a head on.
    __device__ __forceinline__ void write(uint8_t* block, int token, int at, const float (&first)[VECTOR],
                                          const float (&second)[VECTOR], Nothing) const {
        const int piece = at / VECTOR;
        store_vector(reinterpret_cast<__nv_bfloat16*>(block + piece_offset<DIM>(token, piece)), first);
        store_vector(reinterpret_cast<__nv_bfloat16*>(block + piece_offset<DIM>(token, piece + DIM / 16)), second);
    }
};

}  // namespace ops

/// Norms (if `q_norm` is given) and rotates q and k of `qkv` [rows, (q_heads + 2 kv_heads) * DIM], q in place; k and v go
/// to `slots` of the cache. `rope` is the table above, [rows, DIM]; norm weights are F32 [DIM]. Grid: rows.
#define OPS_ROPE(DIM)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(512) ops_rope_and_cache_##DIM(                                       \
        __nv_bfloat16* qkv, const float* rope, const float* q_norm, const float* k_norm, const uint32_t* slots,       \
        uint8_t* k_cache, uint8_t* v_cache, int q_heads, int kv_heads, float eps) {                       \
        const ops::RopeArguments a = {qkv,     rope,    q_norm,  k_norm,   slots,                                        \
                                      k_cache, v_cache, q_heads, kv_heads, eps};                                       \
        ops::rope_and_cache<DIM>(a, ops::Bf16Writer<DIM>{});                                                          \
    }

OPS_ROPE(16)
OPS_ROPE(32)
OPS_ROPE(64)
OPS_ROPE(96)
OPS_ROPE(128)
OPS_ROPE(256)

// Rotary embedding with a cache in MX: keys and values are quantized as they are written.
#include "ops/kv_mx.cuh"
#include "ops/rope.cuh"

namespace ops {

/// Writes keys and values in MX. A thread has eight elements of each half of a head: a block of 32 is in four threads, the
/// only one of heads of 32 elements in two.
template <KvFormat FORMAT, int DIM>
struct MxWriter {
    using Block = MxKvBlock<FORMAT, DIM>;
    static_assert(DIM == 32 || DIM / 2 % mx::BLOCK == 0, "a half is whole blocks");

    mx::MxGrid grid;

    /// The largest magnitudes, as F32 bits, of the blocks that the two halves' elements belong to.
    struct Largest {
        uint32_t first, second;
    };

    /// To be called by whole warps.
    __device__ __forceinline__ Largest largest(const float (&first)[VECTOR], const float (&second)[VECTOR]) const {
        uint32_t a = 0, b = 0;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            // As integers: NaN is above all numbers.
            a = max(a, __float_as_uint(fabsf(first[i])));
            b = max(b, __float_as_uint(fabsf(second[i])));
        }
        if constexpr (DIM == 32) a = b = max(a, b);
#pragma unroll
        for (int step = 1; step < (DIM == 32 ? 2 : 4); step *= 2) {
            a = max(a, __shfl_xor_sync(0xFFFFFFFFu, a, step));
            b = max(b, __shfl_xor_sync(0xFFFFFFFFu, b, step));
        }
        return {a, b};
    }

    static __device__ __forceinline__ size_t offset(uint32_t block, int head, int kv_heads) {
        return Block::offset(block, head, kv_heads);
    }

    /// Elements `at .. at + 8` of a token, and as many half a head on.
    __device__ __forceinline__ void write(uint8_t* block, int token, int at, const float (&first)[VECTOR],
                                          const float (&second)[VECTOR], Largest amax) const {
        Block::store(block, token, at, first, grid, amax.first);
        Block::store(block, token, at + DIM / 2, second, grid, amax.second);
    }
};

}  // namespace ops

/// As in rope.cu; `grid` is the format's.
#define OPS_ROPE(NAME, FORMAT, DIM)                                                                                   \
    extern "C" __global__ void __launch_bounds__(512) ops_rope_and_cache_##NAME##_##DIM(                              \
        __nv_bfloat16* qkv, const float* rope, const float* q_norm, const float* k_norm, const uint32_t* slots,       \
        uint8_t* k_cache, uint8_t* v_cache, int q_heads, int kv_heads, float eps,                                     \
        const __grid_constant__ mx::MxGrid grid) {                                                                    \
        const ops::RopeArguments a = {qkv,     rope,    q_norm,  k_norm,   slots,                                     \
                                      k_cache, v_cache, q_heads, kv_heads, eps};                                      \
        ops::rope_and_cache<DIM>(a, ops::MxWriter<ops::KvFormat::FORMAT, DIM>{grid});                                 \
    }

OPS_ROPE(mxfp8, Mxfp8, 32)
OPS_ROPE(mxfp8, Mxfp8, 64)
OPS_ROPE(mxfp8, Mxfp8, 128)
OPS_ROPE(mxfp8, Mxfp8, 256)
OPS_ROPE(mxint8, Mxint8, 32)
OPS_ROPE(mxint8, Mxint8, 64)
OPS_ROPE(mxint8, Mxint8, 128)
OPS_ROPE(mxint8, Mxint8, 256)
OPS_ROPE(mxfp4, Mxfp4, 64)
OPS_ROPE(mxfp4, Mxfp4, 128)
OPS_ROPE(mxfp4, Mxfp4, 256)

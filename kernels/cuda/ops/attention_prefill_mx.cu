// Prefill attention by mma.sync over a cache in MX: for head dimensions without a wgmma kernel.
#include "ops/attention_prefill.cuh"
#include "ops/kv_mx.cuh"

namespace ops {

/// The cache in MX, as PrefillAttention reads it: codes come to registers and go to shared memory as BF16.
template <KvFormat FORMAT, int DIMENSION>
struct MxPieces {
    static constexpr int DIM = DIMENSION;
    /// Elements times this are the values.
    static constexpr float UNIT = KV_UNIT;

    static __device__ __forceinline__ size_t offset(uint32_t block, int head, int kv_heads) {
        return MxKvBlock<FORMAT, DIM>::offset(block, head, kv_heads);
    }

    /// Brings eight elements of a token to `shared`; zeros if not `present`.
    static __device__ __forceinline__ void load(uint32_t shared, const uint8_t* block, int token, int piece,
                                                bool present) {
        uint4 x = {};
        if (present) {
            typename MxKvBlock<FORMAT, DIM>::Piece stored;
            stored.load(block, token, piece);
            x = stored.decode();
        }
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                     : "memory");
    }
};

}  // namespace ops

/// As in attention_prefill.cu.
#define OPS_ATTENTION_PREFILL(NAME, FORMAT, DIM)                                                      \
    extern "C" __global__ void __launch_bounds__(128) ops_attention_prefill_##NAME##_##DIM(           \
        const __grid_constant__ ops::AttentionArguments a, int sequences) {                           \
        ops::PrefillAttention<ops::MxPieces<ops::KvFormat::FORMAT, DIM>>::run(a, sequences);          \
    }

OPS_ATTENTION_PREFILL(mxfp8, Mxfp8, 32)
OPS_ATTENTION_PREFILL(mxfp8, Mxfp8, 256)
OPS_ATTENTION_PREFILL(mxint8, Mxint8, 32)
OPS_ATTENTION_PREFILL(mxint8, Mxint8, 256)
OPS_ATTENTION_PREFILL(mxfp4, Mxfp4, 256)

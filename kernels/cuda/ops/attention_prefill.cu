// Prefill attention by mma.sync over a BF16 cache: for head dimensions without a wgmma kernel.
#include "ops/attention_prefill.cuh"

namespace ops {

/// The cache in BF16, as PrefillAttention reads it.
template <int DIMENSION>
struct Bf16Pieces {
    static constexpr int DIM = DIMENSION;
    /// Elements times this are the values.
    static constexpr float UNIT = 1.0f;

    static __device__ __forceinline__ size_t offset(uint32_t block, int head, int kv_heads) {
        return block_offset<DIM>(block, head, kv_heads);
    }

    /// Starts bringing eight elements of a token to `shared`; zeros if not `present`.
    static __device__ __forceinline__ void load(uint32_t shared, const uint8_t* block, int token, int piece,
                                                bool present) {
        ptx::copy_async(shared, block + piece_offset<DIM>(token, piece), present);
    }
};

}  // namespace ops

/// Rows of sequences that have more than one. Grid: (q_heads, at least as many tiles of 64 rows as the sequences have).
/// Block: 128. Shared: 64 * DIM * 2 bytes for each of queries, two stages of keys and two of values.
#define OPS_ATTENTION_PREFILL(DIM)                                                                    \
    extern "C" __global__ void __launch_bounds__(128)                                                 \
        ops_attention_prefill_##DIM(const __grid_constant__ ops::AttentionArguments a, int sequences) { \
        ops::PrefillAttention<ops::Bf16Pieces<DIM>>::run(a, sequences);                               \
    }

OPS_ATTENTION_PREFILL(16)
OPS_ATTENTION_PREFILL(32)
OPS_ATTENTION_PREFILL(96)
OPS_ATTENTION_PREFILL(256)

// Decode attention over a BF16 cache.
#include "ops/attention_decode.cuh"

namespace ops {

/// A block of the cache in BF16, as DecodeAttention reads it.
template <int DIMENSION>
struct Bf16Cache {
    static constexpr int DIM = DIMENSION, PIECES = DIM / 8, STEPS = DIM / 16;
    static constexpr int BYTES = BLOCK_BYTES<DIM>, STAGES = 2;
    /// Elements times this are the values.
    static constexpr float UNIT = 1.0f;

    /// This lane's elements of head lane / 4, as `scores` multiplies them; zeros where there is no such head.
    static __device__ __forceinline__ void load_queries(uint32_t (&q)[STEPS][2], const __nv_bfloat16* head, bool present) {
        const uint32_t* words = reinterpret_cast<const uint32_t*>(head) + threadIdx.x % 4;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            q[step][0] = present ? words[step * 8] : 0;
            q[step][1] = present ? words[step * 8 + 4] : 0;
        }
    }

    /// Scores of 16 keys (rows lane / 4 and + 8) for two heads (columns 2 (lane % 4) and + 1).
    static __device__ __forceinline__ void scores(float (&s)[4], const uint8_t* keys, const uint32_t (&q)[STEPS][2]) {
        const int lane = threadIdx.x % WARP;
        const uint32_t from = ptx::shared_address(keys);
        float odd[4] = {};
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            uint32_t k[4];
            ptx::load_matrices(k, from + piece_offset<DIM>(lane % 16, step * 2 + lane / 16));
            ptx::mma_bf16(step % 2 == 0 ? s : odd, k, q[step][0], q[step][1]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) s[i] += odd[i];
    }

    /// Adds the values of 16 tokens times their weights.
    static __device__ __forceinline__ void add_values(float (&o)[STEPS][4], const uint8_t* values, uint32_t p0,
                                                      uint32_t p1) {
        const int lane = threadIdx.x % WARP;
        const uint32_t from = ptx::shared_address(values);
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            uint32_t v[4];
            const int token = lane % 8 + lane / 16 * 8, piece = step * 2 + lane / 8 % 2;
            ptx::load_matrices_transposed(v, from + piece_offset<DIM>(token, piece));
            ptx::mma_bf16(o[step], v, p0, p1);
        }
    }

    /// Clears the values of tokens outside `from .. to`: they get no weight, and zero times NaN is NaN.
    static __device__ __forceinline__ void clear_values(uint8_t* values, int from, int to) {
        for (int i = threadIdx.x % WARP; i < BLOCK_TOKENS * PIECES; i += WARP) {
            const int token = i / PIECES;
            if (token >= from && token < to) continue;
            *reinterpret_cast<uint4*>(values + piece_offset<DIM>(token, i % PIECES)) = uint4{};
        }
        // The copy engine writes here next.
        ptx::fence_proxy_async();
        __syncwarp();
    }

    /// Puts the two elements that lane group `group` has of a step into a head's row of results.
    static __device__ __forceinline__ void put(float* row, int step, int group, float first, float second) {
        row[step * 16 + group] = first;
        row[step * 16 + group + 8] = second;
    }

    /// Which element of the head such a row has at `at`.
    static __device__ __forceinline__ int element(int at) { return at; }
};

}  // namespace ops

/// Rows of sequences that have exactly one. Grid: any number of CTAs, best as many as run at a time. Block: 160. Shared:
/// the stages of four warps, and their results.
#define OPS_ATTENTION_DECODE(DIM, CTAS_PER_SM)                                                                   \
    extern "C" __global__ void __launch_bounds__(160, CTAS_PER_SM) ops_attention_decode_##DIM(                    \
        const __grid_constant__ ops::AttentionArguments a, const __grid_constant__ ops::DecodeSplit split) {      \
        ops::DecodeAttention<ops::Bf16Cache<DIM>>::run(a, split);                                                \
    }

OPS_ATTENTION_DECODE(16, 3)
OPS_ATTENTION_DECODE(32, 3)
OPS_ATTENTION_DECODE(64, 3)
OPS_ATTENTION_DECODE(96, 3)
OPS_ATTENTION_DECODE(128, 3)
OPS_ATTENTION_DECODE(256, 1)

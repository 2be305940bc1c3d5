// Decode attention over a cache in MX: codes become BF16 in registers, on their way from shared memory to the products.
//
// What a product sums over has no order of its own, so lanes take what lies together: for the scores, lane 4 g + t has a
// quarter of the dimensions, from t DIM / 4 on, of tokens g and g + 8; for the values, an eighth of the dimensions, from
// g DIM / 8 on, of tokens 2 t, 2 t + 1, 2 t + 8 and 2 t + 9.
#include "ops/attention_decode.cuh"
#include "ops/kv_mx.cuh"

namespace ops {

/// A block of the cache in MX, as DecodeAttention reads it.
template <KvFormat FORMAT, int DIMENSION>
struct MxCache {
    using Codec = KvCodec<FORMAT>;
    using Block = MxKvBlock<FORMAT, DIMENSION>;
    static constexpr int DIM = DIMENSION, STEPS = DIM / 16, PAIRS = Codec::PAIRS;
    static constexpr int BYTES = Block::BYTES, STAGES = 4;
    /// Words of a lane.
    static constexpr int KEY_WORDS = Block::WORDS / 4, VALUE_WORDS = Block::WORDS / 8;
    /// Words of values that are loaded at a time.
    static constexpr int PART_WORDS = FORMAT == KvFormat::Mxfp4 || VALUE_WORDS == 1 ? 1 : 2;
    static_assert(VALUE_WORDS >= 1, "a lane has a word of values at least");
    /// Elements times this are the values.
    static constexpr float UNIT = KV_UNIT;

    /// This lane's elements of head lane / 4, as `scores` multiplies them; zeros where there is no such head.
    static __device__ __forceinline__ void load_queries(uint32_t (&q)[STEPS][2], const __nv_bfloat16* head, bool present) {
        const uint2* words = reinterpret_cast<const uint2*>(head + threadIdx.x % 4 * (DIM / 4));
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const uint2 pairs = present ? words[step] : uint2{};
            q[step][0] = pairs.x, q[step][1] = pairs.y;
        }
    }

    /// The multiplier of a token's block of 32 for both halves of a pair.
    static __device__ __forceinline__ uint32_t multiplier(const uint8_t* block, int token, int scale) {
        return block[Block::scale_offset(token, scale)] * 0x00800080u;
    }

    static __device__ __forceinline__ uint32_t multiply(uint32_t pair, uint32_t multipliers) {
        return tile::as_bits(__hmul2_rn(tile::as_pair(pair), tile::as_pair(multipliers)));
    }

    /// Scores of 16 keys (rows lane / 4 and + 8) for two heads (columns 2 (lane % 4) and + 1).
    static __device__ __forceinline__ void scores(float (&s)[4], const uint8_t* keys, const uint32_t (&q)[STEPS][2]) {
        const int token = threadIdx.x % WARP / 4, first = threadIdx.x % 4 * KEY_WORDS;
        constexpr int WORDS_OF_SCALE = mx::BLOCK / Codec::ELEMENTS;
        uint32_t low[KEY_WORDS], high[KEY_WORDS];
        Block::load(low, keys, token, first);
        Block::load(high, keys, token + 8, first);
        uint32_t low_scale = 0, high_scale = 0;
#pragma unroll
        for (int word = 0; word < KEY_WORDS; ++word) {
            if (word % WORDS_OF_SCALE == 0) {
                low_scale = multiplier(keys, token, (first + word) / WORDS_OF_SCALE);
                high_scale = multiplier(keys, token + 8, (first + word) / WORDS_OF_SCALE);
            }
            uint32_t low_pairs[PAIRS], high_pairs[PAIRS];
            Codec::unpack(low_pairs, low[word]);
            Codec::unpack(high_pairs, high[word]);
#pragma unroll
            for (int pair = 0; pair < PAIRS; pair += 2) {
                const int step = (word * PAIRS + pair) / 2;
                const uint32_t k[4] = {
                    multiply(low_pairs[pair], low_scale), multiply(high_pairs[pair], high_scale),
                    multiply(low_pairs[pair + 1], low_scale), multiply(high_pairs[pair + 1], high_scale)};
                ptx::mma_bf16(s, k, q[step][0], q[step][1]);
            }
        }
    }

    /// Adds the values of 16 tokens times their weights.
    static __device__ __forceinline__ void add_values(float (&o)[STEPS][4], const uint8_t* values, uint32_t p0,
                                                      uint32_t p1) {
        const int group = threadIdx.x % WARP / 4, token = threadIdx.x % 4 * 2, first = group * VALUE_WORDS;
        uint32_t scales[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            scales[i] = values[Block::scale_offset(token + i % 2 + i / 2 * 8, first * Codec::ELEMENTS / mx::BLOCK)];
        const uint32_t near = scales[0] << 7 | scales[1] << 23, far = scales[2] << 7 | scales[3] << 23;
#pragma unroll
        for (int part = 0; part < VALUE_WORDS; part += PART_WORDS) {
            uint32_t words[4][PART_WORDS];
#pragma unroll
            for (int i = 0; i < 4; ++i) Block::load(words[i], values, token + i % 2 + i / 2 * 8, first + part);
#pragma unroll
            for (int word = 0; word < PART_WORDS; ++word) {
                // The lower halves of two tokens' words are pairs of even elements, the upper ones of odd elements.
                uint32_t near_even[PAIRS], near_odd[PAIRS], far_even[PAIRS], far_odd[PAIRS];
                Codec::unpack(near_even, __byte_perm(words[0][word], words[1][word], 0x5410));
                Codec::unpack(near_odd, __byte_perm(words[0][word], words[1][word], 0x7632));
                Codec::unpack(far_even, __byte_perm(words[2][word], words[3][word], 0x5410));
                Codec::unpack(far_odd, __byte_perm(words[2][word], words[3][word], 0x7632));
#pragma unroll
                for (int pair = 0; pair < PAIRS; ++pair) {
                    const uint32_t v[4] = {multiply(near_even[pair], near), multiply(near_odd[pair], near),
                                           multiply(far_even[pair], far), multiply(far_odd[pair], far)};
                    ptx::mma_bf16(o[(part + word) * PAIRS + pair], v, p0, p1);
                }
            }
            // Keeps the loads of the next part here: registers are short.
            asm volatile("" ::: "memory");
        }
    }

    /// Makes zeros of the values of tokens outside `from .. to`: they get no weight, and zero times NaN is NaN.
    static __device__ __forceinline__ void clear_values(uint8_t* values, int from, int to) {
        for (int i = threadIdx.x % WARP; i < BLOCK_TOKENS * Block::SCALES; i += WARP) {
            const int token = i / Block::SCALES;
            if (token < from || token >= to) values[Block::CODE_BYTES + i] = 0;
        }
        // The copy engine writes here next.
        ptx::fence_proxy_async();
        __syncwarp();
    }

    /// Puts the two elements that lane group `group` has of a step into a head's row of results: elements
    /// `group DIM / 8 + 2 step` and the next one, where other groups' lie beside them.
    static __device__ __forceinline__ void put(float* row, int step, int group, float first, float second) {
        *reinterpret_cast<float2*>(row + step * 16 + group * 2) = make_float2(first, second);
    }

    /// Which element of the head such a row has at `at`, if even; the next one is beside it.
    static __device__ __forceinline__ int element(int at) { return at % 16 / 2 * (DIM / 8) + at / 16 * 2; }
};

}  // namespace ops

/// As in attention_decode.cu.
#define OPS_ATTENTION_DECODE(NAME, FORMAT, DIM, CTAS_PER_SM)                                                     \
    extern "C" __global__ void __launch_bounds__(160, CTAS_PER_SM) ops_attention_decode_##NAME##_##DIM(           \
        const __grid_constant__ ops::AttentionArguments a, const __grid_constant__ ops::DecodeSplit split) {      \
        ops::DecodeAttention<ops::MxCache<ops::KvFormat::FORMAT, DIM>>::run(a, split);                           \
    }

OPS_ATTENTION_DECODE(mxfp8, Mxfp8, 32, 3)
OPS_ATTENTION_DECODE(mxfp8, Mxfp8, 64, 3)
OPS_ATTENTION_DECODE(mxfp8, Mxfp8, 128, 3)
OPS_ATTENTION_DECODE(mxfp8, Mxfp8, 256, 1)
OPS_ATTENTION_DECODE(mxint8, Mxint8, 32, 3)
OPS_ATTENTION_DECODE(mxint8, Mxint8, 64, 3)
OPS_ATTENTION_DECODE(mxint8, Mxint8, 128, 3)
OPS_ATTENTION_DECODE(mxint8, Mxint8, 256, 1)
OPS_ATTENTION_DECODE(mxfp4, Mxfp4, 64, 3)
OPS_ATTENTION_DECODE(mxfp4, Mxfp4, 128, 3)
OPS_ATTENTION_DECODE(mxfp4, Mxfp4, 256, 1)

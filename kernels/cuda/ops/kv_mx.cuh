// The paged KV cache in MX: blocks of 32 elements along the head dimension with a scale each.
//
// As in BF16 (kv.cuh), a block of the cache is 16 tokens of one head, contiguous: [16 tokens, DIM codes], then the scales,
// [16 tokens, DIM / 32]. Codes are packed in words of 32 bits, 4 or 8 elements each, whose lower half holds the
// even elements and whose upper half the odd ones: BF16 pairs come out by a few moves of bits, as do pairs of the same
// element of two tokens if halves of their words are put together. The 16-byte pieces of a token's codes are permuted so
// that eight tokens have a piece on different banks.
//
// A scale is stored as the exponent field of the BF16 number that turns moved codes into 2^-32 of their values: both
// ends of what a cache holds fit, and whoever reads multiplies by 2^32 where it costs nothing. 0 is a block of zeros, also one
// whose scale is below 2^-60; 255 makes every element NaN: a block with NaN, infinity, or a scale beyond 2^33.
#pragma once

#include <cstdint>

#include "mx/quantize.cuh"
#include "mx/tile.cuh"
#include "ops/kv.cuh"

namespace ops {

enum class KvFormat { Mxfp8, Mxint8, Mxfp4 };

/// Elements in BF16 times this are the values; and the scale byte below which blocks are zeros (2^-60).
constexpr float KV_UNIT = 0x1p32f;
constexpr uint32_t SMALLEST_KV_SCALE = 67, LARGEST_KV_SCALE = 160;

__host__ __device__ constexpr int kv_bits(KvFormat format) { return format == KvFormat::Mxfp4 ? 4 : 8; }

/// What is added to an E8M0 scale to get the exponent field of the multiplier.
__host__ __device__ constexpr int kv_scale_offset(KvFormat format) {
    return format == KvFormat::Mxfp8 ? 120 - 32 : format == KvFormat::Mxfp4 ? 126 - 32 : -6 - 32;
}

template <KvFormat FORMAT>
struct KvCodec {
    static constexpr int BITS = kv_bits(FORMAT);
    /// Of a word: elements, and BF16 pairs.
    static constexpr int ELEMENTS = 32 / BITS, PAIRS = ELEMENTS / 2;

    /// Elements 2 p (lower half) and 2 p + 1 of a word as pair p, to be multiplied by the block's multiplier.
    static __device__ __forceinline__ void unpack(uint32_t (&pairs)[PAIRS], uint32_t x) {
        using tile::both;
        if constexpr (FORMAT == KvFormat::Mxfp8) {
            pairs[0] = x & both(0x87F0);
            pairs[1] = ((x << 4) & both(0x80F0)) | ((x >> 4) & both(0x0700));
        } else if constexpr (FORMAT == KvFormat::Mxint8) {
            // (128 + low seven bits) - (128, or 256 where the sign bit is set).
            pairs[0] = tile::add((x & both(0x007F)) | both(0x4300), (x & both(0x0080)) | both(0xC300));
            pairs[1] = tile::add(((x >> 8) & both(0x007F)) | both(0x4300), ((x >> 8) & both(0x0080)) | both(0xC300));
        } else {
            pairs[0] = x & both(0x81C0);
            pairs[1] = ((x >> 6) & both(0x01C0)) | ((x << 10) & both(0x8000));
            pairs[2] = (x << 4) & both(0x81C0);
            pairs[3] = ((x << 6) & both(0x80C0)) | ((x >> 2) & both(0x0100));
        }
    }

    /// Where `unpack` puts the bits of an element of this value (a value of the format, in units of the scale).
    static __device__ __forceinline__ uint32_t place(float value) {
        if constexpr (FORMAT == KvFormat::Mxint8) return uint32_t(__float2int_rn(value * 64.0f)) & 0xFF;
        // With the format's exponent bias instead of F32's, subnormals are where they are in the code.
        constexpr bool IS_FP8 = FORMAT == KvFormat::Mxfp8;
        const uint32_t magnitude = __float_as_uint(fabsf(value) * (IS_FP8 ? 0x1p-120f : 0x1p-126f));
        const uint32_t sign = __float_as_uint(value) >> 16 & 0x8000;
        return sign | (IS_FP8 ? magnitude >> 20 << 4 : magnitude >> 22 << 6);
    }

    /// The word of these elements.
    static __device__ __forceinline__ uint32_t pack(const float* values) {
        using tile::both;
        uint32_t pairs[PAIRS];
#pragma unroll
        for (int p = 0; p < PAIRS; ++p) pairs[p] = place(values[2 * p]) | place(values[2 * p + 1]) << 16;
        if constexpr (FORMAT == KvFormat::Mxfp8) {
            return pairs[0] | (pairs[1] & both(0x80F0)) >> 4 | (pairs[1] & both(0x0700)) << 4;
        } else if constexpr (FORMAT == KvFormat::Mxint8) {
            return pairs[0] | pairs[1] << 8;
        } else {
            return pairs[0] | (pairs[1] & both(0x01C0)) << 6 | (pairs[1] & both(0x8000)) >> 10 | pairs[2] >> 4 |
                   (pairs[3] & both(0x80C0)) >> 6 | (pairs[3] & both(0x0100)) << 2;
        }
    }

    /// The stored byte of an E8M0 scale.
    static __device__ __forceinline__ uint32_t stored_scale(uint32_t scale) {
        constexpr int OFFSET = kv_scale_offset(FORMAT);
        if (scale > LARGEST_KV_SCALE) return 255;
        return scale < SMALLEST_KV_SCALE ? 0 : static_cast<uint32_t>(static_cast<int>(scale) + OFFSET);
    }
};

/// A block of the cache of one head.
template <KvFormat FORMAT, int DIM>
struct MxKvBlock {
    static constexpr int TOKEN_BYTES = DIM * kv_bits(FORMAT) / 8, CODE_BYTES = BLOCK_TOKENS * TOKEN_BYTES;
    static constexpr int SCALES = DIM / mx::BLOCK, BYTES = CODE_BYTES + BLOCK_TOKENS * SCALES;
    static constexpr int WORDS = TOKEN_BYTES / 4, PIECES = TOKEN_BYTES / 16;
    static_assert(PIECES >= 1 && BYTES % 16 == 0, "bulk copies are of whole 16 bytes");

    /// Where the block of `head` starts in the cache, in bytes.
    static __device__ __forceinline__ size_t offset(uint32_t block, int head, int kv_heads) {
        return (static_cast<size_t>(block) * kv_heads + head) * BYTES;
    }

    /// Where a piece of a token's codes is in the block, in bytes.
    static __device__ __forceinline__ int piece_offset(int token, int piece) {
        const int swizzle = PIECES % 8 == 0   ? token & 7
                            : PIECES % 4 == 0 ? (token >> 1) & 3
                            : PIECES % 2 == 0 ? (token >> 2) & 1
                                              : 0;
        return token * TOKEN_BYTES + (piece ^ swizzle) * 16;
    }

    static __device__ __forceinline__ int word_offset(int token, int word) {
        return piece_offset(token, word / 4) + word % 4 * 4;
    }

    static __device__ __forceinline__ int scale_offset(int token, int scale) { return CODE_BYTES + token * SCALES + scale; }

    /// `COUNT` words of a token from `first` on, a multiple of `COUNT` at most 4.
    template <int COUNT>
    static __device__ __forceinline__ void load(uint32_t (&words)[COUNT], const uint8_t* block, int token, int first) {
        if constexpr (COUNT % 4 == 0) {
#pragma unroll
            for (int i = 0; i < COUNT; i += 4) {
                const uint4 quad = *reinterpret_cast<const uint4*>(block + piece_offset(token, (first + i) / 4));
                words[i] = quad.x, words[i + 1] = quad.y, words[i + 2] = quad.z, words[i + 3] = quad.w;
            }
        } else if constexpr (COUNT == 2) {
            const uint2 pair = *reinterpret_cast<const uint2*>(block + word_offset(token, first));
            words[0] = pair.x, words[1] = pair.y;
        } else {
            static_assert(COUNT == 1, "one, two, or whole pieces");
            words[0] = *reinterpret_cast<const uint32_t*>(block + word_offset(token, first));
        }
    }

    /// Words that hold eight elements, and their block's scale.
    struct Piece {
        uint32_t words[8 / KvCodec<FORMAT>::ELEMENTS], scale;

        /// Elements 8 `index` .. 8 `index` + 7 of a token.
        __device__ __forceinline__ void load(const uint8_t* block, int token, int index) {
            MxKvBlock::load(words, block, token, index * (8 / KvCodec<FORMAT>::ELEMENTS));
            scale = block[scale_offset(token, index / (mx::BLOCK / 8))];
        }

        /// In BF16, a 2^32nd of their values.
        __device__ __forceinline__ uint4 decode() const {
            using Codec = KvCodec<FORMAT>;
            const __nv_bfloat162 multiplier = tile::as_pair(scale * 0x00800080u);
            uint32_t pairs[4];
#pragma unroll
            for (int i = 0; i < 8 / Codec::ELEMENTS; ++i) {
                uint32_t moved[Codec::PAIRS];
                Codec::unpack(moved, words[i]);
#pragma unroll
                for (int p = 0; p < Codec::PAIRS; ++p)
                    pairs[i * Codec::PAIRS + p] = tile::as_bits(__hmul2_rn(tile::as_pair(moved[p]), multiplier));
            }
            return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
    };

    /// Quantizes eight elements of a token, `at` (a multiple of 8) and on, whose block of 32 has the largest magnitude
    /// `amax` (F32 bits), and writes their codes; the thread of the first eight of the block writes its scale.
    static __device__ __forceinline__ void store(uint8_t* block, int token, int at, const float (&x)[8],
                                                 const mx::MxGrid& grid, uint32_t amax) {
        using Codec = KvCodec<FORMAT>;
        const uint32_t scale = mx::shared_scale(grid, amax), stored = Codec::stored_scale(scale);
        // Codes of a block that is NaN are zeros: any other times infinity would be infinity.
        const bool is_number = stored != 0 && stored != 255;
        const float reciprocal = is_number ? mx::scale_reciprocal(scale) : 0.0f;
        float values[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] = is_number ? mx::nearest(grid, x[i] * reciprocal) : 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i += Codec::ELEMENTS)
            *reinterpret_cast<uint32_t*>(block + word_offset(token, (at + i) / Codec::ELEMENTS)) = Codec::pack(values + i);
        if (at % mx::BLOCK == 0) block[scale_offset(token, at / mx::BLOCK)] = static_cast<uint8_t>(stored);
    }
};

}  // namespace ops

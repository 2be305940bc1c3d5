// One lane's part of a weight tile -> BF16 A fragments of mma.sync.m16n8k16 (layout: src/tile/mod.rs; the moves of bits:
// src/tile/format.rs; its reference decode in src/tile/decode.rs is this code in Rust).
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace tile {

constexpr int ROWS = 16, COLS = 64, STEPS = 4, SCALE_BYTES = 32;

enum class Format { E2m1, E2m3, E3m2, E4m3, E5m2, Int8, Bf16 };

/// Bits of a stored element.
__host__ __device__ constexpr int bits(Format format) {
    return format == Format::E2m1                               ? 4
           : format == Format::E2m3 || format == Format::E3m2 ? 6
           : format == Format::Bf16                             ? 16
                                                                : 8;
}

__host__ __device__ constexpr int code_bytes(Format format) { return ROWS * COLS * bits(format) / 8; }

__host__ __device__ constexpr int bytes(Format format) {
    return code_bytes(format) + (format == Format::Bf16 ? 0 : SCALE_BYTES);
}

/// The scale byte of a block at its row's largest scale: the exponent field of the BF16 multiplier. 0 is a zero block.
__host__ __device__ constexpr int unit_exponent(Format format) {
    return format == Format::E2m1 || format == Format::E2m3 ? 253
           : format == Format::E3m2                           ? 251
           : format == Format::E4m3                           ? 247
           : format == Format::E5m2                           ? 239
           : format == Format::Int8                           ? 121
                                                              : 0;
}

__device__ __forceinline__ __nv_bfloat162 as_pair(uint32_t bits) { return reinterpret_cast<__nv_bfloat162&>(bits); }

__device__ __forceinline__ uint32_t as_bits(__nv_bfloat162 pair) { return reinterpret_cast<uint32_t&>(pair); }

/// The BF16 pair `a` times the lower half of `b`; keeps subnormals.
__device__ __forceinline__ uint32_t multiply_low(uint32_t a, uint32_t b) {
    return as_bits(__hmul2_rn(as_pair(a), __low2bfloat162(as_pair(b))));
}

/// The BF16 pair `a` times the upper half of `b`; keeps subnormals.
__device__ __forceinline__ uint32_t multiply_high(uint32_t a, uint32_t b) {
    return as_bits(__hmul2_rn(as_pair(a), __high2bfloat162(as_pair(b))));
}

/// `a + b` of BF16 pairs.
__device__ __forceinline__ uint32_t add(uint32_t a, uint32_t b) { return as_bits(__hadd2_rn(as_pair(a), as_pair(b))); }

__device__ __forceinline__ uint32_t rotate_right(uint32_t x, int by) { return __funnelshift_r(x, x, by); }

/// The 16-bit `mask` for both halves.
__host__ __device__ constexpr uint32_t both(uint32_t mask) { return mask * 0x00010001u; }

/// The BF16 multipliers of a lane's rows g (lower half) and g + 8 (upper half) in block `BLOCK` of a tile; `scales` is
/// word g of the tile's scales.
template <int BLOCK>
__device__ __forceinline__ uint32_t multipliers(uint32_t scales) {
    return BLOCK == 0 ? (scales & both(0x00FF)) << 7 : (scales >> 1) & both(0x7F80);
}

/// The codes of one step of 16 columns as BF16 pairs, not yet multiplied. `words` are the lane's words of the step;
/// `upper` is the FP6 word with two bits of each code, `ODD` whether the step is odd.
template <Format FORMAT, bool ODD>
__device__ __forceinline__ void move_bits(uint32_t (&a)[4], const uint32_t* words, uint32_t upper) {
    const uint32_t x = words[0];
    if constexpr (FORMAT == Format::E2m1) {
        a[0] = x & both(0x81C0);
        a[1] = rotate_right(x, 6) & both(0x81C0);
        a[2] = (x << 4) & both(0x81C0);
        a[3] = ((x << 6) & both(0x80C0)) | ((x >> 2) & both(0x0100));
    } else if constexpr (FORMAT == Format::E2m3) {
        constexpr int FIRST = ODD ? 8 : 0;
        a[0] = (x & both(0x00F0)) | (rotate_right(upper, FIRST) & both(0x8100));
        a[1] = ((x << 4) & both(0x00F0)) | (rotate_right(upper, FIRST + 2) & both(0x8100));
        a[2] = ((x >> 4) & both(0x00F0)) | (rotate_right(upper, FIRST + 4) & both(0x8100));
        a[3] = ((x >> 8) & both(0x00F0)) | (rotate_right(upper, FIRST + 6) & both(0x8100));
    } else if constexpr (FORMAT == Format::E3m2) {
        constexpr int FIRST = ODD ? 8 : 0;
        a[0] = (x & both(0x01E0)) | (rotate_right(upper, FIRST) & both(0x8200));
        a[1] = ((x << 4) & both(0x01E0)) | (rotate_right(upper, FIRST + 3) & both(0x8200));
        a[2] = ((x >> 4) & both(0x01E0)) | (rotate_right(upper, FIRST + 4) & both(0x8200));
        a[3] = (rotate_right(x, 8) & both(0x01E0)) | (rotate_right(upper, FIRST + 7) & both(0x8200));
    } else if constexpr (FORMAT == Format::E4m3) {
        const uint32_t y = words[1];
        a[0] = x & both(0x87F0);
        a[1] = ((x << 4) & both(0x80F0)) | ((x >> 4) & both(0x0700));
        a[2] = y & both(0x87F0);
        a[3] = ((y << 4) & both(0x80F0)) | ((y >> 4) & both(0x0700));
    } else if constexpr (FORMAT == Format::E5m2) {
        const uint32_t y = words[1];
        a[0] = x & both(0x8FE0);
        a[1] = (rotate_right(x, 24) & both(0x0F60)) | ((x << 3) & both(0x8080));
        a[2] = y & both(0x8FE0);
        a[3] = (rotate_right(y, 24) & both(0x0F60)) | ((y << 3) & both(0x8080));
    } else if constexpr (FORMAT == Format::Int8) {
        // (128 + low seven bits) - (128, or 256 where the sign bit is set).
        const uint32_t y = words[1];
        a[0] = add((x & both(0x007F)) | both(0x4300), (x & both(0x0080)) | both(0xC300));
        a[1] = add(((x >> 8) & both(0x007F)) | both(0x4300), ((x >> 8) & both(0x0080)) | both(0xC300));
        a[2] = add((y & both(0x007F)) | both(0x4300), (y & both(0x0080)) | both(0xC300));
        a[3] = add(((y >> 8) & both(0x007F)) | both(0x4300), ((y >> 8) & both(0x0080)) | both(0xC300));
    } else {
        a[0] = x, a[1] = words[1], a[2] = words[2], a[3] = words[3];
    }
}

/// A lane's part of a tile, as stored.
template <Format FORMAT>
struct Lane {
    static constexpr int WORDS = bits(FORMAT);
    /// Words of a step, FP6's upper bits not counted.
    static constexpr int STEP_WORDS = bits(FORMAT) < 8 ? 1 : bits(FORMAT) / 4;

    uint32_t words[WORDS];
    uint32_t scales;

    /// Reads lane `lane` of the tile at `tile`, in shared or global memory, 16-byte aligned.
    __device__ __forceinline__ void load(const uint8_t* tile, int lane) {
        const uint4* quads = reinterpret_cast<const uint4*>(tile) + lane;
#pragma unroll
        for (int i = 0; i < WORDS / 4; ++i) {
            const uint4 quad = quads[32 * i];
            words[4 * i] = quad.x, words[4 * i + 1] = quad.y, words[4 * i + 2] = quad.z, words[4 * i + 3] = quad.w;
        }
        if constexpr (bits(FORMAT) == 6) {
            const uint2 upper = reinterpret_cast<const uint2*>(tile + 512)[lane];
            words[4] = upper.x, words[5] = upper.y;
        }
        if constexpr (FORMAT != Format::Bf16) {
            scales = reinterpret_cast<const uint32_t*>(tile + code_bytes(FORMAT))[lane / 4];
        }
    }

    /// The A fragment of step `STEP`, not yet multiplied by the multipliers of its blocks.
    template <int STEP>
    __device__ __forceinline__ void raw_fragment(uint32_t (&a)[4]) const {
        const uint32_t upper = bits(FORMAT) == 6 ? words[bits(FORMAT) == 6 ? 4 + STEP / 2 : 0] : 0;
        move_bits<FORMAT, STEP % 2 == 1>(a, words + STEP * STEP_WORDS, upper);
    }

    /// The A fragment of step `STEP`, each row relative to its largest scale.
    template <int STEP>
    __device__ __forceinline__ void fragment(uint32_t (&a)[4]) const {
        raw_fragment<STEP>(a);
        if constexpr (FORMAT != Format::Bf16) {
            const uint32_t rows = multipliers<STEP / 2>(scales);
            a[0] = multiply_low(a[0], rows), a[1] = multiply_high(a[1], rows);
            a[2] = multiply_low(a[2], rows), a[3] = multiply_high(a[3], rows);
        }
    }
};

}  // namespace tile

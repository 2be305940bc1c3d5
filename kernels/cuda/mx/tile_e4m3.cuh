// One lane's part of an FP4 weight tile -> E4M3 A fragments of wgmma.m64nNk32, each row relative to its largest scale.
//
// Eight magnitudes times a power of two are eight bytes, from which one instruction picks four: the table has those bytes for
// each distance of a block from its row's largest scale. Signs are moved past it. The order along K is that of
// `mx::lane_order`.
#pragma once

#include <cstdint>

#include "mx/tile.cuh"

namespace tile {

/// The table: eight bytes for each value of the lower five bits of a scale byte, of which 0 is a zero block.
constexpr int E4M3_TABLE_BYTES = 32 * 8;
/// log2 of what weights are multiplied with on their way to E4M3: the largest FP4 number, 6, becomes 384. The host divides
/// results by it (`E4m3Weights` in src/cuda/gemm/prefill.rs).
constexpr int E2M1_SHIFT = 6;

/// Thread `i` of 32 writes entry `i` of the table at the shared address `table`, a multiple of its size.
__device__ __forceinline__ void fill_e4m3_table(uint32_t table, uint32_t i) {
    constexpr float MAGNITUDES[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
    const int distance = int(unit_exponent(Format::E2m1) % 32) - int(i);
    const float scale = i == 0 || distance < 0 ? 0.0f : __uint_as_float(uint32_t(127 + E2M1_SHIFT - distance) << 23);
    uint32_t words[2] = {};
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        uint16_t pair;
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
            : "=h"(pair)
            : "f"(MAGNITUDES[j + 1] * scale), "f"(MAGNITUDES[j] * scale));
        words[j / 4] |= uint32_t(pair) << (j % 4 * 8);
    }
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(table + 8 * i), "r"(words[0]), "r"(words[1]) : "memory");
}

// Instructions that the compiler would not choose itself: it takes three where two do, and masks selectors.

/// The bits of `a` where `MASK` has ones, those of `b` elsewhere.
template <uint32_t MASK>
__device__ __forceinline__ uint32_t select(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(d) : "r"(a), "r"(b), "n"(MASK));
    return d;
}

/// The bits of `a` where `MASK` has ones, and those of `b`.
template <uint32_t MASK>
__device__ __forceinline__ uint32_t mask_or(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xF8;" : "=r"(d) : "r"(b), "r"(a), "n"(MASK));
    return d;
}

/// Four of the eight bytes of `low` and `high`, by the four lower nibbles of `selector`, each below 8.
__device__ __forceinline__ uint32_t pick(uint32_t low, uint32_t high, uint32_t selector) {
    uint32_t d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(low), "r"(high), "r"(selector));
    return d;
}

/// The entry of the table at `table` for the scale byte at bit `SHIFT` of `scales`.
template <int SHIFT>
__device__ __forceinline__ uint2 e4m3_entry(uint32_t table, uint32_t scales) {
    const uint32_t at = mask_or<0xF8>(SHIFT == 0 ? scales << 3 : scales >> (SHIFT - 3), table);
    uint2 entry;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(entry.x), "=r"(entry.y) : "r"(at));
    return entry;
}

/// The A fragment of block `BLOCK` of the tile: its steps x and y.
template <int BLOCK>
__device__ __forceinline__ void e4m3_fragment(const Lane<Format::E2m1>& lane, uint32_t table, uint32_t (&a)[4]) {
    // Where the bits are: the moves of E2m1 in tile.cuh. Of rows g, magnitudes of a half are in bits 2 .. 4 and 6 .. 8, signs in
    // bits 11 and 15; of rows g + 8, in 0, 1, 10 and 12 .. 14, and in 9 and, of the other half, 5.
    const uint32_t x = lane.words[2 * BLOCK], y = lane.words[2 * BLOCK + 1];
    const uint32_t x_by_2 = x >> 2, y_by_2 = y >> 2;
    const uint2 upper = e4m3_entry<8 * BLOCK>(table, lane.scales), lower = e4m3_entry<16 + 8 * BLOCK>(table, lane.scales);
    const uint32_t upper_codes = __byte_perm(x_by_2, y_by_2, 0x6420) & 0x77777777u;
    a[0] = mask_or<0x80808080u>(select<0x80008000u>(x, x >> 4), pick(upper.x, upper.y, upper_codes));
    a[2] = mask_or<0x80808080u>(select<0x80008000u>(y, y >> 4), pick(upper.x, upper.y, upper_codes >> 16));
    const uint32_t lower_codes =
        __byte_perm(select<0x00030003u>(x, x >> 8), select<0x00030003u>(y, y >> 8), 0x6420) & 0x77777777u;
    a[1] = mask_or<0x80808080u>(select<0x80008000u>(rotate_right(x, 6), x_by_2), pick(lower.x, lower.y, lower_codes));
    a[3] = mask_or<0x80808080u>(select<0x80008000u>(rotate_right(y, 6), y_by_2), pick(lower.x, lower.y, lower_codes >> 16));
}

}  // namespace tile

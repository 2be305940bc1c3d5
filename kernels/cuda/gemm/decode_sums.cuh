// What a warp of decode.cuh adds up over its part of a row of tiles.
//
// Weights multiply as their bits are: not yet times the scale of their block, which would be a multiplication for each
// pair of them. The sum over a block of 32 is multiplied by it instead. Tiles are counted in fours: the blocks of those with
// the same place among four neighbours have one sum, to which they are added in their order; the four sums are added up in
// the end as a tree. Both kinds of sums here keep to that order, so that a result is the same by either.
#pragma once

#include <cstdint>

#include "mx/tile.cuh"
#include "ptx/mma.cuh"

namespace decode {

/// Tiles whose blocks have sums of their own.
constexpr int GROUP_TILES = 4;

/// Weights as their bits are stand for 2^-126 (FP4) to 2^-112 (E5M2) of themselves: x is multiplied by 2^56 first, so that
/// what tensor cores add up is nowhere near the ends of F32's range; results by its inverse. With x beyond 2^71 they
/// overflow.
template <tile::Format FORMAT>
constexpr int X_EXPONENT = FORMAT == tile::Format::Int8 || FORMAT == tile::Format::Bf16 ? 0 : 56;

/// The multiplier of a block: byte `AT` of the word of scales of row g, which are rows g and g, then g + 8 and g + 8.
template <tile::Format FORMAT, int AT>
__device__ __forceinline__ float multiplier(uint32_t scales) {
    if constexpr (FORMAT == tile::Format::Bf16) return 1.0f;
    const uint32_t exponent = AT == 3 ? scales >> 1 : scales << (23 - 8 * (AT % 4));
    return __uint_as_float(exponent & 0x7F800000u);
}

/// As `ptx::load_matrices`, from memory that nobody writes any more: other accesses may move across it.
__device__ __forceinline__ void load_constant_matrices(uint32_t (&m)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row));
}

/// Sums of up to 8 N tokens, a column of the tensor core's result for each.
template <tile::Format FORMAT, int N>
struct Sums {
    static constexpr int TILES = N, TILE_BYTES = tile::bytes(FORMAT);

    /// Of tiles with the same place in their groups.
    float places[GROUP_TILES][N][4] = {};
    uint32_t x[N];

    /// Where a lane finds x: token l % 8 of eight, columns 8 (l / 8) and on. Tokens beyond M are some others again: what comes
    /// out for them is not written.
    static __device__ __forceinline__ uint32_t x_place(int lane, int j, int m, int x_stride) {
        return (8 * j + lane % 8) % m * x_stride + lane / 8 * 16;
    }

    /// From now on `multiply` is about the group of tiles whose x is `offset` bytes from `first`.
    __device__ __forceinline__ void begin(const uint32_t (&first)[N], uint32_t offset) {
#pragma unroll
        for (int j = 0; j < N; ++j) x[j] = first[j] + offset;
    }

    /// Multiplies tile number `AT` of the group. Its two blocks are two chains of dependent products, which overlap.
    template <int AT>
    __device__ __forceinline__ void multiply(const uint8_t* tile, int lane) {
        tile::Lane<FORMAT> weights;
        weights.load(tile, lane);
        uint32_t a[4], b[2][N][4];
        float sums[2][N][4] = {};
#pragma unroll
        for (int j = 0; j < N; ++j) {
            load_constant_matrices(b[0][j], x[j] + AT * 128);
            load_constant_matrices(b[1][j], x[j] + AT * 128 + 64);
        }
        weights.template raw_fragment<0>(a);
#pragma unroll
        for (int j = 0; j < N; ++j) ptx::mma_bf16(sums[0][j], a, b[0][j][0], b[0][j][1]);
        weights.template raw_fragment<2>(a);
#pragma unroll
        for (int j = 0; j < N; ++j) ptx::mma_bf16(sums[1][j], a, b[1][j][0], b[1][j][1]);
        weights.template raw_fragment<1>(a);
#pragma unroll
        for (int j = 0; j < N; ++j) ptx::mma_bf16(sums[0][j], a, b[0][j][2], b[0][j][3]);
        weights.template raw_fragment<3>(a);
#pragma unroll
        for (int j = 0; j < N; ++j) ptx::mma_bf16(sums[1][j], a, b[1][j][2], b[1][j][3]);
        const float by[2][2] = {{multiplier<FORMAT, 0>(weights.scales), multiplier<FORMAT, 2>(weights.scales)},
                                {multiplier<FORMAT, 1>(weights.scales), multiplier<FORMAT, 3>(weights.scales)}};
#pragma unroll
        for (int block = 0; block < 2; ++block) {
#pragma unroll
            for (int j = 0; j < N; ++j) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float& sum = places[AT][j][i];
                    sum = fmaf(sums[block][j][i], by[block][i / 2], sum);
                }
            }
        }
    }

    __device__ __forceinline__ void end() {}

    /// The sums over all blocks, as the tensor core would leave them.
    __device__ __forceinline__ void total(float (&sums)[N][4]) const {
#pragma unroll
        for (int j = 0; j < N; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                sums[j][i] = (places[0][j][i] + places[1][j][i]) + (places[2][j][i] + places[3][j][i]);
            }
        }
    }
};

/// Sums of one token. The tensor core's eight columns are its x at eight neighbouring blocks: of what the weights of a block
/// give with all of them, the column of that block is wanted. A lane has two columns, of the two blocks of one tile, so that
/// it keeps the sums of that tile alone.
template <tile::Format FORMAT>
struct OneTokenSums {
    static constexpr int TILE_BYTES = tile::bytes(FORMAT);

    /// Of rows g and g + 8 and tiles number t of their groups.
    float rows[2] = {};
    uint32_t x[4];
    /// What the group added to them, not yet times the scales.
    float chosen[4];
    uint32_t scales;

    /// Where a lane finds x: block l % 8 of eight, columns 8 (l / 8) and on.
    static __device__ __forceinline__ uint32_t x_place(int lane) { return lane % 8 * 64 + lane / 8 * 16; }

    /// From now on `multiply` is about the group of tiles whose x is at `place`.
    __device__ __forceinline__ void begin(uint32_t place) {
        load_constant_matrices(x, place);
        // A group may have fewer tiles.
#pragma unroll
        for (int i = 0; i < 4; ++i) chosen[i] = 0.0f;
        scales = 0;
    }

    template <int AT>
    __device__ __forceinline__ void multiply(const uint8_t* tile, int lane) {
        tile::Lane<FORMAT> weights;
        weights.load(tile, lane);
        uint32_t a[4];
        float sums[2][4] = {};
        weights.template raw_fragment<0>(a);
        ptx::mma_bf16(sums[0], a, x[0], x[1]);
        weights.template raw_fragment<2>(a);
        ptx::mma_bf16(sums[1], a, x[0], x[1]);
        weights.template raw_fragment<1>(a);
        ptx::mma_bf16(sums[0], a, x[2], x[3]);
        weights.template raw_fragment<3>(a);
        ptx::mma_bf16(sums[1], a, x[2], x[3]);
        const bool mine = lane % 4 == AT;
        chosen[0] = mine ? sums[0][0] : chosen[0];
        chosen[1] = mine ? sums[1][1] : chosen[1];
        chosen[2] = mine ? sums[0][2] : chosen[2];
        chosen[3] = mine ? sums[1][3] : chosen[3];
        if constexpr (FORMAT != tile::Format::Bf16) scales = mine ? weights.scales : scales;
    }

    __device__ __forceinline__ void end() {
        rows[0] = fmaf(chosen[0], multiplier<FORMAT, 0>(scales), rows[0]);
        rows[0] = fmaf(chosen[1], multiplier<FORMAT, 1>(scales), rows[0]);
        rows[1] = fmaf(chosen[2], multiplier<FORMAT, 2>(scales), rows[1]);
        rows[1] = fmaf(chosen[3], multiplier<FORMAT, 3>(scales), rows[1]);
    }

    /// The sums over all blocks, of rows g and g + 8.
    __device__ __forceinline__ float2 total() const {
        float2 all = make_float2(rows[0], rows[1]);
#pragma unroll
        for (int distance = 1; distance <= 2; distance *= 2) {
            all.x += __shfl_xor_sync(0xFFFFFFFFu, all.x, distance);
            all.y += __shfl_xor_sync(0xFFFFFFFFu, all.y, distance);
        }
        return all;
    }
};

}  // namespace decode

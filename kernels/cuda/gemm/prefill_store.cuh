// What a product of many rows takes, and the end of it: sums to results in their place.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

#include "mx/prepare.cuh"
#include "mx/tile.cuh"
#include "ops/swiglu.cuh"
#include "ops/vector.cuh"
#include "ptx/barrier.cuh"
#include "ptx/matrix.cuh"

namespace gemm {

/// Mirrored on the host: keep the order of the fields.
struct PrefillArgs {
    /// `[M, K]`, box of 128 bytes along K by TOKENS / CLUSTER rows, 128-byte swizzle, zero outside.
    CUtensorMap x;
    /// Weight tiles, `[row_tiles, k_tiles]`.
    const uint8_t* tiles;
    /// Factor of each row of W, in the order of tiles.
    const float* row_factors;
    /// Factor of each token, `[M]`, of E4M3 x; BF16 has none.
    const float* token_factors;
    /// `[N]` or null.
    const float* bias;
    /// First element of the result's first column.
    void* out;
    /// Elements from one row of `out` to the next.
    uint64_t out_stride;
    /// Factor of all results.
    float factor;
    uint32_t m, n, row_tiles, k_tiles;
    /// Number of the first of `tiles` in W: a launch may compute some columns of the result only.
    uint32_t first_row_tile;
    /// 0 if tiles have the rows of W in order. Otherwise N / 2: rows g and g + 8 of tile i are rows 8i + g of either half.
    uint32_t paired_half;
    /// Blocks of tokens whose rows of X are to stay in L2 while W streams past them.
    uint32_t group;
    /// Whether `out` is F32, not BF16.
    uint32_t is_f32;
    /// Whether BF16 rows of `out` allow 16-byte stores.
    uint32_t aligned;
    /// With `paired_half`: the two rows are gate and up of one result, silu(gate) * up, BF16.
    uint32_t is_gated;
    /// Parts that K is cut into: 1, 2, 4 or 8. With more than one, all CTAs of the grid run at once, and have one at most.
    uint32_t parts;
    /// What is done to results of `is_gated`, of which N / 2 is then a multiple of 32, for the product that follows.
    mx::Preparation preparation;
    /// Sums of parts, F32 [result][part][64 GROUPS x TOKENS]; and for each result how many are there, zero between launches.
    float4* partial_sums;
    uint32_t* arrivals;
};

constexpr int TILE_ROWS = tile::ROWS;
/// Tokens of a block that a CTA writes.
struct TokenRange {
    uint32_t first, count;
};

/// Tokens that a warpgroup stages at once on their way out, 64 results of two bytes each.
constexpr int STAGED_TOKENS = 64, STAGING_BYTES = STAGED_TOKENS * 64 * 2;
/// Named barriers, one per warpgroup.
constexpr uint32_t STAGING_BARRIER = 1;

/// Columns of the result that eight rows of a tile are: as many of eight as are before `end`.
struct Columns {
    uint32_t first, end;
};

/// Those of rows 8 * `h` and on of the launch's tile `row_tile`; none beyond the last tile.
__device__ __forceinline__ Columns columns_of(const PrefillArgs& args, uint32_t row_tile, uint32_t h) {
    const uint32_t tile = args.first_row_tile + row_tile, half = args.paired_half;
    if (row_tile >= args.row_tiles) return {0, 0};
    if (half == 0) return {tile * TILE_ROWS + 8 * h, args.n};
    return {tile * 8 + h * half, h == 0 ? half : args.n};
}

/// Where the eight results number `eight` of a token are staged by the calling warpgroup: the 64 results of a token are
/// 128 bytes, whose eights are permuted by the token, so that neither way has bank conflicts.
__device__ __forceinline__ uint32_t staging_place(uint32_t staging, uint32_t token, uint32_t eight) {
    return staging + (threadIdx.x / 128 - 1) * STAGING_BYTES + token * 128 + (eight ^ token % 8) * 16;
}

__device__ __forceinline__ uint4 load_staged(uint32_t place) {
    uint4 results;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(results.x), "=r"(results.y), "=r"(results.z), "=r"(results.w)
                 : "r"(place)
                 : "memory");
    return results;
}

/// Writes those of eight results that are in `columns`, to `to` and on.
__device__ __forceinline__ void write_eight(const PrefillArgs& args, __nv_bfloat16* to, uint4 results, Columns columns) {
    if (args.aligned && columns.first + 8 <= columns.end) {
        *reinterpret_cast<uint4*>(to) = results;
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const uint32_t word = i < 2 ? results.x : i < 4 ? results.y : i < 6 ? results.z : results.w;
        if (columns.first + i < columns.end) {
            reinterpret_cast<uint16_t*>(to)[i] = uint16_t(i % 2 == 0 ? word : word >> 16);
        }
    }
}

/// Eight results, prepared: four lanes have a block.
__device__ __forceinline__ uint4 prepare_eight(const mx::Preparation& preparation, uint4 results) {
    float v[8];
    ops::unpack_bf16(results.x, v[0], v[1]);
    ops::unpack_bf16(results.y, v[2], v[3]);
    ops::unpack_bf16(results.z, v[4], v[5]);
    ops::unpack_bf16(results.w, v[6], v[7]);
    mx::prepare<mx::SideBySide<8>>(preparation, v, 0xFFFFFFFFu);
    return make_uint4(ops::pack_bf16(v[0], v[1]), ops::pack_bf16(v[2], v[3]), ops::pack_bf16(v[4], v[5]),
                      ops::pack_bf16(v[6], v[7]));
}

/// Writes the 32 results of each of STAGED_TOKENS tokens that a warpgroup has of a gated product: eight of each of its
/// four tiles. `value(j, i)` is the calling thread's for token 8 j + 2 (lane % 4) + i.
template <typename IsWritten, typename Value>
__device__ __forceinline__ void store_gated(const PrefillArgs& args, uint32_t staging, uint32_t group_tile,
                                            uint32_t chunk_token, IsWritten is_written, Value value) {
    const uint32_t thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, group = threadIdx.x / 128 - 1;
    ptx::named_barrier(STAGING_BARRIER + group, 128);
#pragma unroll
    for (int j = 0; j < STAGED_TOKENS / 8; j += 4) {
        uint32_t m[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            const __nv_bfloat162 pair = __floats2bfloat162_rn(value(j + q, 0), value(j + q, 1));
            m[q] = reinterpret_cast<const uint32_t&>(pair);
        }
        ptx::store_matrices_transposed(staging_place(staging, 8 * j + lane, warp), m);
    }
    ptx::named_barrier(STAGING_BARRIER + group, 128);
    // Four lanes write the results of a token.
    const uint32_t eight = thread % 4, tile = group_tile + eight;
    const uint32_t first = (args.first_row_tile + tile) * 8;
    const Columns columns = {first, tile < args.row_tiles ? args.paired_half : 0};
#pragma unroll
    for (int pass = 0; pass < STAGED_TOKENS / 32; ++pass) {
        const uint32_t local = pass * 32 + thread / 4, token = chunk_token + local;
        uint4 results = load_staged(staging_place(staging, local, eight));
        if (args.preparation.is_needed()) results = prepare_eight(args.preparation, results);
        if (!is_written(token) || columns.first >= columns.end) continue;
        write_eight(args, static_cast<__nv_bfloat16*>(args.out) + token * args.out_stride + first, results, columns);
    }
}

/// What the calling thread's results are multiplied by, besides `args.factor`, and what is added to them: rows g and g + 8 of
/// its warp's tile.
struct RowTerms {
    float factor[2], bias[2];

    /// Those of the block that begins at `block_row`. Nobody writes them while kernels run: to be asked for before the sums are
    /// computed, or else the results wait for memory.
    __device__ __forceinline__ RowTerms(const PrefillArgs& args, uint32_t block_row) : factor{}, bias{} {
        const uint32_t warp = threadIdx.x / 32 - 4, g = threadIdx.x % 32 / 4;
        // Tiles count from the first of this launch, rows from the first of W.
        const uint32_t tile = block_row / TILE_ROWS + warp, row = (args.first_row_tile + tile) * TILE_ROWS + g;
        if (tile >= args.row_tiles) return;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const Columns columns = columns_of(args, tile, h);
            factor[h] = args.row_factors[row + 8 * h];
            if (args.bias != nullptr && columns.first + g < columns.end) bias[h] = args.bias[columns.first + g];
        }
    }
};

/// What the results of TOKENS tokens are multiplied by, or nothing: lane l of every warp has the factors of tokens l, l + 32
/// and so on. To be asked for as early as RowTerms, if there are registers for them.
template <int TOKENS, bool IS_SCALED>
struct TokenFactors {
    float factors[IS_SCALED ? TOKENS / 32 : 1];

    /// Those of tokens `first` and on.
    __device__ __forceinline__ TokenFactors(const PrefillArgs& args, uint32_t first) : factors{} {
        if constexpr (IS_SCALED) {
#pragma unroll
            for (int i = 0; i < TOKENS / 32; ++i) {
                const uint32_t token = first + 32 * i + threadIdx.x % 32;
                if (token < args.m) factors[i] = args.token_factors[token];
            }
        }
    }

    /// The factors of tokens 8 `eight` + 2 (lane % 4) and the next: of the two columns that a lane has of each eight. For
    /// all lanes.
    __device__ __forceinline__ float2 of(int eight) const {
        if constexpr (!IS_SCALED) return make_float2(1.0f, 1.0f);
        const float factor = factors[IS_SCALED ? eight / 4 : 0];
        const uint32_t lane = eight % 4 * 8 + threadIdx.x % 4 * 2;
        return make_float2(__shfl_sync(0xFFFFFFFFu, factor, lane), __shfl_sync(0xFFFFFFFFu, factor, lane + 1));
    }
};

/// Scales and writes `tokens` tokens of a block, from `block_token` on, of which each warpgroup has 64 rows. `acc` is as
/// wgmma leaves it: see ptx/wgmma.cuh. `staging` is the shared address of STAGING_BYTES for each warpgroup.
template <int TOKENS, bool IS_SCALED>
__device__ __forceinline__ void store(const PrefillArgs& args, uint32_t staging, const float (&acc)[TOKENS / 2],
                                      const RowTerms& terms, const TokenFactors<TOKENS, IS_SCALED>& token_factors,
                                      uint32_t block_row, uint32_t block_token, uint32_t tokens) {
    const uint32_t thread = threadIdx.x % 128, group = threadIdx.x / 128 - 1, warp = thread / 32, lane = thread % 32;
    const uint32_t group_tile = block_row / TILE_ROWS + group * 4;
    if (group_tile >= args.row_tiles) return;
    const uint32_t g = lane / 4;
    const float factor[2] = {terms.factor[0] * args.factor, terms.factor[1] * args.factor};
#pragma unroll
    for (int first = 0; first < TOKENS; first += STAGED_TOKENS) {
        const uint32_t chunk_token = block_token + first;
        const uint32_t end = min(args.m, block_token + tokens);
        if (chunk_token >= end) break;
        const auto is_written = [&](uint32_t token) { return token < end; };
        float2 by[STAGED_TOKENS / 8];
#pragma unroll
        for (int j = 0; j < STAGED_TOKENS / 8; ++j) by[j] = token_factors.of(first / 8 + j);
        const auto value = [&](int j, int h, int i) {
            return acc[first / 2 + 4 * j + 2 * h + i] * factor[h] * (i == 0 ? by[j].x : by[j].y) + terms.bias[h];
        };
        if (args.is_gated) {
            store_gated(args, staging, group_tile, chunk_token, is_written, [&](int j, int i) {
                return ops::swiglu(value(j, 0, i), value(j, 1, i));
            });
            continue;
        }
        if (args.is_f32) {
            // Eight lanes write 32 bytes of one token.
            float* const out = static_cast<float*>(args.out);
#pragma unroll
            for (int e = 0; e < STAGED_TOKENS / 2; ++e) {
                const int j = e / 4, h = e / 2 % 2, i = e % 2;
                const uint32_t token = chunk_token + 8 * j + lane % 4 * 2 + i;
                const Columns columns = columns_of(args, group_tile + warp, h);
                if (is_written(token) && columns.first + g < columns.end) {
                    out[token * args.out_stride + columns.first + g] = value(j, h, i);
                }
            }
            continue;
        }
        // Through shared memory.
        const auto place = [&](uint32_t token, uint32_t eight) { return staging_place(staging, token, eight); };
        ptx::named_barrier(STAGING_BARRIER + group, 128);
#pragma unroll
        for (int j = 0; j < STAGED_TOKENS / 8; j += 2) {
            uint32_t m[4];
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                const __nv_bfloat162 pair =
                    __floats2bfloat162_rn(value(j + q / 2, q % 2, 0), value(j + q / 2, q % 2, 1));
                m[q] = reinterpret_cast<const uint32_t&>(pair);
            }
            ptx::store_matrices_transposed(place(8 * (j + lane / 16) + lane % 8, 2 * warp + lane / 8 % 2), m);
        }
        ptx::named_barrier(STAGING_BARRIER + group, 128);
        // Eight lanes write the results of a token.
        const uint32_t eight = thread % 8;
        const Columns columns = columns_of(args, group_tile + eight / 2, eight % 2);
        __nv_bfloat16* const out = static_cast<__nv_bfloat16*>(args.out) + columns.first;
#pragma unroll
        for (int pass = 0; pass < STAGED_TOKENS / 16; ++pass) {
            const uint32_t local = pass * 16 + thread / 8, token = chunk_token + local;
            const uint4 results = load_staged(place(local, eight));
            if (!is_written(token) || columns.first >= columns.end) continue;
            write_eight(args, out + token * args.out_stride, results, columns);
        }
    }
}

}  // namespace gemm

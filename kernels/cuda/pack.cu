// Rows of a weight as a checkpoint holds them -> tiles (layout: src/tile/mod.rs; definition: src/tile/pack.rs, which this
// equals byte for byte).
//
// The rows come in the order of the tiles, 16 to a tile; those of padding hold anything. One CTA per 16 rows.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "mx/tile.cuh"

namespace pack {

using tile::COLS, tile::ROWS, tile::STEPS;

constexpr int BLOCK = 32, LANES = 32, THREADS = 256;

/// A step of moving bits, as src/tile/format.rs has them: `mask` for both halves of a word, 0 for none.
struct Move {
    uint32_t rotate, mask;
};

/// What a tile holds, as data. Mirrored on the host: keep the order of the fields.
struct Format {
    /// Bits of a code on disk; and how far it is shifted up to be a code of what is stored, of `stored_bits`.
    uint32_t source_bits, code_shift, stored_bits;
    /// A stored code's sign bit (0 for integers) and how far it is shifted to bit 15; likewise the other bits, to their
    /// place in a BF16 number.
    uint32_t sign, sign_shift, magnitude, home_shift;
    /// The least magnitude that stands for no number.
    uint32_t first_special;
    uint32_t unit_exponent, max_distance;
    /// Pairs that a word holds, and the moves of each; those of FP6's other two bits.
    uint32_t word_pairs;
    Move moves[4][2];
    Move upper[4];
};

/// Which rows there are. Mirrored on the host.
struct Rows {
    /// Columns; tiles along K; number of the first tile along N; rows, of each half if there are two.
    uint32_t cols, k_tiles, first_tile, rows;
    /// Whether rows g and g + 8 of tile i are rows 8i + g of either half.
    uint32_t is_paired;
};

__device__ __forceinline__ bool is_padding(const Rows& rows, uint32_t tile, uint32_t row) {
    const uint32_t at = rows.is_paired ? (rows.first_tile + tile) * 8 + row % 8 : (rows.first_tile + tile) * 16 + row;
    return at >= rows.rows;
}

/// The stored codes of columns `column` (even) and the next.
__device__ __forceinline__ uint2 code_pair(const Format& format, const uint8_t* row, uint32_t column) {
    const uint32_t bit = column * format.source_bits;
    uint32_t bits = row[bit / 8] >> bit % 8;
    if (format.source_bits > 4) bits |= uint32_t(row[bit / 8 + 1]) << (8 - bit % 8);
    const uint32_t mask = (1u << format.source_bits) - 1;
    return make_uint2((bits & mask) << format.code_shift, (bits >> format.source_bits & mask) << format.code_shift);
}

/// The largest magnitude among the codes of a block.
__device__ __forceinline__ uint32_t largest_of_block(const Format& format, const uint8_t* row, uint32_t block) {
    uint32_t largest = 0;
    for (int i = 0; i < BLOCK; i += 2) {
        const uint2 codes = code_pair(format, row, block * BLOCK + i);
        largest = max(largest, max(codes.x & format.magnitude, codes.y & format.magnitude));
    }
    return largest;
}

/// A code as half of a BF16 pair.
__device__ __forceinline__ uint32_t home(const Format& format, uint32_t code) {
    return (code & format.sign) << format.sign_shift | (code & format.magnitude) << format.home_shift;
}

__device__ __forceinline__ uint32_t back(uint32_t pair, const Move& move) {
    return tile::rotate_right(pair & move.mask, (32 - move.rotate) % 32);
}

/// Writes the words of lane `lane` of a tile. `rows` are the first codes of its rows g and g + 8, null for padding.
__device__ __forceinline__ void pack_lane(const Format& format, const uint8_t* const (&rows)[2], uint32_t first_column,
                                          uint32_t cols, uint32_t lane, uint8_t* tile) {
    for (uint32_t step = 0; step < STEPS; ++step) {
        uint32_t words[2] = {0, 0}, upper = 0;
        for (uint32_t pair = 0; pair < 4; ++pair) {
            const uint8_t* row = rows[pair % 2];
            const uint32_t column = first_column + step * 16 + lane % 4 * 2 + pair / 2 * 8;
            if (row == nullptr || column >= cols) continue;
            const uint2 codes = code_pair(format, row, column);
            const uint32_t moved = home(format, codes.x) | home(format, codes.y) << 16;
            const Move(&moves)[2] = format.moves[pair % format.word_pairs];
            words[pair / format.word_pairs] |= back(moved, moves[0]) | back(moved, moves[1]);
            upper |= back(moved, format.upper[pair]);
        }
        if (format.stored_bits == 8) {
            *reinterpret_cast<uint2*>(tile + step / 2 * 512 + lane * 16 + step % 2 * 8) = make_uint2(words[0], words[1]);
            continue;
        }
        *reinterpret_cast<uint32_t*>(tile + lane * 16 + step * 4) = words[0];
        if (format.stored_bits == 6) {
            // The bits of an odd step are eight to the left of those of the even one before.
            uint32_t* word = reinterpret_cast<uint32_t*>(tile + 512 + lane * 8 + step / 2 * 4);
            *word = step % 2 == 0 ? upper : *word | tile::rotate_right(upper, 24);
        }
    }
}

}  // namespace pack

/// Packs codes and scales of a tile's rows. `factors` receives 2^(R - 127) of each row, R its largest scale, NaN if it
/// has something that is no number, 0 for padding; `spread` the largest distance of a block from its row's R, over all.
extern "C" __global__ void __launch_bounds__(pack::THREADS)
    pack_mx(const uint8_t* __restrict__ codes, const uint8_t* __restrict__ scales, const pack::Format format,
            const pack::Rows rows, uint8_t* __restrict__ tiles, float* __restrict__ factors, uint32_t* __restrict__ spread) {
    using namespace pack;
    __shared__ uint32_t low[ROWS], high[ROWS], nan[ROWS];
    const uint32_t row_bytes = rows.cols * format.source_bits / 8, blocks = rows.cols / BLOCK;
    const uint32_t tile_bytes = ROWS * COLS * format.stored_bits / 8 + tile::SCALE_BYTES;
    codes += size_t(blockIdx.x) * ROWS * row_bytes;
    scales += size_t(blockIdx.x) * ROWS * blocks;
    tiles += size_t(blockIdx.x) * rows.k_tiles * tile_bytes;
    if (threadIdx.x < ROWS) low[threadIdx.x] = 255, high[threadIdx.x] = 0, nan[threadIdx.x] = 0;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < ROWS * blocks; i += THREADS) {
        const uint32_t row = i / blocks, block = i % blocks, scale = scales[row * blocks + block];
        if (is_padding(rows, blockIdx.x, row)) continue;
        const uint32_t largest = largest_of_block(format, codes + row * row_bytes, block);
        if (scale == 255 || largest >= format.first_special) atomicOr(&nan[row], 1u);
        if (largest != 0) {
            atomicMin(&low[row], scale);
            atomicMax(&high[row], scale);
        }
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < ROWS * rows.k_tiles * 2; i += THREADS) {
        const uint32_t row = i / (rows.k_tiles * 2), block = i % (rows.k_tiles * 2);
        uint32_t exponent = 0;
        if (block < blocks && !is_padding(rows, blockIdx.x, row) &&
            largest_of_block(format, codes + row * row_bytes, block) != 0) {
            const uint32_t distance = high[row] - scales[row * blocks + block];
            if (distance <= format.max_distance) exponent = format.unit_exponent - distance;
        }
        tiles[block / 2 * tile_bytes + tile_bytes - tile::SCALE_BYTES + row % 8 * 4 + row / 8 * 2 + block % 2] =
            uint8_t(exponent);
    }
    for (uint32_t i = threadIdx.x; i < rows.k_tiles * LANES; i += THREADS) {
        const uint32_t k_tile = i / LANES, lane = i % LANES, g = lane / 4;
        const uint8_t* const lane_rows[2] = {
            is_padding(rows, blockIdx.x, g) ? nullptr : codes + g * row_bytes,
            is_padding(rows, blockIdx.x, g + 8) ? nullptr : codes + (g + 8) * row_bytes,
        };
        pack_lane(format, lane_rows, k_tile * COLS, rows.cols, lane, tiles + size_t(k_tile) * tile_bytes);
    }
    if (threadIdx.x < ROWS) {
        const uint32_t row = threadIdx.x, scale = high[row];
        // 2^(scale - 127), also where that is subnormal.
        const float factor = __uint_as_float(scale == 0 ? 1u << 22 : scale << 23);
        factors[blockIdx.x * ROWS + row] = is_padding(rows, blockIdx.x, row) ? 0.0f
                                           : nan[row]                         ? __uint_as_float(0x7FC00000u)
                                                                              : factor;
        if (scale > low[row]) atomicMax(spread, scale - low[row]);
    }
}

namespace pack {

__device__ __forceinline__ uint16_t to_bf16(uint16_t bits, __nv_bfloat16*) { return bits; }
__device__ __forceinline__ uint16_t to_bf16(uint16_t bits, __half*) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(__half2float(__ushort_as_half(bits))));
}
__device__ __forceinline__ uint16_t to_bf16(uint32_t bits, float*) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(__uint_as_float(bits)));
}

/// Packs values of type T, read as `Bits`; factors are 1.
template <typename T, typename Bits>
__device__ __forceinline__ void dense(const Bits* values, const Rows& rows, uint16_t* tiles, float* factors) {
    values += size_t(blockIdx.x) * ROWS * rows.cols;
    tiles += size_t(blockIdx.x) * rows.k_tiles * ROWS * COLS;
    // Neighbours in a row of the weight are read together.
    for (uint32_t i = threadIdx.x; i < ROWS * rows.k_tiles * COLS; i += THREADS) {
        const uint32_t row = i / (rows.k_tiles * COLS), column = i % (rows.k_tiles * COLS), in_step = column % 16;
        const bool present = column < rows.cols && !is_padding(rows, blockIdx.x, row);
        const uint32_t lane = row % 8 * 4 + in_step % 8 / 2, pair = row / 8 + in_step / 8 * 2;
        tiles[size_t(column / COLS) * ROWS * COLS + column % COLS / 16 * 256 + lane * 8 + pair * 2 + column % 2] =
            present ? to_bf16(values[size_t(row) * rows.cols + column], static_cast<T*>(nullptr)) : 0;
    }
    if (threadIdx.x < ROWS) factors[blockIdx.x * ROWS + threadIdx.x] = 1.0f;
}

}  // namespace pack

#define PACK_DENSE(NAME, T, BITS)                                                                              \
    extern "C" __global__ void __launch_bounds__(pack::THREADS) pack_##NAME(                                   \
        const BITS* __restrict__ values, const pack::Rows rows, uint16_t* __restrict__ tiles,                  \
        float* __restrict__ factors) {                                                                         \
        pack::dense<T>(values, rows, tiles, factors);                                                          \
    }

PACK_DENSE(bf16, __nv_bfloat16, uint16_t)
PACK_DENSE(f16, __half, uint16_t)
PACK_DENSE(f32, float, uint32_t)

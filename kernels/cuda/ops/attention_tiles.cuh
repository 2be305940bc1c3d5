// Which rows a CTA of a prefill kernel works on, and where their results go.
#pragma once

#include <cstdint>

#include "ops/attention.cuh"
#include "ops/vector.cuh"

namespace ops {

/// A tile of consecutive rows of one sequence.
struct QueryTile {
    /// First row of the step, rows in use; 0 when there is no such tile.
    int row, rows;
    int sequence;
    /// Position of the first row.
    int position;
};

/// One of the pieces that the sequences of a step are cut into, one sequence after the other.
struct Piece {
    /// No sequence, if there are not so many pieces.
    int sequence;
    /// Its number in the sequence, and how many those are.
    int number, count;
};

/// Piece `index`; `pieces_of(sequence)` is how many one has. To be called by whole warps, all with one `index`.
template <typename PiecesOf>
__device__ __forceinline__ Piece find_piece(int sequences, int index, PiecesOf pieces_of) {
    const int lane = threadIdx.x % WARP;
    int before = 0;
    for (int base = 0; base < sequences; base += WARP) {
        const int pieces = base + lane < sequences ? pieces_of(base + lane) : 0;
        int end = pieces;
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) {
            const int lower = __shfl_up_sync(0xFFFFFFFFu, end, step);
            if (lane >= step) end += lower;
        }
        end += before;
        const unsigned holders = __ballot_sync(0xFFFFFFFFu, index < end);
        if (holders != 0) {
            const int holder = __ffs(holders) - 1, count = __shfl_sync(0xFFFFFFFFu, pieces, holder);
            return {base + holder, index - __shfl_sync(0xFFFFFFFFu, end - pieces, holder), count};
        }
        before = __shfl_sync(0xFFFFFFFFu, end, WARP - 1);
    }
    return {sequences, 0, 0};
}

/// Tile `index` of the sequences with more than one row (those with one are left to the decode kernel): sequences in
/// order, the last rows of each first, as they see the most keys. To be called by whole warps, all with one `index`.
template <int TILE_ROWS>
__device__ __forceinline__ QueryTile find_tile(const uint32_t* query_start, const uint32_t* context_lens, int sequences,
                                               int index) {
    const auto rows_of = [&](int sequence) { return static_cast<int>(query_start[sequence + 1] - query_start[sequence]); };
    const Piece piece = find_piece(sequences, index, [&](int sequence) {
        const int rows = rows_of(sequence);
        return rows > 1 ? (rows + TILE_ROWS - 1) / TILE_ROWS : 0;
    });
    if (piece.sequence == sequences) return {0, 0, 0, 0};
    const int start = query_start[piece.sequence], rows = rows_of(piece.sequence);
    const int context = context_lens[piece.sequence], first = (piece.count - 1 - piece.number) * TILE_ROWS;
    return {start + first, min(TILE_ROWS, rows - first), piece.sequence, context - rows + first};
}

/// Writes head `head` of row `row` of the step, if it `is_present`: `value(j, i)` is the calling lane's element
/// 8 j + 2 (lane % 4) + i. To be called by whole warps.
template <int DIM, typename Value>
__device__ __forceinline__ void store_row(const AttentionArguments& a, int row, int head, bool is_present, Value value) {
    __nv_bfloat16* const out = a.out + (static_cast<size_t>(row) * a.q_heads + head) * DIM + threadIdx.x % 4 * 2;
    const auto store = [&](int j, float low, float high) {
        if (is_present) *reinterpret_cast<uint32_t*>(out + j * 8) = pack_bf16(low, high);
    };
    if constexpr (DIM % mx::BLOCK == 0) {
        if (a.preparation.is_needed()) {
#pragma unroll
            for (int first = 0; first < DIM / 8; first += 4) {
                float v[8];
#pragma unroll
                for (int i = 0; i < 8; ++i) v[i] = value(first + i / 2, i % 2);
                mx::prepare<mx::Accumulators>(a.preparation, v, 0xFFFFFFFFu);
#pragma unroll
                for (int j = 0; j < 4; ++j) store(first + j, v[2 * j], v[2 * j + 1]);
            }
            return;
        }
    }
#pragma unroll
    for (int j = 0; j < DIM / 8; ++j) store(j, value(j, 0), value(j, 1));
}

}  // namespace ops

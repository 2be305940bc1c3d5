// The paged KV cache of one layer: keys and values each [blocks, kv_heads], blocks of 16 tokens of one head, BF16.
//
// A block is stored as kernels want it in shared memory, so that bulk copies bring it there as it is: groups of 64
// dimensions one after the other, each [16 tokens, 128 bytes] with the 16-byte pieces of a row permuted as in the
// 128-byte swizzle. Head dimensions that are no multiple of 64 form one group, with a permutation that keeps eight
// tokens of a piece on different banks.
#pragma once

#include <cstdint>

namespace ops {

/// Tokens of one block.
constexpr int BLOCK_TOKENS = 16;

/// Dimensions of a group.
template <int DIM>
constexpr int GROUP_DIMS = DIM % 64 == 0 ? 64 : DIM;

/// Bytes of one head's block.
template <int DIM>
constexpr int BLOCK_BYTES = BLOCK_TOKENS * DIM * 2;

/// Where dimensions 8 `piece` .. 8 `piece` + 7 of a token are, in bytes. Groups are of `TOKENS` tokens: those of a block,
/// or of a tile of blocks whose groups were copied side by side.
template <int DIM, int TOKENS = BLOCK_TOKENS>
__device__ __forceinline__ int piece_offset(int token, int piece) {
    constexpr int PIECES = GROUP_DIMS<DIM> / 8;
    const int swizzle = PIECES % 8 == 0 ? token & 7 : PIECES % 4 == 0 ? (token >> 1) & 3 : (token >> 2) & 1;
    return (piece / PIECES * TOKENS + token) * PIECES * 16 + (piece % PIECES ^ swizzle) * 16;
}

/// Where a block of `head` starts, in bytes.
template <int DIM>
__device__ __forceinline__ size_t block_offset(uint32_t block, int head, int kv_heads) {
    return (static_cast<size_t>(block) * kv_heads + head) * BLOCK_BYTES<DIM>;
}

}  // namespace ops

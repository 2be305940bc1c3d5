// How the decode kernels cut sequences' keys into chunks, and deal these to CTAs.
//
// A sequence's blocks of 16 tokens form up to `max_chunks` equal chunks. All chunks of all sequences and tiles of heads,
// weighted by their blocks, are dealt to the CTAs in equal runs, whatever the lengths.
#pragma once

#include "ops/attention.cuh"
#include "ops/kv.cuh"
#include "ops/vector.cuh"

namespace ops {

/// Warps of a CTA that multiply.
constexpr int DECODE_WARPS = 4;
/// Blocks of a chunk for each warp, at least: merging costs as much as one.
constexpr int MIN_ROUNDS = 2;

struct DecodeSplit {
    /// [CTAs, max_chunks, heads, RESULT_STRIDE]: of the shared row whose first chunk the CTA has.
    float* results;
    /// [CTAs]: chunks of that row that are done; zero between launches.
    uint32_t* arrivals;
    int max_chunks, sequences;
};

/// What a sequence with one new row asks for; no chunks if it has another number of rows.
struct DecodeSequence {
    uint32_t row;
    /// Positions `from .. context` are seen, in blocks `first .. end`.
    int from, context, first, end;
    /// Blocks that each warp takes of a chunk.
    int rounds;
    int chunks;

    __device__ __forceinline__ DecodeSequence(const AttentionArguments& a, const DecodeSplit& split, int sequence) {
        row = a.query_start[sequence];
        const uint32_t next = a.query_start[sequence + 1];
        context = a.context_lens[sequence];
        from = a.window > 0 && context > a.window ? context - a.window : 0;
        first = from / BLOCK_TOKENS, end = (context + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
        const int most = DECODE_WARPS * split.max_chunks;
        rounds = max(MIN_ROUNDS, (end - first + most - 1) / most);
        chunks = next - row != 1 ? 0 : (end - first + rounds * DECODE_WARPS - 1) / (rounds * DECODE_WARPS);
    }

    __device__ __forceinline__ int work(int tiles) const { return tiles * chunks * rounds; }
};

/// A place in the list of all chunks: sequences in order, their tiles of heads, the chunks of each.
struct DecodeCursor {
    int sequence;
    /// Of the sequence: tile times chunks plus chunk.
    int index;
    /// Work before this chunk.
    int offset;

    /// Goes on by `count` chunks of this sequence, to the next one if that was all.
    __device__ __forceinline__ void advance(const AttentionArguments& a, const DecodeSplit& split, int tiles,
                                            DecodeSequence& s, int count, int end) {
        index += count, offset += count * s.rounds;
        if (index < tiles * s.chunks) return;
        index = 0;
        do {
            ++sequence;
            if (offset >= end || sequence >= split.sequences) return;
            s = DecodeSequence(a, split, sequence);
        } while (s.chunks == 0);
    }
};

/// The first chunk at or behind work `begin`; the same in all threads. `share` receives the work of a CTA.
__device__ __forceinline__ DecodeCursor find_work(const AttentionArguments& a, const DecodeSplit& split, int tiles,
                                                 int& begin, int& end, int& share) {
    const int lane = threadIdx.x % WARP;
    int total = 0;
    for (int base = 0; base < split.sequences; base += WARP) {
        int work = base + lane < split.sequences ? DecodeSequence(a, split, base + lane).work(tiles) : 0;
        total += __reduce_add_sync(0xFFFFFFFFu, work);
    }
    share = max(1, (total + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x));
    begin = blockIdx.x * share;
    end = min(begin + share, total);
    int before = 0;
    for (int base = 0; base < split.sequences && begin < end; base += WARP) {
        const bool inside = base + lane < split.sequences;
        const int work = inside ? DecodeSequence(a, split, base + lane).work(tiles) : 0;
        int sum = work;
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) {
            const int lower = __shfl_up_sync(0xFFFFFFFFu, sum, step);
            if (lane >= step) sum += lower;
        }
        const unsigned holders = __ballot_sync(0xFFFFFFFFu, before + sum > begin);
        if (holders != 0) {
            const int holder = __ffs(holders) - 1;
            return {base + holder, 0, before + __shfl_sync(0xFFFFFFFFu, sum - work, holder)};
        }
        before += __shfl_sync(0xFFFFFFFFu, sum, WARP - 1);
    }
    return {split.sequences, 0, total};
}

}  // namespace ops

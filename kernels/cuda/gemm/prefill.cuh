// out[M, N] = X[M, K] * W[N, K]^T for many rows M: a persistent kernel of one CTA per SM, specialized by warpgroup.
//
// The product is computed as its transpose: weights are the 64-row operand of wgmma, which may be in registers, and tokens
// its columns. So packed weights stay packed until they are in the registers that multiply: they come as the tiles of 16
// rows x 64 columns that hold, lane by lane, the fragment of one warp, and become BF16 there, or E4M3. Weights expanded to
// E4M3 before come as shared memory is to hold them.
//
//   warpgroup 0    one thread of each warp fills the stages: boxes of X by tensor map, weights by bulk copies
//   the GROUPS others  64 rows of W each by TOKENS rows of X; accumulators stay in registers
//
// A CTA computes 64 GROUPS x TOKENS results at a time. CTAs of a cluster work on neighbouring rows of W and the same
// tokens, and each loads its part of X for all. Where there are too few blocks for all CTAs, K is cut into parts, whose
// sums the CTAs of a block exchange through memory (prefill_parts.cuh).
#pragma once

#include <cstdint>

#include "gemm/prefill_parts.cuh"
#include "gemm/prefill_store.cuh"
#include "mx/tile.cuh"
#include "mx/tile_e4m3.cuh"
#include "ptx/barrier.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/launch.cuh"
#include "ptx/wgmma.cuh"

namespace gemm {

using ptx::Operand;

/// How weights get to the tensor core, and as what: see src/cuda/gemm/plan.rs.
enum class Path { Bf16, E4m3, Expanded };

constexpr int X_ROW_BYTES = 128;
constexpr int SHARED_BYTES = 232448;
/// Threads of a CTA, and registers of a thread of the copying warpgroup and of the others: together what `THREADS` threads
/// get at launch.
template <int GROUPS>
constexpr int THREADS = 128 * (1 + GROUPS);
template <int GROUPS>
constexpr int COPY_REGISTERS = GROUPS == 2 ? 40 : 32;
template <int GROUPS>
constexpr int MULTIPLY_REGISTERS = GROUPS == 2 ? 232 : 112;

/// Sizes that follow from the weight tiles and the tokens per CTA.
template <class Weights, int TOKENS, int GROUPS>
struct Layout {
    static constexpr int ROW_TILES = 4 * GROUPS;
    /// Boxes of X in a stage, next to each other along K. Few tokens take two, to be spared half of the copies and waits,
    /// if two of them with their weights are not too large.
    static constexpr bool IS_SMALL = Weights::PATH == Path::Bf16 && TOKENS < 256;
    static constexpr int BOXES = IS_SMALL && ROW_TILES * Weights::TILE_BYTES < 32768 ? 2 : 1;
    static constexpr int BOX_BYTES = TOKENS * X_ROW_BYTES;
    /// Weight tiles along K that a box, and a stage, meet.
    static constexpr int BOX_TILES = Weights::PATH == Path::Bf16 ? 1 : 2;
    static constexpr int STAGE_TILES = BOXES * BOX_TILES;
    static constexpr int X_BYTES = BOXES * BOX_BYTES;
    static constexpr int W_BYTES = ROW_TILES * STAGE_TILES * Weights::TILE_BYTES;
    static constexpr int TABLE_BYTES = Weights::PATH == Path::E4m3 ? tile::E4M3_TABLE_BYTES : 0;
    static constexpr int OTHER_BYTES = GROUPS * STAGING_BYTES + TABLE_BYTES + 1024 + 128;
    static constexpr int MOST_STAGES = (SHARED_BYTES - OTHER_BYTES) / (X_BYTES + W_BYTES);
    static constexpr int STAGES = MOST_STAGES < 8 ? MOST_STAGES : 8;
    static_assert(STAGES >= 3 && W_BYTES % 128 == 0 && (TABLE_BYTES == 0 || W_BYTES % tile::E4M3_TABLE_BYTES == 0));
    /// Parts of K are whole stages.
    static __device__ __forceinline__ uint32_t first_tile(uint32_t k_tiles, uint32_t part, uint32_t parts) {
        return min((k_tiles + STAGE_TILES - 1) / STAGE_TILES * part / parts * STAGE_TILES, k_tiles);
    }
};

/// The stage a warp is at, and the parity its full barrier will have.
template <int STAGES>
struct Cursor {
    uint32_t stage = 0, parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

/// Walks over the blocks of the result: `group` blocks of tokens by all rows of W, then the next blocks of tokens. Each
/// is `parts` items, one for each part of K.
struct Schedule {
    uint32_t row_blocks, token_blocks, group, parts;

    __device__ __forceinline__ uint32_t count() const { return row_blocks * token_blocks * parts; }

    /// (block of rows, block of tokens) of item number `item`.
    __device__ __forceinline__ uint2 at(uint32_t item) const {
        const uint32_t index = item / parts;
        const uint32_t first = index / (group * row_blocks) * group;
        const uint32_t rest = index - first * row_blocks, size = min(group, token_blocks - first);
        return make_uint2(rest / size, first + rest % size);
    }
};

template <class Weights, int TOKENS, int CLUSTER, int GROUPS>
struct Prefill {
    using L = Layout<Weights, TOKENS, GROUPS>;
    static constexpr int STAGES = L::STAGES;
    static constexpr int ROW_TILES = L::ROW_TILES, ROWS = ROW_TILES * TILE_ROWS, CONSUMER_WARPS = 4 * GROUPS;
    /// Named barrier of the exchange of parts, after those of the store.
    static constexpr uint32_t PARTS_BARRIER = STAGING_BARRIER + GROUPS;
    static constexpr Path PATH = Weights::PATH;
    using Factors = TokenFactors<TOKENS, PATH != Path::Bf16>;

    const PrefillArgs& args;
    const uint8_t* w_stages;
    uint32_t x_stages, staging, full, empty, table;
    uint32_t rank;
    Schedule schedule;

    __device__ __forceinline__ explicit Prefill(const PrefillArgs& arguments) : args(arguments) {
        extern __shared__ uint8_t shared[];
        // The swizzle counts from multiples of 1024.
        const uint32_t start = ptx::shared_address(shared);
        x_stages = (start + 1023) & ~1023u;
        w_stages = shared + (x_stages - start) + STAGES * L::X_BYTES;
        table = x_stages + STAGES * (L::X_BYTES + L::W_BYTES);
        staging = table + L::TABLE_BYTES;
        full = staging + GROUPS * STAGING_BYTES;
        empty = full + STAGES * 8;
        rank = CLUSTER == 1 ? 0 : ptx::cluster_rank();
        constexpr uint32_t CLUSTER_ROWS = ROWS * CLUSTER;
        schedule = {(args.row_tiles * TILE_ROWS + CLUSTER_ROWS - 1) / CLUSTER_ROWS, (args.m + TOKENS - 1) / TOKENS,
                    args.group, args.parts};
    }

    __device__ __forceinline__ uint32_t first_row(uint2 block) const { return (block.x * CLUSTER + rank) * ROWS; }

    __device__ __forceinline__ void run() {
        if (threadIdx.x == 0) {
            for (int s = 0; s < STAGES; ++s) {
                ptx::barrier_init(full + 8 * s, 1);
                ptx::barrier_init(empty + 8 * s, CONSUMER_WARPS * CLUSTER);
            }
            ptx::barrier_init_fence();
        }
        if constexpr (PATH == Path::E4m3) {
            if (threadIdx.x < 32) tile::fill_e4m3_table(table, threadIdx.x);
        }
        if constexpr (CLUSTER > 1) {
            ptx::cluster_sync();
        } else {
            __syncthreads();
        }
        ptx::launch_dependents();
        if (threadIdx.x < 128) {
            ptx::shrink_registers<COPY_REGISTERS<GROUPS>>();
            // Packed weights depend on no kernel: those of the first stages arrive while the one before finishes.
            if (PATH == Path::Expanded || threadIdx.x < 32) ptx::wait_for_dependencies();
            if (threadIdx.x % 32 == 0) produce(threadIdx.x / 32);
            __syncwarp();
        } else {
            ptx::grow_registers<MULTIPLY_REGISTERS<GROUPS>>();
            ptx::wait_for_dependencies();
            consume();
        }
        // A CTA's shared memory is written, and its barriers are used, by its neighbours until they are done.
        if constexpr (CLUSTER > 1) ptx::cluster_sync();
    }

    /// Fills stages until all blocks are done: producer warp p copies the tiles of two 16-row groups, warp 0 also X. One
    /// thread each, since a copy is issued for one thread at a time.
    __device__ __forceinline__ void produce(uint32_t p) {
        constexpr uint32_t EACH = ROW_TILES / 4;
        Cursor<STAGES> at;
        for (uint32_t index = blockIdx.x / CLUSTER; index < schedule.count(); index += gridDim.x / CLUSTER) {
            const uint2 block = schedule.at(index);
            const uint32_t first_tile = first_row(block) / TILE_ROWS;
            const uint32_t here = min(args.row_tiles - min(first_tile, args.row_tiles), uint32_t(ROW_TILES));
            const uint32_t boxes = (args.k_tiles + L::STAGE_TILES - 1) / L::STAGE_TILES;
            const uint32_t part = index % args.parts, first_k = L::first_tile(args.k_tiles, part, args.parts);
            const uint32_t end_k = L::first_tile(args.k_tiles, part + 1, args.parts);
            const uint8_t* expanded =
                args.tiles + (size_t(first_tile / ROW_TILES) * boxes + first_k / L::STAGE_TILES) * L::W_BYTES;
            const uint8_t* tiles = args.tiles + size_t(first_tile + p * EACH) * args.k_tiles * Weights::TILE_BYTES;
            for (uint32_t k_tile = first_k; k_tile < end_k; k_tile += L::STAGE_TILES, at.advance()) {
                const uint32_t bytes = min(args.k_tiles - k_tile, uint32_t(L::STAGE_TILES)) * Weights::TILE_BYTES;
                const uint32_t barrier = full + 8 * at.stage;
                ptx::barrier_wait(empty + 8 * at.stage, at.parity ^ 1);
                if (p == 0) {
                    ptx::barrier_arrive_expect(barrier, L::X_BYTES + (PATH == Path::Expanded ? L::W_BYTES : here * bytes));
                    constexpr int PART = TOKENS / CLUSTER;
#pragma unroll
                    for (int box = 0; box < L::BOXES; ++box) {
                        const uint32_t to =
                            x_stages + at.stage * L::X_BYTES + box * L::BOX_BYTES + rank * PART * X_ROW_BYTES;
                        const int x = int((k_tile + box * L::BOX_TILES) * tile::COLS);
                        const int y = int(block.y * TOKENS + rank * PART);
                        if constexpr (CLUSTER > 1) {
                            ptx::tensor_load_multicast(
                                to, &args.x, x, y, barrier, uint16_t((1 << CLUSTER) - 1), ptx::L2_EVICT_LAST);
                        } else {
                            ptx::tensor_load(to, &args.x, x, y, barrier, ptx::L2_EVICT_LAST);
                        }
                    }
                }
                if constexpr (PATH == Path::Expanded) {
                    if (p == 1) {
                        ptx::bulk_load(ptx::shared_address(w_stages) + at.stage * L::W_BYTES, expanded, L::W_BYTES,
                                       barrier, ptx::L2_EVICT_NORMAL);
                        expanded += L::W_BYTES;
                    }
                    continue;
                }
                const uint32_t to = ptx::shared_address(stage_tiles(at.stage, p * EACH));
#pragma unroll
                for (uint32_t i = 0; i < EACH; ++i) {
                    if (p * EACH + i < here) {
                        ptx::bulk_load(to + i * L::STAGE_TILES * Weights::TILE_BYTES,
                                       tiles + size_t(i * args.k_tiles + k_tile) * Weights::TILE_BYTES, bytes, barrier,
                                       ptx::L2_EVICT_NORMAL);
                    }
                }
            }
        }
    }

    /// The tiles of 16-row group `row_tile` in a stage.
    __device__ __forceinline__ const uint8_t* stage_tiles(uint32_t stage, uint32_t row_tile) const {
        return w_stages + stage * L::W_BYTES + row_tile * L::STAGE_TILES * Weights::TILE_BYTES;
    }

    __device__ __forceinline__ void release(uint32_t stage) const {
        __syncwarp();
        const uint32_t lane = threadIdx.x % 32;
        if constexpr (CLUSTER > 1) {
            if (lane < CLUSTER) ptx::barrier_arrive_remote(empty + 8 * stage, lane);
        } else {
            if (lane == 0) ptx::barrier_arrive(empty + 8 * stage);
        }
    }

    /// The tiles of this warp in a stage.
    __device__ __forceinline__ const uint8_t* warp_tiles(uint32_t stage) const {
        return stage_tiles(stage, threadIdx.x / 32 - 4);
    }

    __device__ __forceinline__ void consume() {
        Cursor<STAGES> at;
        for (uint32_t index = blockIdx.x / CLUSTER; index < schedule.count(); index += gridDim.x / CLUSTER) {
            const uint2 block = schedule.at(index);
            const uint32_t part = index % args.parts, first_k = L::first_tile(args.k_tiles, part, args.parts);
            const uint32_t tiles = L::first_tile(args.k_tiles, part + 1, args.parts) - first_k;
            const TokenRange range = tokens_of<TOKENS>(part, args.parts);
            float acc[TOKENS / 2];
            const auto finish = [&](const RowTerms& terms, const Factors& token_factors) {
                if (args.parts > 1) {
                    const uint32_t result = index / args.parts * CLUSTER + rank;
                    add_parts<TOKENS, GROUPS>(args, acc, result, part, PARTS_BARRIER);
                }
                store(args, staging, acc, terms, token_factors, first_row(block), block.y * TOKENS + range.first,
                      range.count);
            };
            if constexpr (PATH == Path::E4m3) {
                // There are no registers for factors while there are sums.
                multiply_decoding(at, acc, tiles);
                finish({args, first_row(block)}, {args, block.y * TOKENS + range.first});
            } else {
                const RowTerms terms(args, first_row(block));
                const Factors token_factors(args, block.y * TOKENS + range.first);
                if constexpr (PATH == Path::Expanded) {
                    multiply_promoting(at, acc, tiles);
                } else {
                    multiply(at, acc, tiles);
                }
                finish(terms, token_factors);
            }
        }
    }

    __device__ __forceinline__ uint32_t stage_before(uint32_t stage) const { return stage == 0 ? STAGES - 1 : stage - 1; }

    /// `tiles` tiles along K of one block, in BF16. An instruction with A in registers holds the warp until the tensor core
    /// takes it: so the next tile is decoded between the instructions of this one, and the tensor core always has one to
    /// go on with.
    __device__ __forceinline__ void multiply(Cursor<STAGES>& at, float (&acc)[TOKENS / 2], uint32_t tiles) const {
        uint32_t even[4][4], odd[4][4];
        typename Weights::Lane lane;
        ptx::barrier_wait(full + 8 * at.stage, at.parity);
        Weights::load(lane, warp_tiles(at.stage));
        Weights::template fragment<0>(lane, even[0]);
        Weights::template fragment<1>(lane, even[1]);
        Weights::template fragment<2>(lane, even[2]);
        Weights::template fragment<3>(lane, even[3]);

        // Multiplies tile `k`, the stage's number `box`, and decodes the one after; after the last, the last again.
        const auto step = [&](const uint32_t (&a)[4][4], uint32_t (&next)[4][4], uint32_t k, uint32_t box) {
            const uint64_t x = ptx::uniform_descriptor(x_stages + at.stage * L::X_BYTES + box * L::BOX_BYTES);
            const auto run = [&](int j, bool accumulate) {
                ptx::wgmma_fence();
                ptx::Wgmma<Operand::Bf16, TOKENS>::run(acc, a[j], x + ptx::descriptor_step(32 * j), accumulate);
                ptx::wgmma_commit();
            };
            run(0, k > 0);
            // The tile before is done: the registers of its fragments are free, and if it was its stage's last, the stage.
            ptx::wgmma_wait<1>();
            if (box == 0 && k > 0) release(stage_before(at.stage));
            const uint32_t next_box = (box + 1) % L::BOXES;
            if (next_box == 0 && k + 1 < tiles) {
                at.advance();
                ptx::barrier_wait(full + 8 * at.stage, at.parity);
            }
            Weights::load(lane, warp_tiles(at.stage) + next_box * Weights::TILE_BYTES);
            run(1, true);
            Weights::template fragment<0>(lane, next[0]);
            run(2, true);
            Weights::template fragment<1>(lane, next[1]);
            Weights::template fragment<2>(lane, next[2]);
            run(3, true);
            Weights::template fragment<3>(lane, next[3]);
        };
        uint32_t k = 0;
        for (; k + 1 < tiles; k += 2) {
            step(even, odd, k, 0);
            step(odd, even, k + 1, 1 % L::BOXES);
        }
        if (k < tiles) step(even, odd, k, 0);
        ptx::wgmma_wait<0>();
        ptx::pin(acc);
        release(at.stage);
        at.advance();
    }

    /// The fragments of this warp's two tiles in stage `stage`, in E4M3.
    __device__ __forceinline__ void decode(uint32_t stage, uint32_t (&a)[4][4]) const {
        tile::Lane<tile::Format::E2m1> lane;
        lane.load(warp_tiles(stage), threadIdx.x % 32);
        tile::e4m3_fragment<0>(lane, table, a[0]);
        tile::e4m3_fragment<1>(lane, table, a[1]);
        lane.load(warp_tiles(stage) + Weights::TILE_BYTES, threadIdx.x % 32);
        tile::e4m3_fragment<0>(lane, table, a[2]);
        tile::e4m3_fragment<1>(lane, table, a[3]);
    }

    /// As `multiply_promoting`, with packed weights: while one warpgroup decodes, the other multiplies. Half of the tokens at a
    /// time, so that there are registers for their sums.
    __device__ __forceinline__ void multiply_decoding(Cursor<STAGES>& at, float (&acc)[TOKENS / 2], uint32_t tiles) const {
        constexpr int HALF = TOKENS / 2;
        uint32_t a[4][4];
        float sums[HALF / 2];
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) acc[i] = 0.0f;
        for (uint32_t k_tile = 0; k_tile < tiles; k_tile += L::STAGE_TILES, at.advance()) {
            ptx::barrier_wait(full + 8 * at.stage, at.parity);
            decode(at.stage, a);
#pragma unroll
            for (int first = 0; first < TOKENS; first += HALF) {
                const uint64_t x = ptx::swizzled_descriptor(x_stages + at.stage * L::X_BYTES + first * X_ROW_BYTES);
                ptx::wgmma_fence();
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    ptx::Wgmma<Operand::E4m3, HALF>::run(sums, a[j], x + ptx::descriptor_step(32 * j), j > 0);
                }
                ptx::wgmma_commit();
                ptx::wgmma_wait<0>();
                ptx::pin(sums);
                if (first == HALF) release(at.stage);
#pragma unroll
                for (int i = 0; i < HALF / 2; ++i) acc[first / 2 + i] += sums[i];
            }
        }
    }

    /// As `multiply`, in E4M3. The tensor core adds with fewer bits than FP32 has, so every 128 of K go through accumulators of
    /// their own. While one warpgroup adds up, the other multiplies; that they do so in turns needs no barrier (measured).
    __device__ __forceinline__ void multiply_promoting(Cursor<STAGES>& at, float (&acc)[TOKENS / 2], uint32_t tiles) const {
        const uint32_t group = threadIdx.x / 128 - 1;
        float sums[TOKENS / 2];
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) acc[i] = 0.0f;
        for (uint32_t k_tile = 0; k_tile < tiles; k_tile += L::STAGE_TILES, at.advance()) {
            ptx::barrier_wait(full + 8 * at.stage, at.parity);
            const uint64_t x = ptx::swizzled_descriptor(x_stages + at.stage * L::X_BYTES);
            const uint64_t w = ptx::swizzled_descriptor(
                ptx::shared_address(w_stages) + at.stage * L::W_BYTES + group * 64 * X_ROW_BYTES);
            ptx::wgmma_fence();
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                ptx::SharedWgmma<Operand::E4m3, TOKENS>::run(sums, w + ptx::descriptor_step(32 * j),
                                                             x + ptx::descriptor_step(32 * j), j > 0);
            }
            ptx::wgmma_commit();
            ptx::wgmma_wait<0>();
            ptx::pin(sums);
            release(at.stage);
#pragma unroll
            for (int i = 0; i < TOKENS / 2; ++i) acc[i] += sums[i];
        }
    }
};

/// Packed FP4, which becomes E4M3 in registers.
struct PackedE4m3 {
    static constexpr Path PATH = Path::E4m3;
    static constexpr int TILE_BYTES = tile::bytes(tile::Format::E2m1);
};

/// Packed weights, which become BF16 in registers.
template <tile::Format FORMAT>
struct Packed {
    static constexpr Path PATH = Path::Bf16;
    static constexpr int TILE_BYTES = tile::bytes(FORMAT);
    using Lane = tile::Lane<FORMAT>;

    static __device__ __forceinline__ void load(Lane& lane, const uint8_t* at) { lane.load(at, threadIdx.x % 32); }

    template <int J>
    static __device__ __forceinline__ void fragment(const Lane& lane, uint32_t (&a)[4]) {
        lane.template fragment<J>(a);
    }
};

/// Weights expanded to E4M3 by `expand_*`: for each 128 rows and 128 of K, 16 KiB as they are to be in shared memory.
struct Expanded {
    static constexpr Path PATH = Path::Expanded;
    static constexpr int TILE_BYTES = tile::ROWS * tile::COLS;
};

}  // namespace gemm

// out[M, N] = X[M, K] * W[N, K]^T for many rows M: a persistent kernel of one CTA per SM, specialized by warpgroup.
//
// The product is computed as its transpose: weights are the 64-row register operand of wgmma, tokens its columns. So
// weights stay packed until they are in the registers that multiply: they come as the tiles of 16 rows x 64 columns that
// hold, lane by lane, the fragment of one warp, and no expanded copy of them exists in shared memory.
//
//   warpgroup 0      one warp fills the stages: a box of X by tensor map, and the weight tiles by bulk copies
//   warpgroups 1, 2  64 rows of W each by TOKENS rows of X; accumulators stay in registers
//
// A CTA computes 128 x TOKENS results at a time. CTAs of a cluster work on neighbouring rows of W and the same tokens, and
// each loads its part of X for all.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

#include "mx/tile.cuh"
#include "ptx/barrier.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/launch.cuh"
#include "ptx/matrix.cuh"
#include "ptx/wgmma.cuh"

namespace gemm {

using ptx::Operand;

/// Mirrored on the host: keep the order of the fields.
struct PrefillArgs {
    /// `[M, K]`, box of 128 bytes along K by TOKENS / CLUSTER rows, 128-byte swizzle, zero outside.
    CUtensorMap x;
    /// Weight tiles, `[row_tiles, k_tiles]`.
    const uint8_t* tiles;
    /// Factor of each row of W, in the order of tiles.
    const float* row_factors;
    /// Factor of each token, `[M]`; null for 1.
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
};

constexpr int ROWS = 128, TILE_ROWS = tile::ROWS;
constexpr int THREADS = 384, CONSUMER_WARPS = 8;
constexpr int ROW_TILES = ROWS / TILE_ROWS;
constexpr int X_ROW_BYTES = 128;
/// Tokens that a warpgroup stages at once on their way out, 64 results of two bytes each.
constexpr int STAGED_TOKENS = 64, STAGING_BYTES = STAGED_TOKENS * 64 * 2;
constexpr int SHARED_BYTES = 232448;
/// Named barriers: one per warpgroup for its staging, and for its turn.
constexpr uint32_t STAGING_BARRIER = 1, TURN_BARRIER = 3;

/// Sizes that follow from the weight tiles and the tokens per CTA.
template <class Weights, int TOKENS>
struct Layout {
    /// Boxes of X in a stage, next to each other along K. Few tokens take two, to be spared half of the copies and waits.
    static constexpr int BOXES = Weights::OPERAND == Operand::Bf16 && TOKENS < 256 ? 2 : 1;
    static constexpr int BOX_BYTES = TOKENS * X_ROW_BYTES;
    /// Weight tiles along K that a box, and a stage, meet.
    static constexpr int BOX_TILES = Weights::OPERAND == Operand::Bf16 ? 1 : 2;
    static constexpr int STAGE_TILES = BOXES * BOX_TILES;
    static constexpr int X_BYTES = BOXES * BOX_BYTES;
    static constexpr int W_BYTES = ROW_TILES * STAGE_TILES * Weights::TILE_BYTES;
    static constexpr int OTHER_BYTES = 2 * STAGING_BYTES + 1024 + 256;
    static constexpr int MOST_STAGES = (SHARED_BYTES - OTHER_BYTES) / (X_BYTES + W_BYTES);
    static constexpr int STAGES = MOST_STAGES < 8 ? MOST_STAGES : 8;
    static_assert(STAGES >= 3 && W_BYTES % 128 == 0);
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

/// Walks over the blocks of the result: `group` blocks of tokens by all rows of W, then the next blocks of tokens.
struct Schedule {
    uint32_t row_blocks, token_blocks, group;

    __device__ __forceinline__ uint32_t count() const { return row_blocks * token_blocks; }

    /// (block of rows, block of tokens) number `index`.
    __device__ __forceinline__ uint2 at(uint32_t index) const {
        const uint32_t first = index / (group * row_blocks) * group;
        const uint32_t rest = index - first * row_blocks, size = min(group, token_blocks - first);
        return make_uint2(rest / size, first + rest % size);
    }
};

template <class Weights, int TOKENS, int CLUSTER>
struct Prefill {
    using L = Layout<Weights, TOKENS>;
    static constexpr int STAGES = L::STAGES;
    static constexpr bool IS_EXPANDED = Weights::OPERAND == Operand::E4m3;

    const PrefillArgs& args;
    const uint8_t* w_stages;
    uint32_t x_stages, staging, full, empty;
    uint32_t rank;
    Schedule schedule;

    __device__ __forceinline__ explicit Prefill(const PrefillArgs& arguments) : args(arguments) {
        extern __shared__ uint8_t shared[];
        // The swizzle counts from multiples of 1024.
        const uint32_t start = ptx::shared_address(shared);
        x_stages = (start + 1023) & ~1023u;
        w_stages = shared + (x_stages - start) + STAGES * L::X_BYTES;
        staging = x_stages + STAGES * (L::X_BYTES + L::W_BYTES);
        full = staging + 2 * STAGING_BYTES;
        empty = full + STAGES * 8;
        rank = CLUSTER == 1 ? 0 : ptx::cluster_rank();
        constexpr uint32_t CLUSTER_ROWS = ROWS * CLUSTER;
        schedule = {(args.row_tiles * TILE_ROWS + CLUSTER_ROWS - 1) / CLUSTER_ROWS, (args.m + TOKENS - 1) / TOKENS,
                    args.group};
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
        if constexpr (CLUSTER > 1) {
            ptx::cluster_sync();
        } else {
            __syncthreads();
        }
        ptx::launch_dependents();
        ptx::wait_for_dependencies();
        if (threadIdx.x < 128) {
            ptx::shrink_registers<40>();
            if (threadIdx.x % 32 == 0) produce(threadIdx.x / 32);
            __syncwarp();
        } else {
            ptx::grow_registers<232>();
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
            const uint8_t* expanded = args.tiles + size_t(first_tile / ROW_TILES) * boxes * L::W_BYTES;
            const uint8_t* tiles = args.tiles + size_t(first_tile + p * EACH) * args.k_tiles * Weights::TILE_BYTES;
            for (uint32_t k_tile = 0; k_tile < args.k_tiles; k_tile += L::STAGE_TILES, at.advance()) {
                const uint32_t bytes = min(args.k_tiles - k_tile, uint32_t(L::STAGE_TILES)) * Weights::TILE_BYTES;
                const uint32_t barrier = full + 8 * at.stage;
                ptx::barrier_wait(empty + 8 * at.stage, at.parity ^ 1);
                if (p == 0) {
                    ptx::barrier_arrive_expect(barrier, L::X_BYTES + (IS_EXPANDED ? L::W_BYTES : here * bytes));
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
                if constexpr (IS_EXPANDED) {
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
        // The first turn of `multiply_promoting` is the first warpgroup's.
        if (IS_EXPANDED && threadIdx.x / 128 == 2) ptx::named_barrier_arrive(TURN_BARRIER, 256);
        for (uint32_t index = blockIdx.x / CLUSTER; index < schedule.count(); index += gridDim.x / CLUSTER) {
            const uint2 block = schedule.at(index);
            float acc[TOKENS / 2];
            if constexpr (IS_EXPANDED) {
                multiply_promoting(at, acc);
            } else {
                multiply(at, acc);
            }
            store(acc, first_row(block), block.y * TOKENS);
        }
    }

    __device__ __forceinline__ uint32_t stage_before(uint32_t stage) const { return stage == 0 ? STAGES - 1 : stage - 1; }

    /// One block in BF16. An instruction with A in registers holds the warp until the tensor core takes it: so the next
    /// tile is decoded between the instructions of this one, and the tensor core always has one to go on with.
    __device__ __forceinline__ void multiply(Cursor<STAGES>& at, float (&acc)[TOKENS / 2]) const {
        const uint32_t tiles = args.k_tiles;
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
            const uint64_t x = ptx::swizzled_descriptor(x_stages + at.stage * L::X_BYTES + box * L::BOX_BYTES);
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

    /// One block in E4M3. The tensor core adds with fewer bits than FP32 has, so every 128 of K go through accumulators of
    /// their own, half of the tokens at a time. The warpgroups take turns, so that one multiplies while the other adds up.
    __device__ __forceinline__ void multiply_promoting(Cursor<STAGES>& at, float (&acc)[TOKENS / 2]) const {
        constexpr int PART = 128;
        const uint32_t group = threadIdx.x / 128 - 1;
        float sums[PART / 2];
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) acc[i] = 0.0f;
        for (uint32_t k_tile = 0; k_tile < args.k_tiles; k_tile += L::STAGE_TILES, at.advance()) {
            ptx::barrier_wait(full + 8 * at.stage, at.parity);
            const uint64_t x = ptx::swizzled_descriptor(x_stages + at.stage * L::X_BYTES);
            const uint64_t w = ptx::swizzled_descriptor(
                ptx::shared_address(w_stages) + at.stage * L::W_BYTES + group * 64 * X_ROW_BYTES);
#pragma unroll
            for (int p = 0; p < TOKENS / PART; ++p) {
                ptx::named_barrier(TURN_BARRIER + group, 256);
                ptx::wgmma_fence();
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    ptx::SharedWgmma<Operand::E4m3, PART>::run(
                        sums, w + ptx::descriptor_step(32 * j),
                        x + ptx::descriptor_step(p * PART * X_ROW_BYTES + 32 * j), j > 0);
                }
                ptx::wgmma_commit();
                ptx::named_barrier_arrive(TURN_BARRIER + 1 - group, 256);
                ptx::wgmma_wait<0>();
                ptx::pin(sums);
                if (p == TOKENS / PART - 1) release(at.stage);
#pragma unroll
                for (int i = 0; i < PART / 2; ++i) acc[p * (PART / 2) + i] += sums[i];
            }
        }
    }

    /// Scales and writes a block. `acc` is as wgmma leaves it: see ptx/wgmma.cuh.
    __device__ __forceinline__ void store(const float (&acc)[TOKENS / 2], uint32_t block_row, uint32_t block_token) const {
        const uint32_t thread = threadIdx.x % 128, group = threadIdx.x / 128 - 1, warp = thread / 32, lane = thread % 32;
        // Tiles count from the first of this launch, rows from the first of W.
        const uint32_t group_tile = block_row / TILE_ROWS + group * 4;
        if (group_tile >= args.row_tiles) return;
        const uint32_t g = lane / 4, row = (args.first_row_tile + group_tile + warp) * TILE_ROWS + g;
        float factor[2] = {0.0f, 0.0f}, bias[2] = {0.0f, 0.0f};
        if (group_tile + warp < args.row_tiles) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const Columns columns = columns_of(group_tile + warp, h);
                factor[h] = args.row_factors[row + 8 * h] * args.factor;
                if (args.bias != nullptr && columns.first + g < columns.end) bias[h] = args.bias[columns.first + g];
            }
        }
#pragma unroll
        for (int first = 0; first < TOKENS; first += STAGED_TOKENS) {
            const uint32_t chunk_token = block_token + first;
            if (chunk_token >= args.m) break;
            float2 by[STAGED_TOKENS / 8];
#pragma unroll
            for (int j = 0; j < STAGED_TOKENS / 8; ++j) {
                const uint32_t token = chunk_token + 8 * j + lane % 4 * 2;
                by[j] = make_float2(1.0f, 1.0f);
                if (args.token_factors != nullptr) {
                    if (token < args.m) by[j].x = args.token_factors[token];
                    if (token + 1 < args.m) by[j].y = args.token_factors[token + 1];
                }
            }
            const auto value = [&](int j, int h, int i) {
                return acc[first / 2 + 4 * j + 2 * h + i] * factor[h] * (i == 0 ? by[j].x : by[j].y) + bias[h];
            };
            if (args.is_f32) {
                // Eight lanes write 32 bytes of one token.
                float* const out = static_cast<float*>(args.out);
#pragma unroll
                for (int e = 0; e < STAGED_TOKENS / 2; ++e) {
                    const int j = e / 4, h = e / 2 % 2, i = e % 2;
                    const uint32_t token = chunk_token + 8 * j + lane % 4 * 2 + i;
                    const Columns columns = columns_of(group_tile + warp, h);
                    if (token < args.m && columns.first + g < columns.end) {
                        out[token * args.out_stride + columns.first + g] = value(j, h, i);
                    }
                }
                continue;
            }
            // Through shared memory: the 64 results of a token are 128 bytes, whose eights are permuted by the token, so
            // that neither way has bank conflicts.
            const uint32_t mine = staging + group * STAGING_BYTES;
            const auto place = [&](uint32_t token, uint32_t eight) { return mine + token * 128 + (eight ^ token % 8) * 16; };
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
            const Columns columns = columns_of(group_tile + eight / 2, eight % 2);
            __nv_bfloat16* const out = static_cast<__nv_bfloat16*>(args.out) + columns.first;
#pragma unroll
            for (int pass = 0; pass < STAGED_TOKENS / 16; ++pass) {
                const uint32_t local = pass * 16 + thread / 8, token = chunk_token + local;
                uint4 results;
                asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                             : "=r"(results.x), "=r"(results.y), "=r"(results.z), "=r"(results.w)
                             : "r"(place(local, eight))
                             : "memory");
                if (token >= args.m || columns.first >= columns.end) continue;
                __nv_bfloat16* const to = out + token * args.out_stride;
                if (args.aligned && columns.first + 8 <= columns.end) {
                    *reinterpret_cast<uint4*>(to) = results;
                } else {
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        const uint32_t word = i < 2 ? results.x : i < 4 ? results.y : i < 6 ? results.z : results.w;
                        if (columns.first + i < columns.end) {
                            reinterpret_cast<uint16_t*>(to)[i] = uint16_t(i % 2 == 0 ? word : word >> 16);
                        }
                    }
                }
            }
        }
    }

    /// Columns of the result that eight rows of a tile are: as many of eight as are before `end`.
    struct Columns {
        uint32_t first, end;
    };

    /// Those of rows 8 * `h` and on of the launch's tile `row_tile`; none beyond the last tile.
    __device__ __forceinline__ Columns columns_of(uint32_t row_tile, uint32_t h) const {
        const uint32_t tile = args.first_row_tile + row_tile, half = args.paired_half;
        if (row_tile >= args.row_tiles) return {0, 0};
        if (half == 0) return {tile * TILE_ROWS + 8 * h, args.n};
        return {tile * 8 + h * half, h == 0 ? half : args.n};
    }
};

/// Packed weights, which become BF16 in registers.
template <tile::Format FORMAT>
struct Packed {
    static constexpr Operand OPERAND = Operand::Bf16;
    static constexpr int TILE_BYTES = tile::bytes(FORMAT), ACTIVATION_BYTES = 2;
    using Lane = tile::Lane<FORMAT>;

    static __device__ __forceinline__ void load(Lane& lane, const uint8_t* at) { lane.load(at, threadIdx.x % 32); }

    template <int J>
    static __device__ __forceinline__ void fragment(const Lane& lane, uint32_t (&a)[4]) {
        lane.template fragment<J>(a);
    }
};

/// Weights expanded to E4M3 by `expand_*`: for each 128 rows and 128 of K, 16 KiB as they are to be in shared memory.
struct Expanded {
    static constexpr Operand OPERAND = Operand::E4m3;
    static constexpr int TILE_BYTES = tile::ROWS * tile::COLS, ACTIVATION_BYTES = 1;
};

}  // namespace gemm

// out[m][n] = sum_k x[m][k] w[n][k] for few rows of x: a persistent grid streams each weight tile once.
//
// K is cut into SEGMENTS, each summed by one warp; the segments' sums are added in a fixed tree. So a result depends
// neither on M, nor on the grid, nor on the cluster. A cluster of S CTAs takes 16 S / SEGMENTS rows of tiles (16 outputs
// each) at a time: CTA `rank` has the x of its SEGMENTS / S segments in shared memory, and its 16 warps multiply them
// with all these rows. Each warp streams its part of the weights through a ring of its own by bulk copies, decodes tiles
// as the A operand of the tensor cores, and sends its sums to the CTA of the cluster that finishes the row of tiles.
#pragma once

#include <cuda_bf16.h>

#include "mx/tile.cuh"
#include "ops/swiglu.cuh"
#include "ptx/async_copy.cuh"
#include "ptx/barrier.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/launch.cuh"
#include "ptx/mma.cuh"

namespace decode {

/// What a product is of; passed by value.
struct Params {
    const uint8_t* tiles;    // [row_tiles][k_tiles] of tile::bytes(FORMAT)
    const float* factors;    // [16 * row_tiles]
    const float* bias;       // [n] or null
    const __nv_bfloat16* x;  // [m][k], k a multiple of 8
    void* out;               // [m][out_width], BF16 or F32
    int m, n, k;
    int row_tiles, k_tiles;
    int cluster;             // CTAs of a cluster: 1, 2, 4, 8
    int out_width, column;   // the product's first column in a row of `out`
    int out_is_f32;
    int is_gated;            // rows g and g + 8 of tile i are gate and up of result 8 i + g: `out` is silu(gate) * up
};

/// Shared memory: ring | barriers | sums | x.
template <tile::Format FORMAT, int M_TILE, int WARPS, int SEGMENTS, int STAGE_TILES, int STAGES>
struct Shape {
    static constexpr int TILE_BYTES = tile::bytes(FORMAT);
    static constexpr int STAGE_BYTES = STAGE_TILES * TILE_BYTES;
    static constexpr int RING_BYTES = WARPS * STAGES * STAGE_BYTES;
    /// Barriers: of the rings; two per group of warps that finishes a row of tiles.
    static constexpr int BARRIERS = RING_BYTES, GROUP_BARRIERS = BARRIERS + WARPS * STAGES * 8;
    static constexpr int GROUPS = WARPS / SEGMENTS;
    static constexpr int SUMS = (GROUP_BARRIERS + 2 * GROUPS * 8 + 15) / 16 * 16;

    /// Floats from one of a warp's 16 outputs to the next: M of them, rounded up to even as a lane has two tokens, and
    /// padding, with which 16 outputs of a token lie in different banks.
    __host__ __device__ static constexpr int sum_stride(int m) { return (m + 1) / 2 * 2 + 2; }
    __host__ __device__ static constexpr int sum_floats(int m) { return tile::ROWS * sum_stride(m); }
    /// Sums of the round before are read while those of this round are computed: there are two buffers of them.
    __host__ __device__ static constexpr int sum_bytes(int m) { return WARPS * sum_floats(m) * 4; }
    __host__ __device__ static constexpr int x_offset(int m) { return SUMS + 2 * sum_bytes(m); }
    /// Bytes from a token of x to the next: eight neighbours lie in different banks.
    __host__ __device__ static constexpr int x_stride(int k_tiles) { return k_tiles * 128 + 16; }
    static constexpr int shared_bytes(int m, int k_tiles, int cluster) {
        return x_offset(m) + m * x_stride((k_tiles + cluster - 1) / cluster);
    }
};

/// The sum of `COUNT` values, `stride` apart: neighbours first, then pairs of them, and so on.
template <int COUNT>
__device__ __forceinline__ float tree_sum(const float* values, int stride) {
    if constexpr (COUNT == 1) {
        return *values;
    } else {
        return tree_sum<COUNT / 2>(values, stride) + tree_sum<COUNT / 2>(values + COUNT / 2 * stride, stride);
    }
}

/// Brings columns `64 first_tile ..` of x to shared memory, `tiles * 64` of them; those beyond K, a multiple of 8, are
/// zeros. The calling thread's part is there on return.
__device__ __forceinline__ void load_x(uint8_t* shared, const Params& p, int first_tile, int tiles, int stride) {
    const int first = first_tile * tile::COLS, columns = tiles * tile::COLS;
    const __nv_bfloat16* row = p.x + first;
    uint32_t target = ptx::shared_address(shared);
    // All on their way at once. Bulk copies would queue behind those of the weights.
    for (int m = 0; m < p.m; ++m, row += p.k, target += stride) {
        for (int column = threadIdx.x * 8; column < columns; column += blockDim.x * 8) {
            const bool present = first + column < p.k;
            ptx::copy_async(target + column * 2, present ? row + column : p.x, present);
        }
    }
    ptx::copy_commit();
    ptx::copy_wait<0>();
}

/// As `ptx::load_matrices`, from memory that nobody writes any more: other accesses may move across it.
__device__ __forceinline__ void load_constant_matrices(uint32_t (&m)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row));
}

/// Multiplies one tile by the x of its columns: `x` are the lane's addresses of the rows that it loads. Each half of the
/// tile along K has sums of its own, which are added in the end: two chains of dependent products overlap.
template <tile::Format FORMAT, int M_TILE>
__device__ __forceinline__ void multiply_tile(float (&sums)[2][M_TILE / 8][4], const uint8_t* tile, int lane,
                                              const uint32_t (&x)[M_TILE / 8], int offset) {
    tile::Lane<FORMAT> weights;
    weights.load(tile, lane);
    uint32_t a[4], b[2][M_TILE / 8][4];
#pragma unroll
    for (int j = 0; j < M_TILE / 8; ++j) {
        load_constant_matrices(b[0][j], x[j] + offset);
        load_constant_matrices(b[1][j], x[j] + offset + 64);
    }
    weights.template fragment<0>(a);
#pragma unroll
    for (int j = 0; j < M_TILE / 8; ++j) ptx::mma_bf16(sums[0][j], a, b[0][j][0], b[0][j][1]);
    weights.template fragment<2>(a);
#pragma unroll
    for (int j = 0; j < M_TILE / 8; ++j) ptx::mma_bf16(sums[1][j], a, b[1][j][0], b[1][j][1]);
    weights.template fragment<1>(a);
#pragma unroll
    for (int j = 0; j < M_TILE / 8; ++j) ptx::mma_bf16(sums[0][j], a, b[0][j][2], b[0][j][3]);
    weights.template fragment<3>(a);
#pragma unroll
    for (int j = 0; j < M_TILE / 8; ++j) ptx::mma_bf16(sums[1][j], a, b[1][j][2], b[1][j][3]);
}

/// As `finish`, for a gated product: two sums to a result.
template <int SEGMENTS>
__device__ __forceinline__ void finish_gated(const Params& p, const float* sums, int sum_stride, int row_tile, int thread) {
    constexpr int ROWS = tile::ROWS / 2;
    const int half = p.n / 2;
    for (int i = thread; i < ROWS * p.m; i += 32 * SEGMENTS) {
        const int token = i / ROWS, row = i % ROWS, n = row_tile * ROWS + row;
        if (n >= half) continue;
        float values[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int in_tile = row + ROWS * h;
            const float sum = tree_sum<SEGMENTS>(sums + in_tile * sum_stride + token, tile::ROWS * sum_stride);
            values[h] = sum * p.factors[row_tile * tile::ROWS + in_tile] + (p.bias != nullptr ? p.bias[n + half * h] : 0.0f);
        }
        static_cast<__nv_bfloat16*>(p.out)[size_t(token) * p.out_width + n] =
            __float2bfloat16(ops::swiglu(values[0], values[1]));
    }
}

/// Adds up the segments of one row of tiles and writes the results; by `32 * SEGMENTS` threads.
template <int SEGMENTS>
__device__ __forceinline__ void finish(const Params& p, const float* sums, int sum_stride, int row_tile, int thread) {
    if (p.is_gated) return finish_gated<SEGMENTS>(p, sums, sum_stride, row_tile, thread);
    for (int i = thread; i < tile::ROWS * p.m; i += 32 * SEGMENTS) {
        const int token = i / tile::ROWS, row = i % tile::ROWS, n = row_tile * tile::ROWS + row;
        if (n >= p.n) continue;
        const float sum = tree_sum<SEGMENTS>(sums + row * sum_stride + token, tile::ROWS * sum_stride);
        const float value = sum * p.factors[n] + (p.bias != nullptr ? p.bias[n] : 0.0f);
        const size_t at = size_t(token) * p.out_width + p.column + n;
        if (p.out_is_f32) {
            static_cast<float*>(p.out)[at] = value;
        } else {
            static_cast<__nv_bfloat16*>(p.out)[at] = __float2bfloat16(value);
        }
    }
}

template <tile::Format FORMAT, int M_TILE, int WARPS, int SEGMENTS, int STAGE_TILES, int STAGES>
__device__ __forceinline__ void gemm(const Params& p) {
    using S = Shape<FORMAT, M_TILE, WARPS, SEGMENTS, STAGE_TILES, STAGES>;
    extern __shared__ __align__(128) uint8_t shared[];
    // The same in all lanes, and known to be so by the compiler.
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int rank = ptx::cluster_rank(), clusters = gridDim.x / p.cluster, cluster = blockIdx.x / p.cluster;
    const int warps_of_row = SEGMENTS / p.cluster;
    const int row_in_cluster = warp / warps_of_row, segment = rank * warps_of_row + warp % warps_of_row;
    const int first_k = p.k_tiles * segment / SEGMENTS, tiles = p.k_tiles * (segment + 1) / SEGMENTS - first_k;
    // Row `i` of the cluster's rows in round r is clusters * (i + rows_of_cluster * r) + cluster.
    const int row_step = clusters * p.cluster * S::GROUPS, first_row = clusters * row_in_cluster + cluster;
    const int group = warp / SEGMENTS;

    const uint32_t base = ptx::shared_address(shared);
    const uint32_t ring = base + warp * STAGES * S::STAGE_BYTES;
    const uint32_t barriers = base + S::BARRIERS + warp * STAGES * 8;
    const uint32_t group_barriers = base + S::GROUP_BARRIERS + group * 16;
    if (lane < STAGES) ptx::barrier_init(barriers + lane * 8, 1);
    // In a cluster the bytes of the sums are counted; alone, the warps that have stored theirs.
    if (warp % SEGMENTS == 0 && lane < 2) ptx::barrier_init(group_barriers + lane * 8, p.cluster > 1 ? 1 : SEGMENTS);
    ptx::barrier_init_fence();
    __syncwarp();

    // What is left to fetch: `fetch_rows` rows of `tiles` tiles, of the first one `fetch_tiles`.
    const uint8_t* source = p.tiles + (size_t(first_row) * p.k_tiles + first_k) * S::TILE_BYTES;
    const size_t row_gap = (size_t(row_step) * p.k_tiles - tiles) * S::TILE_BYTES;
    int fetch_tiles = tiles;
    int fetch_rows = tiles > 0 && first_row < p.row_tiles ? (p.row_tiles - 1 - first_row) / row_step + 1 : 0;
    auto fetch = [&](int stage) {
        if (fetch_rows == 0) return;
        const int count = min(STAGE_TILES, fetch_tiles);
        const uint32_t bytes = count * S::TILE_BYTES;
        if (ptx::elect_one()) {
            ptx::barrier_arrive_expect(barriers + stage * 8, bytes);
            ptx::bulk_load(ring + stage * S::STAGE_BYTES, source, bytes, barriers + stage * 8, ptx::L2_EVICT_FIRST);
        }
        source += bytes;
        fetch_tiles -= count;
        if (fetch_tiles == 0) fetch_tiles = tiles, source += row_gap, --fetch_rows;
    };
    for (int stage = 0; stage < STAGES; ++stage) fetch(stage);
    ptx::launch_dependents();

    const int x_tile = p.k_tiles * rank / p.cluster, x_tiles = p.k_tiles * (rank + 1) / p.cluster - x_tile;
    const int x_stride = S::x_stride(x_tiles);
    ptx::wait_for_dependencies();
    load_x(shared + S::x_offset(p.m), p, x_tile, x_tiles, x_stride);
    // From here on the CTAs of a cluster may write to each other's sums.
    if (p.cluster > 1) {
        ptx::cluster_sync();
    } else {
        __syncthreads();
    }

    // Lane l gives the address of token l % 8, columns 8 (l / 8) and on. Tokens beyond M are some others again: what
    // comes out for them is not written.
    uint32_t x_first[M_TILE / 8];
#pragma unroll
    for (int j = 0; j < M_TILE / 8; ++j) {
        x_first[j] = base + S::x_offset(p.m) + (8 * j + lane % 8) % p.m * x_stride + lane / 8 * 16 + (first_k - x_tile) * 128;
    }

    // Where this warp's sums go: to the CTA and the group there that finish its row.
    const int sum_stride = S::sum_stride(p.m), sum_bytes = S::sum_bytes(p.m);
    const int finisher = row_in_cluster / S::GROUPS, finishing_group = row_in_cluster % S::GROUPS;
    const uint32_t my_sums = S::SUMS + (finishing_group * SEGMENTS + segment) * S::sum_floats(p.m) * 4 +
                             (lane / 4 * sum_stride + lane % 4 * 2) * 4;
    const uint32_t remote_sums = ptx::remote_address(base + my_sums, finisher);
    const uint32_t remote_barriers =
        ptx::remote_address(base + S::GROUP_BARRIERS + finishing_group * 16, finisher);
    const uint32_t expected_bytes = SEGMENTS * tile::ROWS * ((p.m + 1) / 2 * 2) * 4;

    int finish_row = clusters * (rank * S::GROUPS + group) + cluster;
    // Adds up and writes the results of `round`.
    auto finish_round = [&](int round) {
        ptx::barrier_wait(group_barriers + round % 2 * 8, round / 2 % 2);
        const uint8_t* sums =
            shared + S::SUMS + round % 2 * sum_bytes + group * SEGMENTS * S::sum_floats(p.m) * 4;
        if (finish_row < p.row_tiles) {
            finish<SEGMENTS>(p, reinterpret_cast<const float*>(sums), sum_stride, finish_row,
                             warp % SEGMENTS * 32 + lane);
        }
        finish_row += row_step;
    };
    int stage = 0, round = 0;
    uint32_t phase = 0;
    for (int row = first_row; row - clusters * row_in_cluster < p.row_tiles; row += row_step) {
        float sums[2][M_TILE / 8][4] = {};
        if (row < p.row_tiles) {
            uint32_t x[M_TILE / 8];
#pragma unroll
            for (int j = 0; j < M_TILE / 8; ++j) x[j] = x_first[j];
            for (int left = tiles; left > 0; left -= STAGE_TILES) {
                ptx::barrier_wait(barriers + stage * 8, phase);
                const uint8_t* stage_tiles = shared + (warp * STAGES + stage) * S::STAGE_BYTES;
                auto step = [&](int i) {
                    multiply_tile<FORMAT, M_TILE>(sums, stage_tiles + i * S::TILE_BYTES, lane, x, i * 128);
                };
                if (left >= STAGE_TILES) {
#pragma unroll
                    for (int i = 0; i < STAGE_TILES; ++i) step(i);
                } else {
                    for (int i = 0; i < left; ++i) step(i);
                }
#pragma unroll
                for (int j = 0; j < M_TILE / 8; ++j) x[j] += STAGE_TILES * 128;
                __syncwarp();
                fetch(stage);
                if (++stage == STAGES) stage = 0, phase ^= 1;
            }
        }
        // Results are finished a round later, when the sums of the slowest warp are likely there too. A buffer is
        // written again when all warps have read it: in a cluster they say so, alone it follows from the sums of the
        // round between having arrived.
        if (p.cluster > 1 && round >= 2) ptx::cluster_wait();
        if (round > 0) {
            finish_round(round - 1);
            __syncwarp();
            if (p.cluster > 1) ptx::cluster_arrive_relaxed();
        }
        const uint32_t buffer = round % 2 * sum_bytes, barrier = round % 2 * 8;
        if (p.cluster > 1 && warp % SEGMENTS == 0 && lane == 0) {
            ptx::barrier_arrive_expect(group_barriers + barrier, expected_bytes);
        }
#pragma unroll
        for (int j = 0; j < M_TILE / 8; ++j) {
            if (8 * j + lane % 4 * 2 >= p.m) continue;
            const uint32_t at = buffer + 8 * j * 4;
            float sum[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[i] = sums[0][j][i] + sums[1][j][i];
            if (p.cluster > 1) {
                ptx::store_remote(remote_sums + at, sum[0], sum[1], remote_barriers + barrier);
                ptx::store_remote(remote_sums + at + 8 * sum_stride * 4, sum[2], sum[3],
                                  remote_barriers + barrier);
            } else {
                float2* pair = reinterpret_cast<float2*>(shared + my_sums + at);
                pair[0] = make_float2(sum[0], sum[1]);
                pair[4 * sum_stride] = make_float2(sum[2], sum[3]);
            }
        }
        __syncwarp();
        if (p.cluster == 1 && lane == 0) ptx::barrier_arrive(group_barriers + barrier);
        ++round;
    }
    if (p.cluster > 1 && round >= 2) ptx::cluster_wait();
    finish_round(round - 1);
}

}  // namespace decode

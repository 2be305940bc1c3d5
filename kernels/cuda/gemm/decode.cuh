// out[m][n] = sum_k x[m][k] w[n][k] for a few rows of x: a persistent grid streams each weight tile once.
//
// K is cut into SEGMENTS, each summed by one warp; the segments' sums are added in a fixed tree. So a result depends
// neither on M, nor on the grid, nor on the cluster. A cluster of S CTAs takes 16 S / SEGMENTS rows of tiles (16 outputs
// each) at a time: CTA `rank` has the x of its SEGMENTS / S segments in shared memory, and its 16 warps multiply them
// with all these rows. Each warp streams its part of the weights through a ring of its own by bulk copies, decodes tiles
// as the A operand of the tensor cores, and sends its sums to the CTA of the cluster that finishes the row of tiles.
#pragma once

#include "gemm/decode_parts.cuh"
#include "ops/swiglu.cuh"
#include "ptx/async_copy.cuh"

namespace decode {

/// Shared memory: ring | barriers | sums | x, and as much as a group of tiles has of it, which may be read beyond the end.
template <tile::Format FORMAT, int SEGMENTS, int STAGE_TILES, int STAGES>
struct Shape {
    using Ring = WarpRing<FORMAT, STAGE_TILES, STAGES>;
    /// Barriers: of the rings; two per group of warps that finishes a row of tiles.
    static constexpr int BARRIERS = WARPS * Ring::BYTES, GROUP_BARRIERS = BARRIERS + WARPS * STAGES * 8;
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
};

/// Brings columns `64 first_tile ..` of x, times 2^EXPONENT, to shared memory, `tiles * 64` of them; those beyond K, a
/// multiple of 8, are zeros. As many loads as registers allow are on their way at once: bulk copies would queue behind those
/// of the weights, and asynchronous ones would have to be multiplied afterwards.
template <int EXPONENT>
__device__ __forceinline__ void load_x(uint8_t* shared, const Params& p, int first_tile, int tiles, int stride) {
    constexpr int VECTOR = 8, ROWS = 8;
    const int first = first_tile * tile::COLS, columns = tiles * tile::COLS;
    for (int column = threadIdx.x * VECTOR; column < columns; column += 32 * WARPS * VECTOR) {
        for (int row = 0; row < p.m; row += ROWS) {
            uint4 values[ROWS];
#pragma unroll
            for (int i = 0; i < ROWS; ++i) {
                const bool present = row + i < p.m && first + column < p.k;
                const __nv_bfloat16* from = p.x + size_t(row + i) * p.k + first + column;
                values[i] = present ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (int i = 0; i < ROWS; ++i) {
                if (row + i >= p.m) break;
                *reinterpret_cast<uint4*>(shared + (row + i) * stride + column * 2) = scaled<EXPONENT>(values[i]);
            }
        }
    }
}

/// As `finish`, for a gated product: two sums to a result.
template <int SEGMENTS>
__device__ __forceinline__ void finish_gated(const Params& p, const float* sums, int sum_stride, int row_tile, int thread,
                                             float factor) {
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
            values[h] = sum * (p.factors[row_tile * tile::ROWS + in_tile] * factor) +
                        (p.bias != nullptr ? p.bias[n + half * h] : 0.0f);
        }
        static_cast<__nv_bfloat16*>(p.out)[size_t(token) * p.out_width + n] =
            __float2bfloat16(ops::swiglu(values[0], values[1]));
    }
}

/// Adds up the segments of one row of tiles and writes the results, times `factor`; by `32 * SEGMENTS` threads.
template <int SEGMENTS>
__device__ __forceinline__ void finish(const Params& p, const float* sums, int sum_stride, int row_tile, int thread,
                                       float factor) {
    if (p.is_gated) return finish_gated<SEGMENTS>(p, sums, sum_stride, row_tile, thread, factor);
    for (int i = thread; i < tile::ROWS * p.m; i += 32 * SEGMENTS) {
        const int token = i / tile::ROWS, row = i % tile::ROWS, n = row_tile * tile::ROWS + row;
        if (n >= p.n) continue;
        const float sum = tree_sum<SEGMENTS>(sums + row * sum_stride + token, tile::ROWS * sum_stride);
        const float value = sum * (p.factors[n] * factor) + (p.bias != nullptr ? p.bias[n] : 0.0f);
        const size_t at = size_t(token) * p.out_width + p.column + n;
        if (p.out_is_f32) {
            static_cast<float*>(p.out)[at] = value;
        } else {
            static_cast<__nv_bfloat16*>(p.out)[at] = __float2bfloat16(value);
        }
    }
}

template <tile::Format FORMAT, int M_TILE, int SEGMENTS, int STAGE_TILES, int STAGES>
__device__ __forceinline__ void gemm(const Params& p) {
    using S = Shape<FORMAT, SEGMENTS, STAGE_TILES, STAGES>;
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
    const uint32_t group_barriers = base + S::GROUP_BARRIERS + group * 16;
    // In a cluster the bytes of the sums are counted; alone, the warps that have stored theirs.
    if (warp % SEGMENTS == 0 && lane < 2) ptx::barrier_init(group_barriers + lane * 8, p.cluster > 1 ? 1 : SEGMENTS);
    typename S::Ring ring(p, base + warp * S::Ring::BYTES, base + S::BARRIERS + warp * STAGES * 8, first_row, row_step,
                          first_k, tiles, lane);
    for (int stage = 0; stage < STAGES; ++stage) ring.fetch(p, stage);
    ptx::launch_dependents();

    const int x_tile = p.k_tiles * rank / p.cluster, x_tiles = p.k_tiles * (rank + 1) / p.cluster - x_tile;
    const int x_stride = S::x_stride(x_tiles);
    ptx::wait_for_dependencies();
    load_x<X_EXPONENT<FORMAT>>(shared + S::x_offset(p.m), p, x_tile, x_tiles, x_stride);
    // From here on the CTAs of a cluster may write to each other's sums.
    if (p.cluster > 1) {
        ptx::cluster_sync();
    } else {
        __syncthreads();
    }

    constexpr int TOKEN_TILES = M_TILE / 8;
    using WarpSums = Sums<FORMAT, TOKEN_TILES>;
    uint32_t x_first[TOKEN_TILES];
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; ++j) {
        x_first[j] = base + S::x_offset(p.m) + WarpSums::x_place(lane, j, p.m, x_stride) + (first_k - x_tile) * 128;
    }

    // Where this warp's sums go: to the CTA and the group there that finish its row.
    const int sum_stride = S::sum_stride(p.m), sum_bytes = S::sum_bytes(p.m);
    const int finisher = row_in_cluster / S::GROUPS, finishing_group = row_in_cluster % S::GROUPS;
    const uint32_t my_sums = S::SUMS + (finishing_group * SEGMENTS + segment) * S::sum_floats(p.m) * 4 +
                             (lane / 4 * sum_stride + lane % 4 * 2) * 4;

    // Adds up and writes the results of `round`.
    auto finish_round = [&](uint32_t round) {
        ptx::barrier_wait(group_barriers + round % 2 * 8, round / 2 % 2);
        const uint8_t* sums =
            shared + S::SUMS + round % 2 * sum_bytes + group * SEGMENTS * S::sum_floats(p.m) * 4;
        const int finish_row = clusters * (rank * S::GROUPS + group) + cluster + int(round) * row_step;
        if (finish_row < p.row_tiles) {
            finish<SEGMENTS>(p, reinterpret_cast<const float*>(sums), sum_stride, finish_row,
                             warp % SEGMENTS * 32 + lane, __uint_as_float(uint32_t(127 - X_EXPONENT<FORMAT>) << 23));
        }
    };
    uint32_t round = 0;
    for (; cluster + int(round) * row_step < p.row_tiles; ++round) {
        // The factors come from memory: asked for now, they are in L2 when the results are finished. All warps ask, since a
        // question of which one does takes a register more than there are.
        if (FORMAT != tile::Format::Bf16 && lane == 0) {
            const int finish_row = clusters * (rank * S::GROUPS + group) + cluster + int(round) * row_step;
            if (finish_row < p.row_tiles) ptx::prefetch_l2(p.factors + finish_row * tile::ROWS);
        }
        float totals[TOKEN_TILES][4] = {};
        if (first_row + int(round) * row_step < p.row_tiles) {
            WarpSums sums;
            for (int left = tiles; left > 0; left -= GROUP_TILES) {
                sums.begin(x_first, (tiles - left) * 128);
                multiply_stages<STAGE_TILES>(sums, left, [&] { return shared + (ring.wait() - base); },
                                             [&] { ring.release(p); }, lane);
                sums.end();
            }
            sums.total(totals);
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
            ptx::barrier_arrive_expect(group_barriers + barrier, SEGMENTS * tile::ROWS * ((p.m + 1) / 2 * 2) * 4);
        }
#pragma unroll
        for (int j = 0; j < TOKEN_TILES; ++j) {
            if (8 * j + lane % 4 * 2 >= p.m) continue;
            const uint32_t at = buffer + 8 * j * 4;
            const float(&sum)[4] = totals[j];
            if (p.cluster > 1) {
                const uint32_t remote_sums = ptx::remote_address(base + my_sums, finisher);
                const uint32_t remote_barriers =
                    ptx::remote_address(base + S::GROUP_BARRIERS + finishing_group * 16, finisher);
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
    }
    if (p.cluster > 1 && round >= 2) ptx::cluster_wait();
    finish_round(round - 1);
}

}  // namespace decode

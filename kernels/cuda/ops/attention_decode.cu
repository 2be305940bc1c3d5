// Attention of sequences with one new row, over the paged cache, keys split over warps and CTAs.
//
// A sequence's blocks of 16 tokens form up to `max_chunks` equal chunks. The four warps of a CTA take the blocks of a
// chunk in turn, each with an online softmax of its own; the chunk's result merges them in order of warps, and the
// row's result folds the chunks in order. So the arithmetic depends on the context's length alone: how many CTAs share
// a row (gridDim.y) only decides who does the work. With one, it folds in registers; with several, chunks go through
// memory and the CTA that arrives last folds them.
//
// Up to eight query heads of a KV head are the columns of the products: S^T[16 keys, heads] = K Q^T and
// O^T[DIM, heads] += V^T P^T.
#include "ops/attention.cuh"
#include "ops/kv.cuh"
#include "ops/vector.cuh"
#include "ptx/barrier.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/launch.cuh"
#include "ptx/mma.cuh"

namespace ops {

constexpr int DECODE_WARPS = 4;
constexpr int DECODE_STAGES = 2;
/// Query heads of a CTA.
constexpr int HEAD_TILE = 8;

/// Floats between heads in results of chunks: DIM values, maximum, sum, padding that spreads heads over banks.
template <int DIM>
constexpr int RESULT_STRIDE = DIM + 4;

struct DecodeSplit {
    /// [sequences * tiles, max_chunks, heads, RESULT_STRIDE]
    float* results;
    /// [sequences * tiles], zero between launches.
    uint32_t* arrivals;
    int max_chunks;
};

/// Appends a later result to an earlier one. Written out in single operations: both places that fold must round alike.
struct Fold {
    float keep, take;

    __device__ __forceinline__ Fold(Softmax& total, Softmax next) {
        const float max = fmaxf(total.max, next.max), reference = finite_max(max);
        keep = exp2f(total.max - reference);
        take = exp2f(next.max - reference);
        total.max = max;
        total.sum = apply(total.sum, next.sum);
    }

    __device__ __forceinline__ float apply(float total, float next) const {
        return __fmaf_rn(total, keep, __fmul_rn(next, take));
    }
};

template <int DIM>
struct DecodeAttention {
    static constexpr int PIECES = DIM / 8, STEPS = DIM / 16;
    static constexpr int TILE_BYTES = BLOCK_BYTES<DIM>, STAGE_BYTES = 2 * TILE_BYTES;
    static constexpr int WARP_BYTES = DECODE_STAGES * STAGE_BYTES;
    static constexpr int THREADS = DECODE_WARPS * WARP;
    /// Pieces of four output elements a thread finishes.
    static constexpr int TASKS = (HEAD_TILE * DIM / 4 + THREADS - 1) / THREADS;

    /// Starts loading keys and values of a block; for one lane.
    static __device__ __forceinline__ void load(const AttentionArguments& a, uint32_t stage, uint32_t barrier,
                                                uint32_t block, int head) {
        const size_t offset = block_offset<DIM>(block, head, a.kv_heads);
        ptx::barrier_arrive_expect(barrier, STAGE_BYTES);
        ptx::bulk_load(stage, a.k_cache + offset, TILE_BYTES, barrier, ptx::L2_EVICT_NORMAL);
        ptx::bulk_load(stage + TILE_BYTES, a.v_cache + offset, TILE_BYTES, barrier, ptx::L2_EVICT_NORMAL);
    }

    /// Clears the values of tokens outside `from .. to`: they get no weight, and zero times NaN is NaN.
    static __device__ __forceinline__ void clear_values(uint8_t* stage, int from, int to) {
        for (int i = threadIdx.x % WARP; i < BLOCK_TOKENS * PIECES; i += WARP) {
            const int token = i / PIECES;
            if (token >= from && token < to) continue;
            *reinterpret_cast<uint4*>(stage + TILE_BYTES + piece_offset<DIM>(token, i % PIECES)) = uint4{};
        }
        // The copy engine writes here next.
        ptx::fence_proxy_async();
        __syncwarp();
    }

    /// Scores of 16 keys (rows lane / 4 and + 8) for two heads (columns 2 (lane % 4) and + 1).
    static __device__ __forceinline__ void scores(float (&s)[4], uint32_t stage, const uint32_t (&q)[STEPS][2]) {
        const int lane = threadIdx.x % WARP;
        float odd[4] = {};
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            uint32_t k[4];
            ptx::load_matrices(k, stage + piece_offset<DIM>(lane % 16, step * 2 + lane / 16));
            ptx::mma_bf16(step % 2 == 0 ? s : odd, k, q[step][0], q[step][1]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) s[i] += odd[i];
    }

    /// One block of 16 keys into a warp's running result. `sum` is of this lane's keys alone.
    static __device__ __forceinline__ void attend(float (&o)[STEPS][4], Softmax (&state)[2], uint32_t stage,
                                                  const uint32_t (&q)[STEPS][2], int start, int from, int context,
                                                  float scale_log2) {
        const int lane = threadIdx.x % WARP;
        float s[4] = {};
        scores(s, stage, q);
        const int position = start + lane / 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int p = position + (i / 2) * 8;
            s[i] = p >= from && p < context ? s[i] * scale_log2 : -INFINITY;
        }
        float keep[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float max = fmaxf(s[h], s[h + 2]);
#pragma unroll
            for (int step = 4; step < WARP; step *= 2) max = fmaxf(max, __shfl_xor_sync(0xFFFFFFFFu, max, step));
            max = fmaxf(max, state[h].max);
            const float reference = finite_max(max);
            keep[h] = exp2f(state[h].max - reference);
            s[h] = exp2f(s[h] - reference);
            s[h + 2] = exp2f(s[h + 2] - reference);
            state[h].max = max;
            state[h].sum = fmaf(state[h].sum, keep[h], s[h] + s[h + 2]);
        }
        const uint32_t p0 = ptx::transpose_matrix(pack_bf16(s[0], s[1]));
        const uint32_t p1 = ptx::transpose_matrix(pack_bf16(s[2], s[3]));
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
#pragma unroll
            for (int i = 0; i < 4; ++i) o[step][i] *= keep[i % 2];
            uint32_t v[4];
            const int token = lane % 8 + lane / 16 * 8, piece = step * 2 + lane / 8 % 2;
            ptx::load_matrices_transposed(v, stage + TILE_BYTES + piece_offset<DIM>(token, piece));
            ptx::mma_bf16(o[step], v, p0, p1);
        }
    }

    /// A warp's result of a chunk to shared memory, [heads, RESULT_STRIDE].
    static __device__ __forceinline__ void publish(float* shared, const float (&o)[STEPS][4], Softmax (&state)[2],
                                                   int heads) {
        const int lane = threadIdx.x % WARP, group = lane / 4;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int step = 4; step < WARP; step *= 2) state[h].sum += __shfl_xor_sync(0xFFFFFFFFu, state[h].sum, step);
            const int head = lane % 4 * 2 + h;
            if (head >= heads) continue;
            float* row = shared + head * RESULT_STRIDE<DIM>;
            if (group == 0) row[DIM] = state[h].max, row[DIM + 1] = state[h].sum;
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                row[step * 16 + group] = o[step][h];
                row[step * 16 + group + 8] = o[step][h + 2];
            }
        }
    }

    /// The warps' results of a chunk, merged in order, at four elements of a head.
    static __device__ __forceinline__ float4 merge(const float* shared, int heads, int head, int at, Softmax& merged) {
        const float* row = shared + head * RESULT_STRIDE<DIM>;
        const int stride = heads * RESULT_STRIDE<DIM>;
        merged = {-INFINITY, 0.0f};
#pragma unroll
        for (int warp = 0; warp < DECODE_WARPS; ++warp) merged.max = fmaxf(merged.max, row[warp * stride + DIM]);
        const float reference = finite_max(merged.max);
        float4 o = {};
#pragma unroll
        for (int warp = 0; warp < DECODE_WARPS; ++warp) {
            const float weight = exp2f(row[warp * stride + DIM] - reference);
            const float4 part = *reinterpret_cast<const float4*>(row + warp * stride + at);
            merged.sum = __fmaf_rn(row[warp * stride + DIM + 1], weight, merged.sum);
            o.x = __fmaf_rn(part.x, weight, o.x), o.y = __fmaf_rn(part.y, weight, o.y);
            o.z = __fmaf_rn(part.z, weight, o.z), o.w = __fmaf_rn(part.w, weight, o.w);
        }
        return o;
    }

    static __device__ __forceinline__ void fold(float4& o, Softmax& total, float4 next, Softmax softmax) {
        const Fold fold(total, softmax);
        o.x = fold.apply(o.x, next.x), o.y = fold.apply(o.y, next.y);
        o.z = fold.apply(o.z, next.z), o.w = fold.apply(o.w, next.w);
    }

    static __device__ __forceinline__ void finish(__nv_bfloat16* out, float4 o, Softmax total) {
        const float inverse = total.sum == 0.0f ? 0.0f : 1.0f / total.sum;
        *reinterpret_cast<uint2*>(out) =
            make_uint2(pack_bf16(o.x * inverse, o.y * inverse), pack_bf16(o.z * inverse, o.w * inverse));
    }

    static __device__ __forceinline__ void run(const AttentionArguments& a, const DecodeSplit& split) {
        extern __shared__ __align__(128) uint8_t shared[];
        const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, sequence = blockIdx.z;
        // Step inputs and the cache of earlier positions were written at least two kernels ago: they are read, and
        // their loads started, before this kernel's turn.
        const uint32_t row = a.query_start[sequence];
        if (a.query_start[sequence + 1] - row != 1) return;
        const int context = a.context_lens[sequence];
        const int from = a.window > 0 && context > a.window ? context - a.window : 0;
        const int first = from / BLOCK_TOKENS, end = (context + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
        const int rounds = max(1, (end - first + DECODE_WARPS * split.max_chunks - 1) / (DECODE_WARPS * split.max_chunks));
        const int chunk_blocks = rounds * DECODE_WARPS;
        const int chunks = max(1, (end - first + chunk_blocks - 1) / chunk_blocks);
        const int parts = min(static_cast<int>(gridDim.y), chunks), part = blockIdx.y;
        if (part >= parts) return;

        const int group = a.q_heads / a.kv_heads, tiles = (group + HEAD_TILE - 1) / HEAD_TILE;
        const int kv_head = blockIdx.x / tiles, head_tile = blockIdx.x % tiles;
        const int heads = min(HEAD_TILE, group - head_tile * HEAD_TILE);
        const int first_head = kv_head * group + head_tile * HEAD_TILE;
        const uint32_t* table = a.block_tables + static_cast<size_t>(sequence) * a.max_blocks;
        uint8_t* stages = shared + warp * WARP_BYTES;
        float* results = reinterpret_cast<float*>(shared + DECODE_WARPS * WARP_BYTES);
        __shared__ uint64_t barriers[DECODE_WARPS][DECODE_STAGES];
        const uint32_t barrier = ptx::shared_address(barriers[warp]);
        if (lane == 0) {
            for (int stage = 0; stage < DECODE_STAGES; ++stage) ptx::barrier_init(barrier + stage * 8, 1);
            ptx::barrier_init_fence();
        }
        __syncwarp();

        int load_chunk = part, load_round = 0, load_stage = 0;
        const auto load_next = [&] {
            const int block = first + load_chunk * chunk_blocks + load_round * DECODE_WARPS + warp;
            if (load_chunk < chunks && block < end) {
                if (block == end - 1) ptx::wait_for_dependencies();
                if (lane == 0)
                    load(a, ptx::shared_address(stages) + load_stage * STAGE_BYTES, barrier + load_stage * 8, table[block],
                         kv_head);
            }
            load_stage = (load_stage + 1) % DECODE_STAGES;
            if (++load_round == rounds) load_round = 0, load_chunk += parts;
        };
#pragma unroll
        for (int stage = 0; stage < DECODE_STAGES; ++stage) load_next();
        ptx::wait_for_dependencies();
        ptx::launch_dependents();

        uint32_t q[STEPS][2];
        const size_t q_row = static_cast<size_t>(row) * (a.q_heads + 2 * a.kv_heads) + first_head + lane / 4;
        const uint32_t* q_words = reinterpret_cast<const uint32_t*>(a.qkv + q_row * DIM) + lane % 4;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            q[step][0] = lane / 4 < heads ? q_words[step * 8] : 0;
            q[step][1] = lane / 4 < heads ? q_words[step * 8 + 4] : 0;
        }

        float4 total_o[TASKS] = {};
        Softmax total[TASKS];
#pragma unroll
        for (int task = 0; task < TASKS; ++task) total[task] = {-INFINITY, 0.0f};
        float* part_results = nullptr;
        if (parts > 1) {
            const size_t index = static_cast<size_t>(sequence) * gridDim.x + blockIdx.x;
            part_results = split.results + index * split.max_chunks * heads_stride(group);
        }
        int stage = 0, phase = 0;
        for (int chunk = part; chunk < chunks; chunk += parts) {
            float o[STEPS][4] = {};
            Softmax state[2] = {{-INFINITY, 0.0f}, {-INFINITY, 0.0f}};
            for (int round = 0; round < rounds; ++round) {
                const int block = first + chunk * chunk_blocks + round * DECODE_WARPS + warp, start = block * BLOCK_TOKENS;
                if (block < end) {
                    uint8_t* tile = stages + stage * STAGE_BYTES;
                    ptx::barrier_wait(barrier + stage * 8, phase);
                    if (start < from || start + BLOCK_TOKENS > context) clear_values(tile, from - start, context - start);
                    attend(o, state, ptx::shared_address(tile), q, start, from, context, a.scale_log2);
                    __syncwarp();
                }
                load_next();
                stage = (stage + 1) % DECODE_STAGES;
                phase ^= stage == 0;
            }
            publish(results + warp * heads * RESULT_STRIDE<DIM>, o, state, heads);
            __syncthreads();
#pragma unroll
            for (int task = 0; task < TASKS; ++task) {
                const int index = task * THREADS + threadIdx.x, head = index / (DIM / 4), at = index % (DIM / 4) * 4;
                if (head >= heads) continue;
                Softmax merged;
                const float4 chunk_o = merge(results, heads, head, at, merged);
                if (parts == 1) {
                    fold(total_o[task], total[task], chunk_o, merged);
                } else {
                    float* to = part_results + chunk * heads_stride(group) + head * RESULT_STRIDE<DIM>;
                    *reinterpret_cast<float4*>(to + at) = chunk_o;
                    if (at == 0) to[DIM] = merged.max, to[DIM + 1] = merged.sum;
                }
            }
            __syncthreads();
        }
        if (parts > 1) {
            if (!arrive_last(split.arrivals + static_cast<size_t>(sequence) * gridDim.x + blockIdx.x, parts)) return;
#pragma unroll
            for (int task = 0; task < TASKS; ++task) {
                const int index = task * THREADS + threadIdx.x, head = index / (DIM / 4), at = index % (DIM / 4) * 4;
                if (head >= heads) continue;
                const float* result = part_results + head * RESULT_STRIDE<DIM>;
#pragma unroll 8
                for (int chunk = 0; chunk < chunks; ++chunk, result += heads_stride(group)) {
                    const float4 chunk_o = __ldcg(reinterpret_cast<const float4*>(result + at));
                    const float2 softmax = __ldcg(reinterpret_cast<const float2*>(result + DIM));
                    fold(total_o[task], total[task], chunk_o, {softmax.x, softmax.y});
                }
            }
        }
#pragma unroll
        for (int task = 0; task < TASKS; ++task) {
            const int index = task * THREADS + threadIdx.x, head = index / (DIM / 4), at = index % (DIM / 4) * 4;
            if (head >= heads) continue;
            finish(a.out + (static_cast<size_t>(row) * a.q_heads + first_head + head) * DIM + at, total_o[task], total[task]);
        }
    }

    /// Floats of one chunk's results.
    static __device__ __forceinline__ int heads_stride(int group) { return min(group, HEAD_TILE) * RESULT_STRIDE<DIM>; }

    /// Whether this CTA is the last of `parts` whose results are written. Leaves the counter at zero.
    static __device__ __forceinline__ bool arrive_last(uint32_t* counter, int parts) {
        __shared__ bool is_last;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) is_last = atomicInc(counter, parts - 1) == parts - 1;
        __syncthreads();
        __threadfence();
        return is_last;
    }
};

}  // namespace ops

/// Rows of sequences that have exactly one. Grid: (kv_heads * ceil(q_heads / kv_heads / 8), CTAs per row and head,
/// sequences). Block: 128. Shared: see DECODE_* above.
#define OPS_ATTENTION_DECODE(DIM)                                                                                       \
    extern "C" __global__ void __launch_bounds__(128) ops_attention_decode_##DIM(                                       \
        const __grid_constant__ ops::AttentionArguments a, const __grid_constant__ ops::DecodeSplit split) {            \
        ops::DecodeAttention<DIM>::run(a, split);                                                                       \
    }

OPS_ATTENTION_DECODE(16)
OPS_ATTENTION_DECODE(32)
OPS_ATTENTION_DECODE(64)
OPS_ATTENTION_DECODE(96)
OPS_ATTENTION_DECODE(128)
OPS_ATTENTION_DECODE(256)

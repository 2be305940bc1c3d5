// Attention of sequences with one new row, over the paged cache, keys split over warps and CTAs (attention_split.cuh).
//
// The four warps of a CTA take the blocks of a chunk in turn, each with an online softmax of its own; the chunk's result
// merges them in order of warps, and the row's result folds the chunks in order. So the arithmetic depends on the context's
// length alone, whoever does the work. A row that one CTA has whole is folded in registers; the chunks of a row that several
// share go through memory, and the CTA that arrives last folds them.
//
// One more warp brings blocks of the cache to shared memory, some ahead for each that multiplies. Up to eight query heads
// of a KV head are the columns of the products: S^T[16 keys, heads] = K Q^T and O^T[DIM, heads] += V^T P^T.
#pragma once

#include "ops/attention.cuh"
#include "ops/attention_split.cuh"
#include "ops/kv.cuh"
#include "ops/vector.cuh"
#include "ptx/barrier.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/launch.cuh"
#include "ptx/mma.cuh"

namespace ops {

/// Query heads of a CTA.
constexpr int HEAD_TILE = 8;

/// Floats between heads in results of chunks: DIM values, maximum, sum, padding that spreads heads over banks.
template <int DIM>
constexpr int RESULT_STRIDE = DIM + 4;

/// Appends a later result to an earlier one. Written out in single operations: both places that fold must round alike.
struct Fold {
    float keep, take;

    __device__ __forceinline__ Fold(Softmax& total, Softmax next) {
        const float max = fmaxf(total.max, next.max), reference = finite_max(max);
        keep = exp2_approx(total.max - reference);
        take = exp2_approx(next.max - reference);
        total.max = max;
        total.sum = apply(total.sum, next.sum);
    }

    __device__ __forceinline__ float apply(float total, float next) const {
        return __fmaf_rn(total, keep, __fmul_rn(next, take));
    }
};

/// `Cache` says how a block of the cache is read: its bytes, the stages of a warp, and the two products with it.
template <typename Cache>
struct DecodeAttention {
    static constexpr int DIM = Cache::DIM, STEPS = DIM / 16, STAGES = Cache::STAGES;
    static constexpr int TILE_BYTES = Cache::BYTES, STAGE_BYTES = 2 * TILE_BYTES;
    static constexpr int WARP_BYTES = STAGES * STAGE_BYTES;
    /// Of the warps that multiply.
    static constexpr int THREADS = DECODE_WARPS * WARP;
    /// Pieces of four output elements a thread finishes.
    static constexpr int TASKS = (HEAD_TILE * DIM / 4 + THREADS - 1) / THREADS;

    /// Starts loading keys and values of a block; for one lane.
    static __device__ __forceinline__ void load(const AttentionArguments& a, uint32_t stage, uint32_t barrier,
                                                uint32_t block, int head) {
        const size_t offset = (static_cast<size_t>(block) * a.kv_heads + head) * TILE_BYTES;
        ptx::barrier_arrive_expect(barrier, STAGE_BYTES);
        ptx::bulk_load(stage, a.k_cache + offset, TILE_BYTES, barrier, ptx::L2_EVICT_NORMAL);
        ptx::bulk_load(stage + TILE_BYTES, a.v_cache + offset, TILE_BYTES, barrier, ptx::L2_EVICT_NORMAL);
    }

    /// One block of 16 keys into a warp's running result; those at `from .. to` of them, if not all, are seen. `sum` is
    /// of this lane's keys alone.
    static __device__ __forceinline__ void attend(float (&o)[STEPS][4], Softmax (&state)[2], const uint8_t* stage,
                                                  const uint32_t (&q)[STEPS][2], bool is_partial, int from, int to,
                                                  float scale_log2) {
        const int lane = threadIdx.x % WARP;
        float s[4] = {};
        Cache::scores(s, stage, q);
#pragma unroll
        for (int i = 0; i < 4; ++i) s[i] *= scale_log2;
        if (is_partial) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int key = lane / 4 + i / 2 * 8;
                if (key < from || key >= to) s[i] = -INFINITY;
            }
        }
        float keep[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float max = fmaxf(s[h], s[h + 2]);
#pragma unroll
            for (int step = 4; step < WARP; step *= 2) max = fmaxf(max, __shfl_xor_sync(0xFFFFFFFFu, max, step));
            max = fmaxf(max, state[h].max);
            const float reference = finite_max(max);
            keep[h] = exp2_approx(state[h].max - reference);
            s[h] = exp2_approx(s[h] - reference);
            s[h + 2] = exp2_approx(s[h + 2] - reference);
            state[h].max = max;
            state[h].sum = fmaf(state[h].sum, keep[h], s[h] + s[h + 2]);
        }
        if (__any_sync(0xFFFFFFFFu, keep[0] != 1.0f || keep[1] != 1.0f)) {
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
#pragma unroll
                for (int i = 0; i < 4; ++i) o[step][i] *= keep[i % 2];
            }
        }
        const uint32_t p0 = ptx::transpose_matrix(pack_bf16(s[0], s[1]));
        const uint32_t p1 = ptx::transpose_matrix(pack_bf16(s[2], s[3]));
        Cache::add_values(o, stage + TILE_BYTES, p0, p1);
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
            for (int step = 0; step < STEPS; ++step) Cache::put(row, step, group, o[step][h], o[step][h + 2]);
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
            const float weight = exp2_approx(row[warp * stride + DIM] - reference);
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

    /// Results `at .. at + 4` of a row to its head's output: element(at) says where, of every other one.
    static __device__ __forceinline__ void finish(__nv_bfloat16* out, int at, float4 o, Softmax total) {
        const float factor = Cache::UNIT / total.sum;
        *reinterpret_cast<uint32_t*>(out + Cache::element(at)) = pack_bf16(o.x * factor, o.y * factor);
        *reinterpret_cast<uint32_t*>(out + Cache::element(at + 2)) = pack_bf16(o.z * factor, o.w * factor);
    }

    /// As `finish`, to shared memory, where `store_prepared` finds blocks whole.
    static __device__ __forceinline__ void put_staged(float* head, int at, float4 o, Softmax total) {
        const float factor = Cache::UNIT / total.sum;
        *reinterpret_cast<float2*>(head + Cache::element(at)) = make_float2(o.x * factor, o.y * factor);
        *reinterpret_cast<float2*>(head + Cache::element(at + 2)) = make_float2(o.z * factor, o.w * factor);
    }

    /// Elements `at .. at + 4` of a head, prepared; eight lanes have a block.
    static __device__ __forceinline__ void store_prepared(const mx::Preparation& preparation, const float* head, int at,
                                                          __nv_bfloat16* out) {
        const float4 staged = *reinterpret_cast<const float4*>(head + at);
        float v[4] = {staged.x, staged.y, staged.z, staged.w};
        mx::prepare<mx::SideBySide<4>>(preparation, v, __activemask());
        *reinterpret_cast<uint2*>(out + at) = make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
    }

    /// Of a warp's stages: loaded, and read.
    struct Barriers {
        uint64_t full[STAGES], empty[STAGES];
    };

    /// Loads the blocks of one warp, in the order in which it takes them; for one lane. The first ones are on their way
    /// before this kernel's turn, but for the last of a sequence, which holds the new token.
    static __device__ __forceinline__ void produce(const AttentionArguments& a, const DecodeSplit& split, uint8_t* stages,
                                                   Barriers& barriers, DecodeCursor at, DecodeSequence s, int end,
                                                   int tiles, int kv_tiles) {
        const int warp = threadIdx.x % WARP;
        int stage = 0, phase = 1;
        while (at.offset < end) {
            const int kv_head = at.index / s.chunks / kv_tiles, chunk = at.index % s.chunks;
            const uint32_t* table = a.block_tables + static_cast<size_t>(at.sequence) * a.max_blocks;
            for (int round = 0; round < s.rounds; ++round) {
                const int block = s.first + (chunk * s.rounds + round) * DECODE_WARPS + warp;
                if (block >= s.end) break;
                const uint32_t number = table[block];
                ptx::barrier_wait(ptx::shared_address(&barriers.empty[stage]), phase);
                if (block == s.end - 1) ptx::wait_for_dependencies();
                load(a, ptx::shared_address(stages + stage * STAGE_BYTES), ptx::shared_address(&barriers.full[stage]),
                     number, kv_head);
                stage = (stage + 1) % STAGES;
                phase ^= stage == 0;
            }
            at.advance(a, split, tiles, s, 1, end);
        }
    }

    static __device__ __forceinline__ void run(const AttentionArguments& a, const DecodeSplit& split) {
        extern __shared__ __align__(128) uint8_t shared[];
        const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        const int group = a.q_heads / a.kv_heads, kv_tiles = (group + HEAD_TILE - 1) / HEAD_TILE;
        const int tiles = a.kv_heads * kv_tiles;
        float* results = reinterpret_cast<float*>(shared + DECODE_WARPS * WARP_BYTES);
        __shared__ Barriers barriers[DECODE_WARPS];
        if (threadIdx.x < DECODE_WARPS) {
            for (int stage = 0; stage < STAGES; ++stage) {
                ptx::barrier_init(ptx::shared_address(&barriers[threadIdx.x].full[stage]), 1);
                ptx::barrier_init(ptx::shared_address(&barriers[threadIdx.x].empty[stage]), 1);
            }
            ptx::barrier_init_fence();
        }
        __syncthreads();
        // Step inputs and the cache of earlier positions were written before this step's embedding, which lets no kernel
        // start before its own turn: they are read, and their loads started, before this kernel's turn.
        int begin, end, share;
        DecodeCursor now = find_work(a, split, tiles, begin, end, share);
        if (begin >= end) {
            // Whoever waits for this kernel waits for the ones before it, too.
            ptx::wait_for_dependencies();
            return;
        }
        DecodeSequence s(a, split, now.sequence);
        now.advance(a, split, tiles, s, (begin - now.offset + s.rounds - 1) / s.rounds, end);
        if (warp == DECODE_WARPS) {
            if (lane < DECODE_WARPS)
                produce(a, split, shared + lane * WARP_BYTES, barriers[lane], now, s, end, tiles, kv_tiles);
            return;
        }
        ptx::wait_for_dependencies();
        ptx::launch_dependents();

        uint8_t* stages = shared + warp * WARP_BYTES;
        const float scale_log2 = a.scale_log2 * Cache::UNIT;
        int stage = 0, phase = 0;
        while (now.offset < end) {
            // This CTA's chunks of a row.
            const int tile = now.index / s.chunks, first_chunk = now.index % s.chunks;
            const int chunks = min(s.chunks - first_chunk, (end - now.offset + s.rounds - 1) / s.rounds);
            const bool is_whole = chunks == s.chunks;
            const int head_tile = tile % kv_tiles, heads = min(HEAD_TILE, group - head_tile * HEAD_TILE);
            const int first_head = tile / kv_tiles * group + head_tile * HEAD_TILE;
            const int owner = (now.offset - first_chunk * s.rounds) / share;
            float* row_results = split.results + static_cast<size_t>(owner) * split.max_chunks * heads_stride(group);

            uint32_t q[STEPS][2];
            const size_t q_row = static_cast<size_t>(s.row) * (a.q_heads + 2 * a.kv_heads) + first_head + lane / 4;
            Cache::load_queries(q, a.qkv + q_row * DIM, lane / 4 < heads);
            float4 total_o[TASKS] = {};
            Softmax total[TASKS];
#pragma unroll
            for (int task = 0; task < TASKS; ++task) total[task] = {-INFINITY, 0.0f};
            for (int chunk = first_chunk; chunk < first_chunk + chunks; ++chunk) {
                float o[STEPS][4] = {};
                Softmax state[2] = {{-INFINITY, 0.0f}, {-INFINITY, 0.0f}};
                for (int round = 0; round < s.rounds; ++round) {
                    const int block = s.first + (chunk * s.rounds + round) * DECODE_WARPS + warp;
                    if (block >= s.end) break;
                    uint8_t* keys = stages + stage * STAGE_BYTES;
                    const int from = s.from - block * BLOCK_TOKENS, to = s.context - block * BLOCK_TOKENS;
                    const bool is_partial = from > 0 || to < BLOCK_TOKENS;
                    ptx::barrier_wait(ptx::shared_address(&barriers[warp].full[stage]), phase);
                    if (is_partial) Cache::clear_values(keys + TILE_BYTES, from, to);
                    attend(o, state, keys, q, is_partial, from, to, scale_log2);
                    __syncwarp();
                    if (lane == 0) ptx::barrier_arrive(ptx::shared_address(&barriers[warp].empty[stage]));
                    stage = (stage + 1) % STAGES;
                    phase ^= stage == 0;
                }
                publish(results + warp * heads * RESULT_STRIDE<DIM>, o, state, heads);
                ptx::named_barrier(1, THREADS);
                for_tasks(heads, [&](int task, int head, int at) {
                    Softmax merged;
                    const float4 chunk_o = merge(results, heads, head, at, merged);
                    if (is_whole) {
                        fold(total_o[task], total[task], chunk_o, merged);
                    } else {
                        float* to = row_results + chunk * heads_stride(group) + head * RESULT_STRIDE<DIM>;
                        *reinterpret_cast<float4*>(to + at) = chunk_o;
                        if (at == 0) to[DIM] = merged.max, to[DIM + 1] = merged.sum;
                    }
                });
                ptx::named_barrier(1, THREADS);
            }
            if (is_whole || arrive_last(split.arrivals + owner, chunks, s.chunks)) {
                const bool is_prepared = DIM % mx::BLOCK == 0 && a.preparation.is_needed();
                const auto out = [&](int head) {
                    return a.out + (static_cast<size_t>(s.row) * a.q_heads + first_head + head) * DIM;
                };
                for_tasks(heads, [&](int task, int head, int at) {
                    const float* result = row_results + head * RESULT_STRIDE<DIM>;
                    const int shared_chunks = is_whole ? 0 : s.chunks;
#pragma unroll 8
                    for (int chunk = 0; chunk < shared_chunks; ++chunk, result += heads_stride(group)) {
                        const float4 chunk_o = __ldcg(reinterpret_cast<const float4*>(result + at));
                        const float2 softmax = __ldcg(reinterpret_cast<const float2*>(result + DIM));
                        fold(total_o[task], total[task], chunk_o, {softmax.x, softmax.y});
                    }
                    if (is_prepared) {
                        put_staged(results + head * DIM, at, total_o[task], total[task]);
                    } else {
                        finish(out(head), at, total_o[task], total[task]);
                    }
                });
                if (is_prepared) {
                    ptx::named_barrier(1, THREADS);
                    for_tasks(heads, [&](int, int head, int at) {
                        store_prepared(a.preparation, results + head * DIM, at, out(head));
                    });
                    ptx::named_barrier(1, THREADS);
                }
            }
            now.advance(a, split, tiles, s, chunks, end);
        }
    }

    /// Calls `body(task, head, element)` for each piece of four output elements that is this thread's.
    template <typename Body>
    static __device__ __forceinline__ void for_tasks(int heads, Body body) {
#pragma unroll
        for (int task = 0; task < TASKS; ++task) {
            const int index = task * THREADS + threadIdx.x, head = index / (DIM / 4);
            if (head < heads) body(task, head, index % (DIM / 4) * 4);
        }
    }

    /// Floats of one chunk's results.
    static __device__ __forceinline__ int heads_stride(int group) { return min(group, HEAD_TILE) * RESULT_STRIDE<DIM>; }

    /// Whether all `chunks` of a shared row are done, now that this CTA has written `done` of them. Leaves the counter at
    /// zero.
    static __device__ __forceinline__ bool arrive_last(uint32_t* counter, int done, int chunks) {
        __shared__ bool is_last;
        __threadfence();
        ptx::named_barrier(1, THREADS);
        if (threadIdx.x == 0) {
            is_last = atomicAdd(counter, done) + done == chunks;
            if (is_last) *counter = 0;
        }
        ptx::named_barrier(1, THREADS);
        __threadfence();
        return is_last;
    }
};

}  // namespace ops

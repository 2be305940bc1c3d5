// Draws one token per row of logits: temperature, top-k, top-p, min-p, in that order, as the CPU's sampler does.
//
// Weights are e^((logit - max) / temperature). Each restriction keeps the most likely tokens, lower ids first among
// equals; the draw runs over the kept ones in order of id. A row's result depends on its logits and parameters alone.
#include "ops/vocabulary.cuh"

namespace ops {

/// Mirrors the launcher's.
struct SampleRow {
    /// 0 takes the most likely token.
    float temperature;
    float top_p, min_p;
    /// 2^32 - 1 keeps all.
    uint32_t top_k;
    uint64_t seed, draw;
};

__device__ __forceinline__ uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
}

/// A uniform number in [0, 1) that depends on (seed, draw) alone: two rounds of SplitMix64's finalizer.
__device__ __forceinline__ double uniform(uint64_t seed, uint64_t draw) {
    constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15;
    const uint64_t z = mix(mix(seed + GOLDEN) + draw * GOLDEN);
    return static_cast<double>(z >> 11) * 0x1p-53;
}

/// What the total of a set of tokens is; bits of a weight below which no threshold is of use.
struct Count {
    static constexpr uint32_t LOWEST = 1;
    static __device__ __forceinline__ uint64_t of(float) { return 1; }
};
struct Mass {
    /// 2^-45: less is 0 as an integer.
    static constexpr uint32_t LOWEST = (127 - 45) << 23;
    static __device__ __forceinline__ uint64_t of(float weight) { return fixed_point(weight); }
};

/// Thresholds tried in one pass over the weights.
constexpr int PROBES = 3;

/// Tokens of a warp that are still between two thresholds, as soon as they are few.
constexpr int MAX_LISTED = 256;
/// Passes before looking for few: by then the thresholds are about as near as neighbouring exponents.
constexpr int UNLISTED_PASSES = 2;

struct Sampler {
    RowCluster<PROBES>& cluster;
    TokenRange range;
    /// Weights of this CTA's tokens; 0 for what is dropped.
    float* weights;
    /// [MAX_LISTED] of this warp.
    uint16_t* list;

    template <typename Body>
    __device__ __forceinline__ void for_each(Body body) {
#pragma unroll 4
        for (int i = range.begin + threadIdx.x % WARP; i < range.end; i += WARP) body(i);
    }

    /// The id of the first token, in order of id, at which the running total of `measure(weight)` exceeds `target`, which
    /// the whole total does.
    template <typename Measure>
    __device__ __forceinline__ int locate(uint64_t target, Measure measure) {
        uint64_t own = 0;
        for_each([&](int i) { own += measure(weights[i]); });
        uint64_t total[1] = {own}, before[1];
        cluster.reduce<Sum>(total, before);
        // `reduce` left the warps' totals in shared memory, and nothing is written there before the next one.
        uint64_t running = before[0];
        const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        for (int i = 0; i < warp; ++i) running += cluster.shared.warps[i][0];
        uint64_t found = 0;
        if (running <= target && target < running + cluster.shared.warps[warp][0]) {
            for (int base = range.begin; base < range.end; base += WARP) {
                uint64_t sum = base + lane < range.end ? measure(weights[base + lane]) : 0;
#pragma unroll
                for (int step = 1; step < WARP; step *= 2) {
                    const uint64_t lower = __shfl_up_sync(0xFFFFFFFFu, sum, step);
                    if (lane >= step) sum += lower;
                }
                const unsigned above = __ballot_sync(0xFFFFFFFFu, running + sum > target);
                if (above != 0) {
                    found = range.first + base + __ffs(above);  // one more than the id
                    break;
                }
                running += __shfl_sync(0xFFFFFFFFu, sum, WARP - 1);
            }
        }
        __syncthreads();
        return static_cast<int>(cluster.reduce<Max>(found)) - 1;
    }

    /// Lists the warp's tokens whose weights' bits are in `low .. high`, out of all or of the `listed` ones if that is
    /// not -1; returns their number, or -1 if there are too many.
    __device__ __forceinline__ int collect(uint32_t low, uint32_t high, int listed) {
        const int lane = threadIdx.x % WARP, count = listed < 0 ? range.end - range.begin : listed;
        int kept = 0;
        for (int base = 0; base < count; base += WARP) {
            const bool inside = base + lane < count;
            const int i = !inside ? 0 : listed < 0 ? range.begin + base + lane : list[base + lane];
            const uint32_t bits = inside ? __float_as_uint(weights[i]) : 0;
            const bool keep = inside && bits >= low && bits < high;
            const unsigned keepers = __ballot_sync(0xFFFFFFFFu, keep);
            if (kept + __popc(keepers) > MAX_LISTED) return -1;
            // Behind what was read of the list, if it is rewritten.
            if (keep) list[kept + __popc(keepers & ((1u << lane) - 1))] = static_cast<uint16_t>(i);
            kept += __popc(keepers);
        }
        __syncwarp();
        return kept;
    }

    /// Keeps the shortest run of tokens, most likely first, whose total of `Measure` reaches `target` (at least 1); drops
    /// nothing if all together do not.
    template <typename Measure>
    __device__ __forceinline__ void keep_until(uint64_t target) {
        // The largest threshold whose tokens reach the target, as bits of a positive float: bits order as values do.
        uint32_t low = Measure::LOWEST, high = __float_as_uint(1.0f) + 1;
        uint64_t above = 0, reached = 0;
        int listed = -1;
        for (int pass = 0; high - low > 1; ++pass) {
            const uint32_t step = max(1u, (high - low) / (PROBES + 1));
            uint64_t totals[PROBES] = {};
            const auto add = [&](int i) {
                const uint32_t bits = __float_as_uint(weights[i]);
                const uint64_t value = Measure::of(weights[i]);
#pragma unroll
                for (int p = 0; p < PROBES; ++p) totals[p] += bits >= low + (p + 1) * step && bits < high ? value : 0;
            };
            if (listed < 0) {
                for_each(add);
            } else {
                for (int i = threadIdx.x % WARP; i < listed; i += WARP) add(list[i]);
            }
            cluster.reduce<Sum>(totals);
            const uint32_t base = low;
            const uint64_t over = above;
            const uint32_t limit = high;
#pragma unroll
            for (int p = 0; p < PROBES; ++p) {
                const uint32_t probe = base + (p + 1) * step;
                if (probe >= limit) continue;
                if (over + totals[p] >= target) {
                    low = probe, reached = over + totals[p];
                } else {
                    high = probe, above = over + totals[p];
                    break;
                }
            }
            if (reached == target) break;  // every token from `low` on is needed
            if (pass >= UNLISTED_PASSES) listed = collect(low, high, listed);
        }
        if (reached == 0) return;  // no threshold above the lowest was enough
        const float threshold = __uint_as_float(low);
        int last = INT32_MAX;
        if (reached != target) {
            // Of the tokens at the threshold, the only ones left between `low` and `high`, as many as it takes.
            const uint64_t each = Measure::of(threshold);
            if (each != 0) {
                const uint64_t ties = (target - above + each - 1) / each;
                if (above + ties * each < reached)
                    last = locate(ties - 1, [&](float w) -> uint64_t { return w == threshold ? 1 : 0; });
            }
        }
        for_each([&](int i) {
            const float w = weights[i];
            if (w < threshold || (w == threshold && range.first + i > last)) weights[i] = 0.0f;
        });
    }

    __device__ __forceinline__ uint64_t total() {
        uint64_t own = 0;
        for_each([&](int i) { own += fixed_point(weights[i]); });
        return cluster.reduce<Sum>(own);
    }

    __device__ __forceinline__ int draw(const float* row, int width, const SampleRow& p) {
        const uint64_t best = cluster.largest(row, range, ~0ull);
        const float max = key_logit(best);
        if (!(p.temperature > 0.0f) || best == 0 || isinf(max)) return key_id(best);
        const float inverse = 1.0f / p.temperature;
        for_each([&](int i) {
            const float x = row[range.first + i];
            weights[i] = x == x ? expf((x - max) * inverse) : 0.0f;
        });
        if (p.top_k == 0) return 0;
        if (p.top_k < static_cast<uint32_t>(width)) keep_until<Count>(p.top_k);
        if (p.top_p < 1.0f) {
            const double enough = ceil(static_cast<double>(p.top_p) * static_cast<double>(total()));
            keep_until<Mass>(enough < 1.0 ? 1 : static_cast<uint64_t>(enough));
        }
        uint64_t own = 0;
        for_each([&](int i) {
            if (weights[i] < p.min_p) weights[i] = 0.0f;
            own += fixed_point(weights[i]);
        });
        const uint64_t all = cluster.reduce<Sum>(own);
        if (all == 0) return 0;
        const uint64_t target = static_cast<uint64_t>(uniform(p.seed, p.draw) * static_cast<double>(all));
        return locate(min(target, all - 1), [](float w) { return fixed_point(w); });
    }
};

}  // namespace ops

/// out[m] = a token of logits[m], F32 [rows, width]. Grid: 8 * rows in clusters of 8. Block: 512. Shared:
/// ceil(width / 8) * 4 bytes.
extern "C" __global__ void __launch_bounds__(ops::ROW_THREADS)
    ops_sample(const float* logits, const ops::SampleRow* parameters, uint32_t* out, int width) {
    extern __shared__ float weights[];
    __shared__ ops::RowShared<ops::PROBES> shared;
    __shared__ uint16_t lists[ops::ROW_WARPS][ops::MAX_LISTED];
    ops::RowCluster<ops::PROBES> cluster(shared);
    const int row = blockIdx.x / ops::ROW_CTAS;
    ptx::wait_for_dependencies();
    ptx::launch_dependents();
    ops::Sampler sampler{cluster, ops::TokenRange(cluster.rank, width), weights,
                         lists[threadIdx.x / ops::WARP]};
    const int token = sampler.draw(logits + static_cast<size_t>(row) * width, width, parameters[row]);
    if (cluster.rank == 0 && threadIdx.x == 0) out[row] = token;
    // Shared memory must outlive the others' reads of it.
    ptx::cluster_sync();
}

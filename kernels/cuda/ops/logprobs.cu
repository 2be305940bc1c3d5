// Log-probabilities under softmax at temperature 1: of one token of a row, its rank, and the most likely tokens.
#include "ops/vocabulary.cuh"

namespace ops {

/// A sum of doubles over the cluster, in a fixed order.
__device__ __forceinline__ double sum_cluster(RowCluster<1>& cluster, double value) {
    __shared__ double warps[ROW_WARPS];
    __shared__ uint64_t published;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
    if (lane == 0) warps[warp] = value;
    __syncthreads();
    if (threadIdx.x == 0) {
        double sum = 0.0;
        for (int i = 0; i < ROW_WARPS; ++i) sum += warps[i];
        published = __double_as_longlong(sum);
    }
    ptx::cluster_sync();
    double sum = 0.0;
    for (int cta = 0; cta < ROW_CTAS; ++cta) sum += __longlong_as_double(cluster.read_remote(&published, cta));
    return sum;
}

}  // namespace ops

/// For each i: the log-probability of targets[i] in row rows[i] of `logits` F32 [_, width], its rank (1 is best; equals
/// count as better only when their id is lower), and the `top` best tokens, best first, with theirs. Outputs:
/// logprobs F32 [n, 1 + top], the target's first; ids U32 [n, 1 + top], the rank first. Grid: 8 * n in clusters of 8.
/// Block: 512.
extern "C" __global__ void __launch_bounds__(ops::ROW_THREADS)
    ops_logprobs(const float* logits, const uint32_t* rows, const uint32_t* targets, float* logprobs, uint32_t* ids,
                 int width, int top) {
    __shared__ ops::RowShared<1> shared;
    ops::RowCluster<1> cluster(shared);
    const int index = blockIdx.x / ops::ROW_CTAS, lane = threadIdx.x % ops::WARP;
    ptx::wait_for_dependencies();
    ptx::launch_dependents();
    const float* row = logits + static_cast<size_t>(rows[index]) * width;
    const uint32_t target = targets[index];
    const ops::TokenRange range(cluster.rank, width);
    const uint64_t best = cluster.largest(row, range, ~0ull);
    const float max = best == 0 ? -INFINITY : ops::key_logit(best), own = row[target];
    double sum = 0.0;
    uint64_t better = 0;
    for (int i = range.begin + lane; i < range.end; i += ops::WARP) {
        const float x = row[range.first + i];
        sum += expf(x - max);
        better += x > own || (x == own && range.first + i < target) ? 1 : 0;
    }
    const float log_sum = max + static_cast<float>(log(ops::sum_cluster(cluster, sum)));
    const uint64_t rank = cluster.reduce<ops::Sum>(better) + 1;
    const bool writes = cluster.rank == 0 && threadIdx.x == 0;
    float* values = logprobs + static_cast<size_t>(index) * (1 + top);
    uint32_t* tokens = ids + static_cast<size_t>(index) * (1 + top);
    if (writes) values[0] = own - log_sum, tokens[0] = static_cast<uint32_t>(rank);
    uint64_t key = ~0ull;
    for (int i = 1; i <= top; ++i) {
        key = cluster.largest(row, range, key);
        if (writes) values[i] = ops::key_logit(key) - log_sum, tokens[i] = ops::key_id(key);
    }
    // Shared memory must outlive the others' reads of it.
    ptx::cluster_sync();
}

// What the host writes before a step: one kernel reads it from pinned host memory and puts every part in its place.
#include "ptx/launch.cuh"

struct Segment {
    uint32_t* target;
    uint32_t first;   // word of the source
    uint32_t words;
    uint32_t width;   // words of a row of the source
    uint32_t stride;  // words from row to row of the target
};

struct Segments {
    Segment segment[8];
};

// Grid [blocks, segments].
extern "C" __global__ void __launch_bounds__(256) write_inputs(const uint32_t* source, const Segments segments) {
    ptx::wait_for_dependencies();
    ptx::launch_dependents();
    const Segment s = segments.segment[blockIdx.y];
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < s.words; i += gridDim.x * blockDim.x) {
        const uint32_t row = i / s.width;
        s.target[static_cast<size_t>(row) * s.stride + (i - row * s.width)] = source[s.first + i];
    }
}

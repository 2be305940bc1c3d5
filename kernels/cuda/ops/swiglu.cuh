#pragma once

namespace ops {

/// silu(g) * u = g / (1 + e^-g) * u, by the approximate division: the exact one takes a branch for zeros.
__device__ __forceinline__ float swiglu(float g, float u) { return __fdividef(g, 1.0f + __expf(-g)) * u; }

}  // namespace ops

// Quantization of activations to MX as the host library does it: one E8M0 scale per 32 values along K, elements rounded to
// nearest, ties to even, saturating; a block with NaN or Inf has the scale NaN. Equal in value to the host's: a zero may
// differ in its sign.
//
// A format is data, so one kernel serves all of them: the host fills `MxGrid` from its table of element types.
#pragma once

#include <cstdint>

namespace mx {

constexpr int BLOCK = 32;
constexpr uint32_t SCALE_NAN = 255;

/// An element type and the rule for its shared scale. Mirrored on the host: keep the order of the fields.
struct MxGrid {
    /// Exponent of the largest normal value.
    int32_t emax;
    /// Fractions of amax, as 23 bits, from which on the shared exponent is one higher.
    uint32_t scale_threshold;
    /// Largest finite magnitude.
    float max;
    /// F32 bits of the smallest magnitude that has a binade of its own; all below are multiples of one step. 1.0 for
    /// integers, all of whose values are.
    uint32_t min_normal;
    /// Added to the exponent bits of a number: 1.5 times the number whose last mantissa bit is the step in its binade.
    uint32_t to_magic;
    /// log2 of the largest power of two by which every element value stays within E4M3.
    int32_t e4m3_shift;
};

/// The E8M0 byte of a block whose largest magnitude has the F32 bits `amax`: 0 for zero, 255 with NaN or Inf.
__device__ __forceinline__ uint32_t shared_scale(const MxGrid& grid, uint32_t amax) {
    if (amax >= 0x7F800000u) return SCALE_NAN;
    int exponent = int(amax >> 23) - 127;
    if (amax < 0x00800000u) {
        // Subnormal in F32: normalize. Zero ends up far below the smallest scale, which is what it is given.
        amax = __float_as_uint(__uint_as_float(amax) * 0x1p24f);
        exponent = int(amax >> 23) - 127 - 24;
    }
    exponent += int((amax & 0x7FFFFFu) >= grid.scale_threshold) - grid.emax;
    return uint32_t(min(max(exponent, -127), 127) + 127);
}

/// 2^(byte - 127), also where that is subnormal; NaN for 255.
__device__ __forceinline__ float scale_value(uint32_t byte) {
    if (byte == SCALE_NAN) return __uint_as_float(0x7FC00000u);
    return __uint_as_float(byte == 0 ? 1u << 22 : byte << 23);
}

/// What values are multiplied with to be in units of their scale; not for 255.
__device__ __forceinline__ float scale_reciprocal(uint32_t byte) { return scale_value(254 - byte); }

/// The element value nearest to `y` (in units of the scale).
__device__ __forceinline__ float nearest(const MxGrid& grid, float y) {
    const float clamped = fminf(fmaxf(y, -grid.max), grid.max);
    // Adding a number whose last bit is one step rounds to steps. The step follows from the exponent.
    const uint32_t exponent = max(__float_as_uint(clamped) & 0x7F800000u, grid.min_normal);
    const float magic = __uint_as_float(exponent + grid.to_magic);
    return __fadd_rn(__fadd_rn(clamped, magic), -magic);
}

}  // namespace mx

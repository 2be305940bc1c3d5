//! Rounding onto an element's grid, as branch-free arithmetic that the compiler turns into vector code.
//!
//! A grid is a handful of numbers computed from an [`ElementSpec`] row, so every float element shares one loop and
//! every integer element another. [`ElementType::encode`](super::ElementType::encode) is what they are held to.

use super::ElementSpec;
use super::element::exp2;

const SIGN: u32 = 1 << 31;

/// Fraction bits of the fixed-point numbers that stochastic rounding adds its random bits to.
const FIXED_POINT_BITS: u32 = 24;

/// Rounds finite values (already divided by the shared scale) to codes and their exact values.
pub(super) trait Grid: Copy {
    /// To the nearest value, ties to the even code, saturating.
    fn nearest(self, y: f32) -> (u8, f32);

    /// To one of the two neighbours, up with probability by distance, saturating; `random` has 32 uniform bits.
    fn stochastic(self, y: f32, random: u32) -> (u8, f32);
}

/// A sign-magnitude float element.
#[derive(Debug, Clone, Copy)]
pub(super) struct FloatGrid {
    /// F32 mantissa bits below the element's.
    shift: u32,
    /// Half a unit of the last kept bit, less one: added together with that bit, it rounds ties to even.
    half_less_one: u32,
    /// Code of an F32 bit pattern shifted right by `shift`, minus this: re-biases the exponent.
    code_offset: u32,
    /// Largest finite value, as bits.
    max_bits: u32,
    /// Below this, values are multiples of `subnormal_step`.
    min_normal: f32,
    /// The value whose last mantissa bit is `subnormal_step`: adding it rounds to that step.
    subnormal_magic: f32,
    /// Distance of subnormal values.
    subnormal_step: f32,
    /// 2^24 / `subnormal_step`.
    to_fixed_point: f32,
    /// From the sign of an F32 to that of the code.
    sign_shift: u32,
}

impl FloatGrid {
    pub(super) const fn new(spec: &ElementSpec) -> Self {
        assert!(!spec.is_integer());
        // The last exponent bit then has the same parity in F32 and in the code, which ties to even without mantissa
        // bits (E3M0) rely on.
        assert!(spec.bias % 2 == 1, "biases are odd");
        let mantissa_bits = spec.mantissa_bits as i32;
        let shift = 23 - spec.mantissa_bits;
        let step_exponent = spec.emin() - mantissa_bits;
        Self {
            shift,
            half_less_one: (1 << (shift - 1)) - 1,
            code_offset: ((127 - spec.bias) as u32) << spec.mantissa_bits,
            max_bits: spec.max.to_bits(),
            min_normal: exp2(spec.emin()),
            subnormal_magic: exp2(step_exponent + 23),
            subnormal_step: exp2(step_exponent),
            to_fixed_point: exp2(FIXED_POINT_BITS as i32 - step_exponent),
            sign_shift: 32 - spec.bits,
        }
    }
}

impl Grid for FloatGrid {
    #[inline(always)]
    fn nearest(self, y: f32) -> (u8, f32) {
        let sign = y.to_bits() & SIGN;
        // Finite magnitudes are ordered as their bits are.
        let bits = (y.to_bits() & !SIGN).min(self.max_bits);
        let magnitude = f32::from_bits(bits);
        let last = bits >> self.shift & 1;
        let normal = (bits + self.half_less_one + last) >> self.shift;
        let sum = magnitude + self.subnormal_magic;
        let (code, value) = if magnitude < self.min_normal {
            (sum.to_bits() - self.subnormal_magic.to_bits(), (sum - self.subnormal_magic).to_bits())
        } else {
            (normal.wrapping_sub(self.code_offset), normal << self.shift)
        };
        ((code | sign >> self.sign_shift) as u8, f32::from_bits(value | sign))
    }

    #[inline(always)]
    fn stochastic(self, y: f32, random: u32) -> (u8, f32) {
        let sign = y.to_bits() & SIGN;
        let bits = (y.to_bits() & !SIGN).min(self.max_bits);
        let magnitude = f32::from_bits(bits);
        let normal = (bits + (random >> (32 - self.shift))) >> self.shift;
        let fixed_point = (magnitude * self.to_fixed_point) as u32;
        let steps = fixed_point.wrapping_add(random >> (32 - FIXED_POINT_BITS)) >> FIXED_POINT_BITS;
        let (code, value) = if magnitude < self.min_normal {
            (steps, (steps as f32 * self.subnormal_step).to_bits())
        } else {
            (normal.wrapping_sub(self.code_offset), normal << self.shift)
        };
        ((code | sign >> self.sign_shift) as u8, f32::from_bits(value | sign))
    }
}

/// A two's complement integer element.
#[derive(Debug, Clone, Copy)]
pub(super) struct IntegerGrid {
    max: f32,
    /// 1.5 times the value whose last mantissa bit is `step`: adding it rounds to that step, for either sign.
    magic: f32,
    step: f32,
    to_fixed_point: f32,
    code_mask: u8,
}

impl IntegerGrid {
    pub(super) const fn new(spec: &ElementSpec) -> Self {
        assert!(spec.is_integer());
        let mantissa_bits = spec.mantissa_bits as i32;
        Self {
            max: spec.max,
            magic: 1.5 * exp2(23 - mantissa_bits),
            step: exp2(-mantissa_bits),
            to_fixed_point: exp2(FIXED_POINT_BITS as i32 + mantissa_bits),
            code_mask: spec.code_mask(),
        }
    }
}

impl Grid for IntegerGrid {
    #[inline(always)]
    fn nearest(self, y: f32) -> (u8, f32) {
        let y = if y < self.max { y } else { self.max };
        let y = if y > -self.max { y } else { -self.max };
        let sum = y + self.magic;
        let integer = sum.to_bits().wrapping_sub(self.magic.to_bits());
        (integer as u8 & self.code_mask, sum - self.magic)
    }

    #[inline(always)]
    fn stochastic(self, y: f32, random: u32) -> (u8, f32) {
        let magnitude = if y.abs() < self.max { y.abs() } else { self.max };
        let fixed_point = (magnitude * self.to_fixed_point) as u32;
        let steps = (fixed_point.wrapping_add(random >> (32 - FIXED_POINT_BITS)) >> FIXED_POINT_BITS) as i32;
        let integer = if y < 0.0 { -steps } else { steps };
        (integer as u8 & self.code_mask, integer as f32 * self.step)
    }
}

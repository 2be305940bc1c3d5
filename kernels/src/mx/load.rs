//! Little-endian BF16, F16 and F32 bytes -> F32.

use super::Values;

/// Values `[first, first + B)`, widened exactly.
#[inline(always)]
pub(super) fn load<const B: usize>(values: Values<'_>, first: usize) -> [f32; B] {
    let mut out = [0.0; B];
    match values {
        Values::Bf16(bytes) => {
            let (pairs, _) = bytes[2 * first..][..2 * B].as_chunks();
            for (x, pair) in out.iter_mut().zip(pairs) {
                *x = f32::from_bits(u32::from(u16::from_le_bytes(*pair)) << 16);
            }
        }
        Values::F16(bytes) => {
            let (pairs, _) = bytes[2 * first..][..2 * B].as_chunks();
            for (x, pair) in out.iter_mut().zip(pairs) {
                *x = half_to_f32(u16::from_le_bytes(*pair));
            }
        }
        Values::F32(bytes) => {
            let (quads, _) = bytes[4 * first..][..4 * B].as_chunks();
            for (x, quad) in out.iter_mut().zip(quads) {
                *x = f32::from_le_bytes(*quad);
            }
        }
    }
    out
}

/// An IEEE half, by integer arithmetic that vectorizes (the conversion of the `half` crate is a call per value).
#[inline(always)]
fn half_to_f32(half: u16) -> f32 {
    /// Difference of the exponent biases, in place.
    const REBIAS: u32 = (127 - 15) << 23;
    /// 2^-14, the smallest normal half.
    const MIN_NORMAL: u32 = REBIAS + (1 << 23);
    let half = u32::from(half);
    let magnitude = half & 0x7fff;
    let shifted = magnitude << 13;
    let bits = if magnitude >= 0x7c00 {
        shifted + 2 * REBIAS
    } else if magnitude >= 0x0400 {
        shifted + REBIAS
    } else {
        // A subnormal has no hidden bit: put one there, and take its value away again.
        (f32::from_bits(shifted + MIN_NORMAL) - f32::from_bits(MIN_NORMAL)).to_bits()
    };
    f32::from_bits(bits | (half & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_widens_exactly() {
        for bits in 0..=u16::MAX {
            let (actual, expected) = (half_to_f32(bits), half::f16::from_bits(bits).to_f32());
            let same = actual.to_bits() == expected.to_bits() || (actual.is_nan() && expected.is_nan());
            assert!(same, "{bits:#x}: {actual:e} instead of {expected:e}");
        }
    }
}

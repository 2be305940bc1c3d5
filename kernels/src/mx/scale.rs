//! E8M0 shared scales, and the rules that choose them.

use std::fmt;
use std::str::FromStr;

use super::{ElementSpec, UnknownName};

/// A shared scale: 2^(byte - 127); byte 255 is NaN (OCP MX v1.0, section 5.4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct E8m0(pub u8);

impl E8m0 {
    /// The NaN scale: every element of its block is NaN.
    pub const NAN: Self = Self(255);

    /// The scale 1.
    pub const ONE: Self = Self(127);

    /// The scale's value; byte 0 gives the FP32 subnormal 2^-127.
    pub const fn to_f32(self) -> f32 {
        match self.0 {
            255 => f32::NAN,
            0 => f32::from_bits(1 << 22),
            b => f32::from_bits((b as u32) << 23),
        }
    }

    /// 2^(127 - byte): what values are multiplied with to bring them onto the element's grid. Not for [`E8m0::NAN`].
    pub(crate) const fn reciprocal(self) -> Self {
        Self(254 - self.0)
    }

    /// The scale's square; not for [`E8m0::NAN`].
    pub(super) fn squared(self) -> f64 {
        let exponent = 2 * (i64::from(self.0) - 127);
        f64::from_bits(((exponent + 1023) as u64) << 52)
    }

    /// The scale shifted by `exponent` binades, within [2^-127, 2^127]. Not for [`E8m0::NAN`].
    pub(super) fn shifted(self, exponent: i32) -> Self {
        Self((i32::from(self.0) + exponent).clamp(0, 254) as u8)
    }
}

/// The rule that chooses a block's shared exponent from its largest magnitude.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScaleRounding {
    /// OCP MX v1.0, section 6.3: floor(log2 amax) - emax; large elements may saturate.
    Floor,
    /// ceil(log2 amax) - emax; never saturates.
    Ceil,
    /// The smallest exponent with amax <= max * 2^e (NVIDIA); never saturates.
    Rceil,
    /// floor(log2 of amax rounded to the element's mantissa) - emax (AMD Quark, compressed-tensors).
    Even,
    /// The one of `Even` - 1, `Even`, `Even` + 1 with the least squared error of the block after rounding to nearest;
    /// of equals `Even`'s own, then the lower.
    Mse,
}

impl ScaleRounding {
    /// Every rule.
    pub const ALL: [Self; 5] = [Self::Floor, Self::Ceil, Self::Rceil, Self::Even, Self::Mse];

    /// The name on command lines and in checkpoints.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Floor => "floor",
            Self::Ceil => "ceil",
            Self::Rceil => "rceil",
            Self::Even => "even",
            Self::Mse => "mse",
        }
    }
}

impl fmt::Display for ScaleRounding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ScaleRounding {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        Self::ALL.into_iter().find(|r| r.name() == name).ok_or_else(|| UnknownName {
            what: "scale rounding",
            name: name.to_owned(),
            known: "floor, ceil, rceil, even, mse",
        })
    }
}

/// A rule for one element type, ready to be applied to amax.
///
/// With amax = 2^E * (1 + fraction / 2^23) every rule but the search is `E + [fraction >= threshold] - emax`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SharedExponent {
    emax: i32,
    threshold: u32,
}

impl SharedExponent {
    /// `rounding` for `spec`; [`ScaleRounding::Mse`] starts its search from `Even`.
    pub(crate) const fn new(spec: &ElementSpec, rounding: ScaleRounding) -> Self {
        const FRACTION: u32 = (1 << 23) - 1;
        let threshold = match rounding {
            ScaleRounding::Floor => FRACTION + 1,
            ScaleRounding::Ceil => 1,
            ScaleRounding::Rceil => (spec.max.to_bits() & FRACTION) + 1,
            // Fractions that round up to the next power of two with the element's mantissa bits.
            ScaleRounding::Even | ScaleRounding::Mse => FRACTION + 1 - (1 << (22 - spec.mantissa_bits)),
        };
        Self { emax: spec.emax, threshold }
    }

    /// The fraction of the largest magnitude from which on the exponent is one higher.
    #[cfg(feature = "cuda")]
    pub(crate) const fn threshold(self) -> u32 {
        self.threshold
    }

    /// The scale of a block whose largest magnitude has the F32 bits `amax_bits` (finite). Zero gives byte 0.
    #[inline(always)]
    pub(crate) fn of(self, amax_bits: u32) -> E8m0 {
        // F64 has every F32 subnormal as a normal number.
        let bits = f64::from(f32::from_bits(amax_bits)).to_bits();
        let exponent = (bits >> 52) as i32 - 1023;
        let fraction = (bits >> 29) as u32 & ((1 << 23) - 1);
        let exponent = exponent + i32::from(fraction >= self.threshold) - self.emax;
        E8m0((exponent.clamp(-127, 127) + 127) as u8)
    }
}

//! How keys and values are stored in the paged cache.

use std::fmt;
use std::str::FromStr;

use crate::mx::{Cast, ElementType, MxFormat, ScaleRounding, UnknownName};

/// Element type of the KV cache. MX blocks are 32 elements along the head dimension, each with an E8M0 scale.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum KvCacheDtype {
    /// bfloat16.
    #[default]
    Bf16,
    /// 32-bit float.
    F32,
    /// MXFP8 E4M3.
    Mxfp8,
    /// MXINT8.
    Mxint8,
    /// MXFP4 E2M1.
    Mxfp4,
}

impl KvCacheDtype {
    /// Every type.
    pub const ALL: [Self; 5] = [Self::Bf16, Self::F32, Self::Mxfp8, Self::Mxint8, Self::Mxfp4];

    /// The name on command lines and in metrics: `mxfp8`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
            Self::Mxfp8 => "mxfp8",
            Self::Mxint8 => "mxint8",
            Self::Mxfp4 => "mxfp4",
        }
    }

    /// How keys and values are quantized when they are written; `None` for the floats.
    ///
    /// Scales follow the rules of activations: nothing is known of a key before it comes, and keys have channels far
    /// above the others. `rceil` for E4M3, whose range has binades to spare, so that the largest element is never
    /// clipped; `even` for the others, where a scale one binade up costs every element of the block a bit, and only an
    /// element that rounds to the grid's end anyway is clipped.
    pub const fn cast(self) -> Option<Cast> {
        let (element, scale_rounding) = match self {
            Self::Bf16 | Self::F32 => return None,
            Self::Mxfp8 => (ElementType::E4m3, ScaleRounding::Rceil),
            Self::Mxint8 => (ElementType::Int8, ScaleRounding::Even),
            Self::Mxfp4 => (ElementType::E2m1, ScaleRounding::Even),
        };
        Some(Cast { format: MxFormat::new(element), scale_rounding })
    }

    /// Stored bits per element, scale included: 8.25 for MXFP8.
    pub fn bits_per_element(self) -> f64 {
        match (self, self.cast()) {
            (_, Some(cast)) => cast.format.bits_per_element(),
            (Self::F32, None) => 32.0,
            (_, None) => 16.0,
        }
    }
}

impl fmt::Display for KvCacheDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for KvCacheDtype {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == name).ok_or_else(|| UnknownName {
            what: "KV cache dtype",
            name: name.to_owned(),
            known: "bf16, f32, mxfp8, mxint8, mxfp4",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for dtype in KvCacheDtype::ALL {
            assert_eq!(dtype.to_string().parse(), Ok(dtype));
        }
        let error = "fp8".parse::<KvCacheDtype>().unwrap_err().to_string();
        assert_eq!(error, "unknown KV cache dtype 'fp8'; known: bf16, f32, mxfp8, mxint8, mxfp4");
    }

    #[test]
    fn bits_count_scales() {
        let bits = KvCacheDtype::ALL.map(KvCacheDtype::bits_per_element);
        assert_eq!(bits, [16.0, 32.0, 8.25, 8.25, 4.25]);
    }
}

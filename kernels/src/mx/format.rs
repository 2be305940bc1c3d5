//! The formats, as data: a new element type is one row in [`ElementType::spec`].

use std::fmt;
use std::str::FromStr;

use super::{Rotation, ScaleRounding};

/// What defines an element type (OCP MX v1.0, section 5.3; the experimental rows are ours).
///
/// A float (`exponent_bits > 0`) is sign-magnitude: `(-1)^s * 2^(max(E,1) - bias) * ([E > 0] + M / 2^mantissa_bits)`.
/// An integer (`exponent_bits == 0`) is two's complement with `mantissa_bits` fraction bits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ElementSpec {
    /// Name of the MX format with this element: `mxfp6_e2m3`.
    pub name: &'static str,
    /// Bits of one code, sign included.
    pub bits: u32,
    /// Exponent field width; 0 for integers.
    pub exponent_bits: u32,
    /// Explicit mantissa bits (floats) or fraction bits (integers).
    pub mantissa_bits: u32,
    /// Exponent bias; 0 for integers.
    pub bias: i32,
    /// Exponent of the largest normal value.
    pub emax: i32,
    /// Largest finite magnitude.
    pub max: f32,
    /// Which codes are not numbers.
    pub specials: Specials,
}

impl ElementSpec {
    /// The power of two that makes an integer of every value, if all of them then fit a signed byte: E2M1 x 2,
    /// E2M3 x 8, E3M0 x 4, INT8 x 64, INT4 x 4.
    pub fn int8_factor(&self) -> Option<f32> {
        let exponent = self.mantissa_bits as i32 + if self.is_integer() { 0 } else { self.bias - 1 };
        let factor = 2.0_f32.powi(exponent);
        (self.max * factor <= 127.0).then_some(factor)
    }
}

/// Codes of an element type that stand for no finite number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Specials {
    /// Every code is a finite number (FP6, FP4, INT8).
    None,
    /// `S.1111.111` is NaN, there is no Inf (E4M3).
    NanOnly,
    /// As IEEE 754: the top exponent holds Inf and NaN (E5M2).
    Ieee,
}

/// Element types of the MX formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ElementType {
    /// INT8, two's complement, value = code / 64.
    Int8,
    /// FP8 E4M3 (no Inf, one NaN magnitude).
    E4m3,
    /// FP8 E5M2 (IEEE-like).
    E5m2,
    /// FP6 E2M3.
    E2m3,
    /// FP6 E3M2.
    E3m2,
    /// FP4 E2M1.
    E2m1,
    /// Experimental: INT4, two's complement, value = code / 4.
    Int4,
    /// Experimental: FP4 E3M0, bias 3.
    E3m0,
}

impl ElementType {
    /// Every element type: concrete OCP formats first, then the experimental ones.
    pub const ALL: [Self; 8] =
        [Self::Int8, Self::E4m3, Self::E5m2, Self::E2m3, Self::E3m2, Self::E2m1, Self::Int4, Self::E3m0];

    /// The row of numbers that defines this element type.
    pub const fn spec(self) -> &'static ElementSpec {
        use Specials::{Ieee, NanOnly, None};
        macro_rules! row {
            ($name:literal, $bits:literal, $e:literal, $m:literal, $bias:literal, $emax:literal, $max:literal, $sp:expr) => {
                &ElementSpec {
                    name: $name,
                    bits: $bits,
                    exponent_bits: $e,
                    mantissa_bits: $m,
                    bias: $bias,
                    emax: $emax,
                    max: $max,
                    specials: $sp,
                }
            };
        }
        match self {
            //                            bits e  m  bias emax max       specials
            Self::Int8 => row!("mxint8", 8, 0, 6, 0, 0, 1.984375, None),
            Self::E4m3 => row!("mxfp8_e4m3", 8, 4, 3, 7, 8, 448.0, NanOnly),
            Self::E5m2 => row!("mxfp8_e5m2", 8, 5, 2, 15, 15, 57344.0, Ieee),
            Self::E2m3 => row!("mxfp6_e2m3", 6, 2, 3, 1, 2, 7.5, None),
            Self::E3m2 => row!("mxfp6_e3m2", 6, 3, 2, 3, 4, 28.0, None),
            Self::E2m1 => row!("mxfp4", 4, 2, 1, 1, 2, 6.0, None),
            Self::Int4 => row!("mxint4", 4, 0, 2, 0, 0, 1.75, None),
            Self::E3m0 => row!("mxfp4_e3m0", 4, 3, 0, 3, 4, 16.0, None),
        }
    }

    /// Default rule for the shared scale: the best measured, by perplexity for the OCP formats and by SQNR for the
    /// experimental ones.
    pub const fn default_scale_rounding(self) -> ScaleRounding {
        match self {
            Self::Int8 => ScaleRounding::Floor,
            Self::E4m3 | Self::E5m2 => ScaleRounding::Rceil,
            Self::E2m3 | Self::E3m2 | Self::E2m1 | Self::E3m0 => ScaleRounding::Even,
            Self::Int4 => ScaleRounding::Floor,
        }
    }
}

/// How many consecutive elements along K share one scale: 16, 32 or 64. OCP formats and checkpoints use 32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Block(usize);

impl Block {
    /// The block of every concrete OCP MX format: 1 x 32 along K.
    pub const OCP: Self = Self(32);

    /// Elements in the largest block.
    pub const MAX: usize = 64;

    /// A block of `size` elements along K; `None` unless 16, 32 or 64.
    pub const fn along_k(size: usize) -> Option<Self> {
        match size {
            16 | 32 | 64 => Some(Self(size)),
            _ => None,
        }
    }

    /// Elements in one block.
    pub const fn size(self) -> usize {
        self.0
    }
}

/// An MX format: an element type and the block that shares a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MxFormat {
    /// The element type.
    pub element: ElementType,
    /// The scale block.
    pub block: Block,
}

impl MxFormat {
    /// `element` in blocks of 32 along K.
    pub const fn new(element: ElementType) -> Self {
        Self { element, block: Block::OCP }
    }

    /// Stored bits per element, scale included: 4.25 for MXFP4.
    pub fn bits_per_element(self) -> f64 {
        f64::from(self.element.spec().bits) + 8.0 / self.block.size() as f64
    }

    /// Bytes of the packed codes of `k` elements; `k` is a multiple of the block size.
    pub const fn code_bytes(self, k: usize) -> usize {
        k * self.element.spec().bits as usize / 8
    }

    /// Scale bytes of `k` elements.
    pub const fn scale_bytes(self, k: usize) -> usize {
        k / self.block.size()
    }
}

/// A name that is no format, scheme or scale rounding.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown {what} '{name}'; known: {known}")]
pub struct UnknownName {
    /// What was looked for: `format`, `scheme`, `scale rounding`.
    pub what: &'static str,
    /// The name as given.
    pub name: String,
    /// The names that would have been accepted.
    pub known: &'static str,
}

const FORMAT_NAMES: &str = "mxint8, mxfp8 (= mxfp8_e4m3), mxfp8_e5m2, mxfp6 (= mxfp6_e2m3), mxfp6_e3m2, mxfp4, \
                            and the experimental mxint4, mxfp4_e3m0";

impl FromStr for MxFormat {
    type Err = UnknownName;

    /// A format's name, with `_k16` or `_k64` behind it for blocks that are not of 32.
    fn from_str(name: &str) -> Result<Self, UnknownName> {
        let (base, block) = match name.rsplit_once("_k") {
            Some((base, size)) => (base, size.parse().ok().and_then(Block::along_k)),
            None => (name, Some(Block::OCP)),
        };
        let full = match base {
            "mxfp8" => "mxfp8_e4m3",
            "mxfp6" => "mxfp6_e2m3",
            "mxfp4_e2m1" => "mxfp4",
            other => other,
        };
        let element = ElementType::ALL.into_iter().find(|e| e.spec().name == full);
        element.zip(block).map(|(element, block)| Self { element, block }).ok_or_else(|| UnknownName {
            what: "format",
            name: name.to_owned(),
            known: FORMAT_NAMES,
        })
    }
}

impl fmt::Display for MxFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.element.spec().name)?;
        if self.block != Block::OCP {
            write!(f, "_k{}", self.block.size())?;
        }
        Ok(())
    }
}

/// A direct cast: the format, and the rule that chooses its shared scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cast {
    /// Target format.
    pub format: MxFormat,
    /// Rule for the shared scale.
    pub scale_rounding: ScaleRounding,
}

impl From<MxFormat> for Cast {
    fn from(format: MxFormat) -> Self {
        Self { format, scale_rounding: format.element.default_scale_rounding() }
    }
}

/// What a quantized linear layer declares: how its weight was made, and how its input is quantized at run time
/// (per token, along K), or `None` for an unquantized input (weight-only).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Scheme {
    /// The weight.
    pub weight: Cast,
    /// The input activations.
    pub activation: Option<Cast>,
    /// How the weight's rows were rotated, and the input is at run time, before it is quantized.
    pub rotation: Option<Rotation>,
}

impl Scheme {
    /// Does to inputs `[_, K]`, in place, what the rotation says; to rows of a weight likewise.
    pub fn rotate(&self, values: &mut [f32]) {
        if let Some(rotation) = self.rotation {
            rotation.apply(self.weight.format.block, values);
        }
    }
}

impl FromStr for Scheme {
    type Err = UnknownName;

    /// `WEIGHT`, `WEIGHT:ACTIVATION`, or one of the short names w4a4, w4a6, w4a8, w6a6, w6a8, w8a8.
    fn from_str(name: &str) -> Result<Self, UnknownName> {
        let full = match name {
            "w4a4" => "mxfp4:mxfp4",
            "w4a6" => "mxfp4:mxfp6",
            "w4a8" => "mxfp4:mxfp8",
            "w6a6" => "mxfp6:mxfp6",
            "w6a8" => "mxfp6:mxfp8",
            "w8a8" => "mxfp8:mxfp8",
            other => other,
        };
        let (weight, activation) = match full.split_once(':') {
            Some((weight, activation)) => (weight, Some(activation)),
            None => (full, None),
        };
        let format = |part: &str| {
            part.parse::<MxFormat>().map(Cast::from).map_err(|_| UnknownName {
                what: "scheme",
                name: name.to_owned(),
                known: "WEIGHT or WEIGHT:ACTIVATION with the formats mxint8, mxfp8 (= mxfp8_e4m3), mxfp8_e5m2, \
                        mxfp6 (= mxfp6_e2m3), mxfp6_e3m2, mxfp4, mxint4, mxfp4_e3m0, and w4a4, w4a6, w4a8, w6a6, w6a8, w8a8",
            })
        };
        Ok(Self { weight: format(weight)?, activation: activation.map(format).transpose()?, rotation: None })
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.weight.format)?;
        if let Some(activation) = self.activation {
            write!(f, ":{}", activation.format)?;
        }
        match self.rotation {
            Some(rotation) => write!(f, " {rotation}"),
            None => Ok(()),
        }
    }
}

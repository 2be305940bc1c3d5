//! Which activation format quantized modules run with.

use std::fmt;
use std::str::FromStr;

use kernels::mx::{Block, Cast, MxFormat, UnknownName};

/// The activation format of a checkpoint's quantized modules: an experiment's choice, or the declared one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ActivationChoice {
    /// What the checkpoint declares.
    #[default]
    Declared,
    /// No quantization (weight-only).
    Unquantized,
    /// This format and scale rule, in blocks of 32.
    Cast(Cast),
}

impl ActivationChoice {
    /// What runs where `declared` is declared.
    pub(super) fn apply(self, declared: Option<Cast>) -> Option<Cast> {
        match self {
            Self::Declared => declared,
            Self::Unquantized => None,
            Self::Cast(cast) => Some(cast),
        }
    }
}

impl fmt::Display for ActivationChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Declared => f.write_str("declared"),
            Self::Unquantized => f.write_str("none"),
            Self::Cast(cast) => write!(f, "{}", cast.format),
        }
    }
}

impl FromStr for ActivationChoice {
    type Err = UnknownName;

    /// `declared`, `none`, or a format in blocks of 32, which has its default scale rule.
    fn from_str(name: &str) -> Result<Self, UnknownName> {
        match name {
            "declared" => Ok(Self::Declared),
            "none" => Ok(Self::Unquantized),
            _ => match name.parse::<MxFormat>() {
                Ok(format) if format.block == Block::OCP => Ok(Self::Cast(format.into())),
                _ => Err(UnknownName {
                    what: "activation format",
                    name: name.to_owned(),
                    known: "declared, none, mxint8, mxfp8, mxfp8_e5m2, mxfp6, mxfp6_e3m2, mxfp4, mxint4, mxfp4_e3m0",
                }),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for name in ["declared", "none", "mxfp6_e2m3", "mxint8"] {
            assert_eq!(name.parse::<ActivationChoice>().unwrap().to_string(), name);
        }
        for name in ["", "bf16", "mxfp4_k16"] {
            assert!(name.parse::<ActivationChoice>().unwrap_err().to_string().contains("activation format"));
        }
    }

    #[test]
    fn a_choice_replaces_what_is_declared() {
        let cast = |name: &str| Cast::from(name.parse::<MxFormat>().unwrap());
        let declared = Some(cast("mxfp8"));
        assert_eq!(ActivationChoice::Declared.apply(declared), declared);
        assert_eq!(ActivationChoice::Unquantized.apply(declared), None);
        assert_eq!(ActivationChoice::Cast(cast("mxfp6")).apply(None), Some(cast("mxfp6")));
    }
}

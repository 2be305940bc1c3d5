//! The design space: what can be chosen when a matrix is quantized in blocks.

use kernels::mx::{ElementType, ScaleRounding};
use serde::{Serialize, Serializer};

/// Block sizes studied.
pub const BLOCKS: [usize; 5] = [8, 16, 32, 64, 128];

/// How an element is rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rounding {
    /// To nearest, ties to even.
    Nearest,
    /// Up or down with probability by distance.
    Stochastic,
}

/// How a block's values lie about zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Symmetry {
    /// One scale, as in OCP MX.
    Symmetric,
    /// One scale for the positive, one for the negative values (AMXFP4, arXiv 2411.09909); 8 bits more per block.
    TwoScales,
    /// The middle between the largest and the smallest value, rounded to BF16, is subtracted first; 16 bits more per
    /// block.
    Offset,
}

impl Symmetry {
    /// Every kind.
    pub const ALL: [Self; 3] = [Self::Symmetric, Self::TwoScales, Self::Offset];

    /// Bits that a block has beside its elements.
    pub const fn bits(self) -> usize {
        match self {
            Self::Symmetric => 8,
            Self::TwoScales => 16,
            Self::Offset => 24,
        }
    }

    /// For people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Symmetric => "symmetric",
            Self::TwoScales => "two scales",
            Self::Offset => "offset",
        }
    }
}

/// Which elements of a matrix share a scale, for block size k.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub enum Organisation {
    /// k along a row: along K, for weights and activations alike, as in OCP MX.
    #[serde(rename = "1xk")]
    Row,
    /// k along a column: one input channel of k outputs (weights) or of k tokens (activations).
    #[serde(rename = "kx1")]
    Column,
    /// A tile of k rows and k columns.
    #[serde(rename = "kxk")]
    Tile,
}

impl Organisation {
    /// Every kind.
    pub const ALL: [Self; 3] = [Self::Row, Self::Column, Self::Tile];

    /// Rows and columns of a block of size `k`.
    pub const fn shape(self, k: usize) -> [usize; 2] {
        match self {
            Self::Row => [1, k],
            Self::Column => [k, 1],
            Self::Tile => [k, k],
        }
    }

    /// For people: `1xk`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Row => "1xk",
            Self::Column => "kx1",
            Self::Tile => "kxk",
        }
    }
}

/// One point of the design space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct Design {
    /// Data type of the elements.
    #[serde(serialize_with = "element_name")]
    pub element: ElementType,
    /// How they are rounded.
    pub rounding: Rounding,
    /// How a scale is chosen.
    #[serde(serialize_with = "rule_name")]
    pub scale_rounding: ScaleRounding,
    /// Symmetric or not.
    pub symmetry: Symmetry,
    /// Block size k.
    pub block: usize,
    /// Block shape.
    pub organisation: Organisation,
}

fn element_name<S: Serializer>(element: &ElementType, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(element.spec().name)
}

fn rule_name<S: Serializer>(rule: &ScaleRounding, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(rule.name())
}

impl Design {
    /// What a checkpoint has: nearest, symmetric, blocks of 32 along K, the format's default scale rule.
    pub const fn ocp(element: ElementType) -> Self {
        Self {
            element,
            rounding: Rounding::Nearest,
            scale_rounding: element.default_scale_rounding(),
            symmetry: Symmetry::Symmetric,
            block: 32,
            organisation: Organisation::Row,
        }
    }

    /// Every combination of data type, scale rule, symmetry, block size and organisation, rounded to nearest; and
    /// every data type with every scale rule rounded stochastically.
    pub fn all() -> Vec<Self> {
        let mut designs = Vec::new();
        for element in ElementType::ALL {
            for scale_rounding in ScaleRounding::ALL {
                let base = Self { scale_rounding, ..Self::ocp(element) };
                designs.push(Self { rounding: Rounding::Stochastic, ..base });
                for symmetry in Symmetry::ALL {
                    for block in BLOCKS {
                        let with = |organisation| Self { symmetry, block, organisation, ..base };
                        designs.extend(Organisation::ALL.map(with));
                    }
                }
            }
        }
        designs
    }

    /// Stored bits per element, scales included.
    pub fn bits_per_element(&self) -> f64 {
        let [rows, cols] = self.organisation.shape(self.block);
        f64::from(self.element.spec().bits) + self.symmetry.bits() as f64 / (rows * cols) as f64
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_design_is_there_once() {
        let all = Design::all();
        assert_eq!(all.len(), 8 * 5 * (3 * 5 * 3 + 1));
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
        assert!(ElementType::ALL.iter().all(|&element| all.contains(&Design::ocp(element))));
    }

    #[test]
    fn bits_count_scales() {
        let base = Design::ocp(ElementType::E2m1);
        assert_eq!(base.bits_per_element(), 4.25);
        assert_eq!(Design { symmetry: Symmetry::Offset, block: 8, ..base }.bits_per_element(), 7.0);
        assert_eq!(
            Design { organisation: Organisation::Tile, ..base }.bits_per_element(),
            4.0 + 8.0 / 1024.0
        );
    }
}

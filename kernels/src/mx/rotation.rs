//! Block Hadamard rotations of a linear layer's input (as in QuaRot, Ashkboos et al., arXiv 2404.00456, within the
//! blocks that share a scale, as MR-GPTQ, Egiazarian et al., arXiv 2509.23202, does): with R orthogonal,
//! `W x = (W R) (R x)` for R its own inverse. A block of `W R` has no outliers that spend its scale, nor has one of `R x`.

use std::fmt;
use std::str::FromStr;

use super::{Block, UnknownName};

/// What is done to the input of a linear layer before anything else, and was done to the rows of its weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rotation {
    /// Every block of the weight's format times the Hadamard matrix of its size (Sylvester's), divided by the square root
    /// of the size: orthogonal, symmetric, and so its own inverse.
    BlockHadamard,
}

impl Rotation {
    /// The name on command lines and in checkpoints: `block-hadamard`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::BlockHadamard => "block-hadamard",
        }
    }

    /// Rotates rows `[_, K]`, K a multiple of `block`, in place.
    ///
    /// # Panics
    /// The last block is not whole.
    pub fn apply(self, block: Block, values: &mut [f32]) {
        assert!(values.len().is_multiple_of(block.size()), "whole blocks");
        match (self, block.size()) {
            (Self::BlockHadamard, 16) => values.as_chunks_mut::<16>().0.iter_mut().for_each(hadamard),
            (Self::BlockHadamard, 32) => values.as_chunks_mut::<32>().0.iter_mut().for_each(hadamard),
            (Self::BlockHadamard, _) => values.as_chunks_mut::<64>().0.iter_mut().for_each(hadamard),
        }
    }
}

/// The fast Walsh-Hadamard transform, divided by the square root of N, a power of two.
fn hadamard<const N: usize>(x: &mut [f32; N]) {
    // Each stage adds and subtracts halves, and interleaves the results: N / 2 lanes at a time, whatever the stage.
    for _ in 0..N.trailing_zeros() {
        let (low, high) = x.split_at(N / 2);
        let mut next = [0.0; N];
        for (i, (a, b)) in low.iter().zip(high).enumerate() {
            next[2 * i] = a + b;
            next[2 * i + 1] = a - b;
        }
        *x = next;
    }
    let factor = (N as f32).sqrt().recip();
    x.iter_mut().for_each(|x| *x *= factor);
}

impl fmt::Display for Rotation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Rotation {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        if name == Self::BlockHadamard.name() {
            return Ok(Self::BlockHadamard);
        }
        Err(UnknownName { what: "rotation", name: name.to_owned(), known: "block-hadamard" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotations_are_the_hadamard_matrix_of_each_block() {
        for size in [16, 32, 64] {
            let block = Block::along_k(size).unwrap();
            for column in [0, 1, 5, size - 1] {
                let mut unit = vec![0.0; 2 * size];
                unit[size + column] = 1.0;
                Rotation::BlockHadamard.apply(block, &mut unit);
                assert!(unit[..size].iter().all(|x| *x == 0.0), "blocks do not mix");
                for (row, value) in unit[size..].iter().enumerate() {
                    // Sylvester's matrix: the parity of the bits that row and column share.
                    let sign = if (row & column).count_ones() % 2 == 0 { 1.0 } else { -1.0 };
                    assert_eq!(*value, sign * (size as f32).sqrt().recip(), "{size}: {row}, {column}");
                }
            }
        }
    }

    #[test]
    fn a_rotation_is_its_own_inverse() {
        let values: Vec<f32> = (0..128).map(|i| ((i * 37 + 11) % 64) as f32 - 31.5).collect();
        let mut twice = values.clone();
        Rotation::BlockHadamard.apply(Block::OCP, &mut twice);
        assert_ne!(values, twice);
        Rotation::BlockHadamard.apply(Block::OCP, &mut twice);
        assert!(values.iter().zip(&twice).all(|(a, b)| (a - b).abs() < 1e-4));
    }
}

//! Direct cast: each element on its own, to the nearest value of its block's grid (or, stochastically, to one of
//! the two nearest).

use kernels::mx::{Cast, ElementRounding, Energy, quantize_rows};
use sha2::{Digest, Sha256};

use super::{QuantizeError, Quantizer, Rows};

/// The method `nearest`.
#[derive(Debug, Clone, Copy)]
pub struct DirectCast {
    /// How elements are rounded; each tensor gets a seed of its own, made of the given one and its name.
    pub rounding: ElementRounding,
}

impl Quantizer for DirectCast {
    fn quantize(
        &self,
        cast: Cast,
        rows: Rows<'_>,
        codes: &mut [u8],
        scales: &mut [u8],
    ) -> Result<Energy, QuantizeError> {
        let rounding = match self.rounding {
            ElementRounding::NearestEven => ElementRounding::NearestEven,
            ElementRounding::Stochastic { seed } => {
                ElementRounding::Stochastic { seed: tensor_seed(seed, rows.tensor) }
            }
        };
        Ok(quantize_rows(cast, rounding, rows.values, rows.first_index, codes, scales)?)
    }
}

fn tensor_seed(seed: u64, tensor: &str) -> u64 {
    let digest = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(tensor).finalize();
    digest[..8].iter().fold(0, |seed, byte| seed << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use kernels::mx::{MxFormat, Values};

    use super::*;

    #[test]
    fn stochastic_rounding_depends_on_seed_tensor_and_index() {
        let values: Vec<u8> = (0..256_u16).flat_map(|i| (0.013 * f32::from(i) - 1.7).to_le_bytes()).collect();
        let cast = Cast::from("mxfp4".parse::<MxFormat>().unwrap());
        let run = |seed: u64, tensor: &str, first_index: u64| {
            let quantizer = DirectCast { rounding: ElementRounding::Stochastic { seed } };
            let (mut codes, mut scales) = (vec![0; 128], vec![0; 8]);
            let rows = Rows { tensor, values: Values::F32(&values), first_index };
            quantizer.quantize(cast, rows, &mut codes, &mut scales).unwrap();
            codes
        };
        assert_eq!(run(1, "a", 0), run(1, "a", 0));
        assert_ne!(run(1, "a", 0), run(2, "a", 0));
        assert_ne!(run(1, "a", 0), run(1, "b", 0));
        assert_ne!(run(1, "a", 0), run(1, "a", 256));
    }
}

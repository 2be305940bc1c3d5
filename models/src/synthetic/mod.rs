//! Models of named shapes with random weights: speed can be measured without a checkpoint.
//!
//! The weights are what a conversion of normally distributed BF16 weights gives, so every code is valid, scales vary
//! and activations stay finite. What the model says is noise.

mod pool;
mod shapes;

use kernels::Backend;
use kernels::mx::Scheme;
use serde_json::Value;

pub use shapes::{Shape, UnknownShape};

use self::pool::Pool;
use crate::checkpoint::LinearTensor;
use crate::decoder::{Decoder, WeightNames};
use crate::parameters::ParameterSource;
use crate::{Model, ModelConfig, ModelError, registry};

/// The formats of a synthetic model's weights; `None` is BF16.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Formats {
    /// The linear layers of the decoder.
    pub linears: Option<Scheme>,
    /// The output head. In a format of its own it is a weight of its own, also in a shape with tied embeddings, as
    /// `mxconvert` writes it.
    pub head: Option<Scheme>,
}

/// Makes a model of `config` (the content of a `config.json`) with random weights, the same ones every time.
///
/// # Errors
/// The configuration is not supported, its sizes do not fit the formats' blocks, or the device cannot take it.
pub fn load(backend: &dyn Backend, config: &Value, formats: Formats) -> Result<Box<dyn Model>, ModelError> {
    let config = ModelConfig::parse(config)?;
    let names = registry::names(&config);
    let source = RandomWeights {
        names,
        dense: Pool::dense(),
        linears: formats.linears.map(Pool::mx),
        head: formats.head.map(Pool::mx),
    };
    Ok(Box::new(Decoder::load(backend, &source, config, names)?))
}

struct RandomWeights {
    names: &'static WeightNames,
    dense: Pool,
    linears: Option<Pool>,
    head: Option<Pool>,
}

impl ParameterSource for RandomWeights {
    fn linear(&self, module: &str, shape: [usize; 2]) -> Result<LinearTensor, ModelError> {
        let pool = match module {
            _ if module == self.names.embed => None,
            _ if module == self.names.head => self.head.as_ref(),
            _ => self.linears.as_ref(),
        };
        pool.unwrap_or(&self.dense).tensor(module, shape)
    }

    /// Ones, as norms start with; biases of one are as fast as others.
    fn vector(&self, _name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        Ok(vec![1.0; len])
    }

    fn is_quantized(&self, module: &str) -> Result<bool, ModelError> {
        Ok(module == self.names.head && self.head.is_some())
    }
}

#[cfg(test)]
mod tests;

//! Where a decoder's parameters come from.

use crate::ModelError;
use crate::checkpoint::{Checkpoint, LinearTensor};

/// Parameters by name: a checkpoint's, or [synthetic](crate::synthetic) ones.
pub(crate) trait ParameterSource {
    /// The weight `shape` = `[rows, cols]` of a linear module or an embedding.
    fn linear(&self, module: &str, shape: [usize; 2]) -> Result<LinearTensor, ModelError>;

    /// An unquantized vector of `len` elements.
    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, ModelError>;

    /// Whether there is a weight of `module`, and it is quantized.
    fn is_quantized(&self, module: &str) -> Result<bool, ModelError>;
}

impl ParameterSource for Checkpoint {
    fn linear(&self, module: &str, shape: [usize; 2]) -> Result<LinearTensor, ModelError> {
        let tensor = Self::linear(self, module)?;
        check_shape(module, &tensor.shape(), &shape)?;
        Ok(tensor)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        let tensor = self.dense(name)?;
        check_shape(name, &tensor.shape, &[len])?;
        Ok(tensor.to_f32())
    }

    fn is_quantized(&self, module: &str) -> Result<bool, ModelError> {
        let stored = self.contains(&format!("{module}.weight_scale"));
        Ok(stored && self.scheme(module)?.is_some())
    }
}

/// The error that a tensor is not `expected`.
pub(crate) fn check_shape(tensor: &str, actual: &[usize], expected: &[usize]) -> Result<(), ModelError> {
    if actual == expected {
        return Ok(());
    }
    Err(ModelError::Shape { tensor: tensor.to_owned(), expected: expected.to_vec(), actual: actual.to_vec() })
}

//! NaN and Inf in tensors that are copied; those in quantized ones the quantizer finds.

use safetensors::Dtype;

use crate::error::ConvertError;
use crate::source::Source;

/// Index and text of the first value of `bytes` that is NaN or Inf; `None` also for dtypes that are not scanned
/// (all but BF16, F16, F32).
pub(crate) fn first_non_finite(dtype: Dtype, bytes: &[u8]) -> Option<(u64, &'static str)> {
    match dtype {
        Dtype::BF16 => first(bytes, |b: [u8; 2]| half::bf16::from_le_bytes(b).to_f32()),
        Dtype::F16 => first(bytes, |b: [u8; 2]| half::f16::from_le_bytes(b).to_f32()),
        Dtype::F32 => first(bytes, f32::from_le_bytes),
        _ => None,
    }
}

/// The error for element `index`, counted through the whole of the source's tensor.
pub(crate) fn error(source: &Source, tensor: usize, mut index: u64, value: &'static str) -> ConvertError {
    let tensor = &source.tensors()[tensor];
    let mut indices = vec![0; tensor.shape.len()];
    for (along, &dim) in indices.iter_mut().zip(&tensor.shape).rev() {
        *along = index % dim as u64;
        index /= dim as u64;
    }
    let path = source.path_of(Some(&tensor.name));
    ConvertError::NonFinite { path, tensor: tensor.name.clone(), index: indices, value }
}

fn first<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f32) -> Option<(u64, &'static str)> {
    let (values, _) = bytes.as_chunks::<N>();
    let index = values.iter().position(|bytes| !value(*bytes).is_finite())?;
    let text = match value(values[index]) {
        f32::INFINITY => "inf",
        f32::NEG_INFINITY => "-inf",
        _ => "NaN",
    };
    Some((index as u64, text))
}

//! The windows' activations on their way through the layers.

use std::collections::BTreeMap;

use kernels::mx::Scheme;
use models::checkpoint::{DenseTensor, LinearTensor, MxLinear, dense_dtype};
use models::staged::Parameters;

use super::layer::nearest_cast;
use crate::error::ConvertError;
use crate::finite::{self, first_non_finite};
use crate::plan::LAYERS;
use crate::quantize::Quantized;
use crate::source::{Source, SourceTensor};

/// The tensors of decoder layer `index`, as the source has them.
pub(crate) fn layer_parameters(source: &Source, index: usize) -> Result<Parameters, ConvertError> {
    let prefix = format!("{LAYERS}{index}.");
    read(source, |tensor| tensor.name.starts_with(&prefix))
}

/// The tensors outside the decoder layers.
pub(crate) fn end_parameters(source: &Source) -> Result<Parameters, ConvertError> {
    read(source, |tensor| !tensor.name.starts_with(LAYERS))
}

/// The weight, rotated as its input will be.
pub(super) fn rotated(dense: &DenseTensor, scheme: Scheme) -> Vec<f32> {
    let mut weight = dense.to_f32();
    scheme.rotate(&mut weight);
    weight
}

/// Casts the modules that have one of `schemes` directly.
pub(crate) fn cast_directly(parameters: &mut Parameters, schemes: &BTreeMap<&str, Scheme>) {
    for (name, tensor) in &mut parameters.linears {
        let (Some(&scheme), LinearTensor::Dense(dense)) = (schemes.get(name.as_str()), &*tensor) else {
            continue;
        };
        let shape = tensor.shape();
        let quantized = Quantized::nearest(&rotated(dense, scheme), shape[1], nearest_cast(scheme.weight));
        let mx = MxLinear::new(scheme, shape, quantized.packed_codes(), quantized.scale_bytes());
        *tensor = LinearTensor::Mx(mx.expect("a quantized weight has the size of its format"));
    }
}

fn read(source: &Source, wanted: impl Fn(&SourceTensor) -> bool) -> Result<Parameters, ConvertError> {
    let mut parameters = Parameters { dir: source.path_of(None), ..Parameters::default() };
    for (index, tensor) in source.tensors().iter().enumerate().filter(|(_, tensor)| wanted(tensor)) {
        let Some(dense) = read_tensor(source, index)? else { continue };
        if let Some((element, value)) = first_non_finite(tensor.dtype, &dense.bytes) {
            return Err(finite::error(source, index, element, value));
        }
        if tensor.shape.len() == 2 {
            let module = tensor.name.strip_suffix(".weight").unwrap_or(&tensor.name);
            parameters.linears.insert(module.to_owned(), LinearTensor::Dense(dense));
        } else {
            parameters.vectors.insert(tensor.name.clone(), dense.to_f32());
        }
    }
    Ok(parameters)
}

/// `None` for what is not BF16, F16 or F32.
fn read_tensor(source: &Source, index: usize) -> Result<Option<DenseTensor>, ConvertError> {
    let tensor = &source.tensors()[index];
    let Some(dtype) = dense_dtype(tensor.dtype) else { return Ok(None) };
    let (mut bytes, mut piece) = (Vec::with_capacity(tensor.bytes() as usize), Vec::new());
    for range in source.pieces(tensor) {
        source.read(index, &range, &mut piece)?;
        bytes.extend_from_slice(&piece);
    }
    Ok(Some(DenseTensor { name: tensor.name.clone(), dtype, shape: tensor.shape.clone(), bytes }))
}

//! Checkpoints on disk: a Hugging Face folder with plain or MX weights in safetensors.
//!
//! Headers and `quantization_config` are parsed and checked when the folder is opened; tensors are read by position
//! when asked for, so that a reader holds no more than it uses.

mod activation;
mod buffer;
mod error;
mod module_pattern;
pub mod quantization;
mod record;
mod shards;
mod tensor;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kernels::DenseDtype;
use kernels::mx::Scheme;
use safetensors::Dtype;
use serde_json::Value;

pub use activation::ActivationChoice;
pub use buffer::TensorBytes;
pub use error::CheckpointError;
pub use module_pattern::{InvalidPattern, ModulePattern};
pub use quantization::Quantization;
pub use record::{
    ConversionRecord, RECORD_FILE, RecordedCast, RecordedRounding, RecordedScheme, RecordedSource,
};
pub use shards::{INDEX_FILE, SINGLE_FILE, TensorInfo};
pub use tensor::{DenseTensor, LinearTensor, MxLinear, to_f32};

pub(crate) use buffer::BufferPool;
use record::RecordedSchemes;
use shards::ShardSet;

/// The scale byte that says that a whole block is NaN (OCP MX 1.0, E8M0).
const E8M0_NAN: u8 = 0xFF;

/// Shape and stored size of a quantized linear module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MxInfo {
    /// `[N, K]`.
    pub shape: [usize; 2],
    /// Bytes of codes and scales.
    pub bytes: u64,
}

/// An open checkpoint folder.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: Value,
    shards: ShardSet,
    quantization: Quantization,
    recorded: RecordedSchemes,
    activations: ActivationChoice,
}

impl Checkpoint {
    /// Opens a folder: `config.json`, and `model.safetensors` or the shards of `model.safetensors.index.json`.
    /// Reads headers only.
    ///
    /// # Errors
    /// A file is missing, truncated or corrupt, or `quantization_config` declares something other than MX.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let path = dir.join("config.json");
        let config = read_json(&path)?;
        if !config.is_object() {
            return Err(CheckpointError::Corrupt { path, reason: "is not a JSON object".to_owned() });
        }
        let shards = ShardSet::open(dir)?;
        let quantization = Quantization::read(dir, &config)?;
        let recorded = RecordedSchemes::read(dir)?;
        let activations = ActivationChoice::Declared;
        Ok(Self { dir: dir.to_owned(), config, shards, quantization, recorded, activations })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// `config.json`.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// What the checkpoint declares about its linear modules.
    pub fn quantization(&self) -> &Quantization {
        &self.quantization
    }

    /// From now on, quantized modules have this activation format.
    pub fn set_activations(&mut self, activations: ActivationChoice) {
        self.activations = activations;
    }

    /// Whether a tensor is there.
    pub fn contains(&self, tensor: &str) -> bool {
        self.shards.info(tensor).is_some()
    }

    /// Every tensor, by name.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.shards.tensors()
    }

    /// One tensor.
    ///
    /// # Errors
    /// It is not there.
    pub fn info(&self, tensor: &str) -> Result<&TensorInfo, CheckpointError> {
        self.shards.info(tensor).ok_or_else(|| CheckpointError::MissingTensor {
            dir: self.dir.clone(),
            tensor: tensor.to_owned(),
        })
    }

    /// Paths of the shards, in the order of [`TensorInfo::shard`].
    pub fn shard_files(&self) -> impl Iterator<Item = &Path> {
        self.shards.files()
    }

    /// Fills `out` with the bytes of `info` from `start` on.
    ///
    /// # Errors
    /// The range leaves the tensor, or the file cannot be read.
    pub fn read_range(&self, info: &TensorInfo, start: u64, out: &mut [u8]) -> Result<(), CheckpointError> {
        if start.checked_add(out.len() as u64).is_none_or(|end| end > info.bytes) {
            return Err(
                self.tensor_error(info, format!("has {} bytes, not {start} + {}", info.bytes, out.len()))
            );
        }
        self.shards.read(info, start, out)
    }

    /// An unquantized tensor.
    ///
    /// # Errors
    /// It is missing, unreadable, or not BF16, F16 or F32.
    pub fn dense(&self, name: &str) -> Result<DenseTensor, CheckpointError> {
        let info = self.info(name)?;
        let dtype = dense_dtype(info.dtype).ok_or_else(|| {
            self.tensor_error(info, format!("{} where BF16, F16 or F32 is expected", info.dtype))
        })?;
        Ok(DenseTensor { name: name.to_owned(), dtype, shape: info.shape.clone(), bytes: self.read(info)? })
    }

    /// What is declared for the weight of `module` (`model.layers.0.mlp.down_proj`): its formats and scale rules,
    /// or `None` for an unquantized weight. The activation format is the one
    /// [chosen](Self::set_activations) instead, if any.
    ///
    /// # Errors
    /// `mx_conversion.json` contradicts `config.json`.
    pub fn scheme(&self, module: &str) -> Result<Option<Scheme>, CheckpointError> {
        match self.quantization.scheme(module) {
            Some(declared) => {
                let scheme = self.recorded.refine(&self.dir, module, declared)?;
                Ok(Some(Scheme { activation: self.activations.apply(scheme.activation), ..scheme }))
            }
            None => Ok(None),
        }
    }

    /// The weight of `module`: `weight`, or `weight_packed`, and `weight_scale` where MX is declared.
    ///
    /// # Errors
    /// A tensor is missing or does not have the declared format, a scale is NaN, or the module is packed but not
    /// declared.
    pub fn linear(&self, module: &str) -> Result<LinearTensor, CheckpointError> {
        self.linear_from(&Arc::default(), module)
    }

    /// As [`linear`](Self::linear), with memory from `pool`.
    pub(crate) fn linear_from(
        &self,
        pool: &Arc<BufferPool>,
        module: &str,
    ) -> Result<LinearTensor, CheckpointError> {
        match self.scheme(module)? {
            Some(scheme) => self.mx_linear(pool, module, scheme).map(LinearTensor::Mx),
            None => self.dense_linear(module).map(LinearTensor::Dense),
        }
    }

    fn dense_linear(&self, module: &str) -> Result<DenseTensor, CheckpointError> {
        if let Some(scale) = self.shards.info(&format!("{module}.weight_scale")) {
            return Err(self.tensor_error(scale, "the module is packed, but declared unquantized".to_owned()));
        }
        let name = format!("{module}.weight");
        let tensor = self.dense(&name)?;
        if tensor.shape.len() != 2 {
            let reason = format!("shape {:?} where [rows, cols] is expected", tensor.shape);
            return Err(self.tensor_error(self.info(&name)?, reason));
        }
        Ok(tensor)
    }

    fn mx_linear(
        &self,
        pool: &Arc<BufferPool>,
        module: &str,
        scheme: Scheme,
    ) -> Result<MxLinear, CheckpointError> {
        let (codes, scales, shape) = self.mx_parts(module, scheme)?;
        let read = |info: &TensorInfo| {
            let mut bytes = pool.take(self.length(info)?);
            self.shards.read(info, 0, bytes.as_mut_slice())?;
            Ok(bytes)
        };
        let (code_bytes, scale_bytes) = (read(codes)?, read(scales)?);
        // `contains` looks at many bytes at a time.
        if scale_bytes.contains(&E8M0_NAN)
            && let Some(block) = scale_bytes.iter().position(|scale| *scale == E8M0_NAN)
        {
            let blocks = scheme.weight.format.scale_bytes(shape[1]);
            let reason = format!("the scale of row {}, block {} is NaN", block / blocks, block % blocks);
            return Err(self.tensor_error(scales, reason));
        }
        MxLinear::new(scheme, shape, code_bytes, scale_bytes).map_err(|error| CheckpointError::Mx {
            path: self.shards.path(codes).to_owned(),
            tensor: codes.name.clone(),
            error,
        })
    }

    /// Shape and stored size of a module with `scheme`, from the headers alone.
    ///
    /// # Errors
    /// A tensor is missing or does not have the format.
    pub fn mx_info(&self, module: &str, scheme: Scheme) -> Result<MxInfo, CheckpointError> {
        let (codes, scales, shape) = self.mx_parts(module, scheme)?;
        Ok(MxInfo { shape, bytes: codes.bytes + scales.bytes })
    }

    /// Codes, scales and `[N, K]` of a module with `scheme`.
    fn mx_parts(
        &self,
        module: &str,
        scheme: Scheme,
    ) -> Result<(&TensorInfo, &TensorInfo, [usize; 2]), CheckpointError> {
        let packed = format!("{module}.weight_packed");
        let codes = match self.shards.info(&packed) {
            Some(info) => info,
            None => self.info(&format!("{module}.weight"))?,
        };
        let scales = self.info(&format!("{module}.weight_scale"))?;
        let shape = self.mx_shape(codes, scheme)?;
        if !matches!(scales.dtype, Dtype::U8 | Dtype::F8_E8M0) {
            return Err(self.tensor_error(scales, format!("{} where U8 is expected", scales.dtype)));
        }
        let expected = [shape[0], scheme.weight.format.scale_bytes(shape[1])];
        if scales.shape != expected {
            let reason = format!("shape {:?} where {expected:?} is expected", scales.shape);
            return Err(self.tensor_error(scales, reason));
        }
        Ok((codes, scales, shape))
    }

    /// `[N, K]` of stored codes: U8 holds packed bytes, the other dtypes say how many elements there are.
    fn mx_shape(&self, info: &TensorInfo, scheme: Scheme) -> Result<[usize; 2], CheckpointError> {
        let format = scheme.weight.format;
        let &[rows, stored_cols] = info.shape.as_slice() else {
            return Err(
                self.tensor_error(info, format!("shape {:?} where [rows, cols] is expected", info.shape))
            );
        };
        let bits = format.element.spec().bits as usize;
        let native = quantization::native_dtype(format.element);
        let cols = if info.dtype == Dtype::U8 && (stored_cols * 8).is_multiple_of(bits) {
            stored_cols * 8 / bits
        } else if native == Some(info.dtype) {
            stored_cols
        } else {
            let reason = format!("{} {:?} does not hold {format}", info.dtype, info.shape);
            return Err(self.tensor_error(info, reason));
        };
        Ok([rows, cols])
    }

    fn length(&self, info: &TensorInfo) -> Result<usize, CheckpointError> {
        usize::try_from(info.bytes)
            .map_err(|_| self.tensor_error(info, "larger than the address space".to_owned()))
    }

    fn read(&self, info: &TensorInfo) -> Result<Vec<u8>, CheckpointError> {
        let mut bytes = vec![0; self.length(info)?];
        self.shards.read(info, 0, &mut bytes)?;
        Ok(bytes)
    }

    fn tensor_error(&self, info: &TensorInfo, reason: String) -> CheckpointError {
        CheckpointError::Tensor { path: self.shards.path(info).to_owned(), tensor: info.name.clone(), reason }
    }
}

/// The unquantized element types.
pub fn dense_dtype(dtype: Dtype) -> Option<DenseDtype> {
    match dtype {
        Dtype::BF16 => Some(DenseDtype::Bf16),
        Dtype::F16 => Some(DenseDtype::F16),
        Dtype::F32 => Some(DenseDtype::F32),
        _ => None,
    }
}

fn read_json(path: &Path) -> Result<Value, CheckpointError> {
    let text = std::fs::read(path).map_err(|error| CheckpointError::Io { path: path.to_owned(), error })?;
    serde_json::from_slice(&text).map_err(|error| CheckpointError::Json { path: path.to_owned(), error })
}

#[cfg(test)]
mod tests;

//! Tensors in memory, checked against what the checkpoint declares.

use half::{bf16, f16};
use kernels::mx::{MxTensor, MxTensorError, Scheme};
use kernels::{DenseDtype, WeightSource};

use super::TensorBytes;

/// An unquantized tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DenseTensor {
    /// Name in the checkpoint.
    pub name: String,
    /// Element type.
    pub dtype: DenseDtype,
    /// Shape, row-major.
    pub shape: Vec<usize>,
    /// Little-endian elements.
    pub bytes: Vec<u8>,
}

impl DenseTensor {
    /// The elements as F32 (exact for every dtype).
    pub fn to_f32(&self) -> Vec<f32> {
        to_f32(self.dtype, &self.bytes)
    }
}

/// Little-endian elements as F32 (exact for every dtype).
pub fn to_f32(dtype: DenseDtype, bytes: &[u8]) -> Vec<f32> {
    let pairs = || bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    match dtype {
        DenseDtype::Bf16 => pairs().map(|b| bf16::from_bits(b).to_f32()).collect(),
        DenseDtype::F16 => pairs().map(|b| f16::from_bits(b).to_f32()).collect(),
        DenseDtype::F32 => {
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        }
    }
}

/// The weight `[rows, cols]` = `[N, K]` of a linear module.
#[derive(Debug, Clone)]
pub enum LinearTensor {
    /// Unquantized; `shape` has two entries.
    Dense(DenseTensor),
    /// Quantized to an MX format.
    Mx(MxLinear),
}

/// Codes and scales of a quantized linear module, checked against its shape when it was read.
#[derive(Debug, Clone)]
pub struct MxLinear {
    scheme: Scheme,
    shape: [usize; 2],
    codes: TensorBytes,
    scales: TensorBytes,
}

impl MxLinear {
    /// The packed matrix `[N, K]` = `shape`.
    ///
    /// # Errors
    /// The sizes do not fit each other.
    pub fn new(
        scheme: Scheme,
        shape: [usize; 2],
        codes: impl Into<TensorBytes>,
        scales: impl Into<TensorBytes>,
    ) -> Result<Self, MxTensorError> {
        let (codes, scales) = (codes.into(), scales.into());
        MxTensor::new(scheme.weight.format, shape, &codes, &scales)?;
        Ok(Self { scheme, shape, codes, scales })
    }

    /// What the checkpoint declares.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// The packed matrix.
    pub fn tensor(&self) -> MxTensor<'_> {
        MxTensor::new(self.scheme.weight.format, self.shape, &self.codes, &self.scales)
            .expect("sizes were checked when the tensor was read")
    }
}

impl LinearTensor {
    /// `[N, K]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::Dense(tensor) => [tensor.shape[0], tensor.shape[1]],
            Self::Mx(tensor) => tensor.shape,
        }
    }

    /// The declared scheme; `None` for an unquantized weight.
    pub fn scheme(&self) -> Option<Scheme> {
        match self {
            Self::Dense(_) => None,
            Self::Mx(tensor) => Some(tensor.scheme),
        }
    }

    /// The rows, for [`Backend::upload`](kernels::Backend::upload).
    pub fn source(&self) -> WeightSource<'_> {
        match self {
            Self::Dense(tensor) => {
                WeightSource::Dense { dtype: tensor.dtype, shape: self.shape(), bytes: &tensor.bytes }
            }
            Self::Mx(tensor) => WeightSource::Mx {
                tensor: tensor.tensor(),
                scale_rounding: tensor.scheme.weight.scale_rounding,
                activation: tensor.scheme.activation,
                rotation: tensor.scheme.rotation,
            },
        }
    }
}

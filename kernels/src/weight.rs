//! A weight matrix on its device.

use crate::buffer::Charge;
use crate::cpu::PackedWeight;
use crate::mx::Scheme;

/// A `[rows, cols]` = `[N, K]` weight, repacked once for its device by [`Backend::upload`](crate::Backend::upload).
#[derive(Debug)]
pub struct Weight {
    pub(crate) shape: [usize; 2],
    pub(crate) scheme: Option<Scheme>,
    pub(crate) data: WeightData,
    pub(crate) bias: Option<Vec<f32>>,
    pub(crate) _charges: Vec<Charge>,
    pub(crate) bytes: usize,
}

#[derive(Debug)]
pub(crate) enum WeightData {
    Cpu(PackedWeight),
    #[cfg(feature = "cuda")]
    Cuda(crate::cuda::TiledWeight),
}

impl Weight {
    /// `[N, K]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// The declared scheme; `None` for a dense weight.
    pub fn scheme(&self) -> Option<Scheme> {
        self.scheme
    }

    /// Bytes held on the device: codes and scales, or dense elements; without the bias.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

//! Quantization methods: one file each.
//!
//! `nearest` needs no more than the rows themselves. `gptq` and `error-diffusion` are given, beside the rows, the Gram
//! matrix of what calibration found at the module's input ([`Problem`]).

mod cholesky;
mod descent;
mod diffusion;
mod error_diffusion;
mod gptq;
mod grid;
mod lanes;
mod nearest;
mod problem;
mod retarget;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use kernels::mx::{Cast, Energy, NonFinite, Values};

pub use error_diffusion::error_diffusion;
pub use gptq::{ColumnOrder, gptq};
pub use nearest::DirectCast;
pub use problem::{Problem, Quantized};
pub use retarget::retarget;

/// Rows of one weight, on their way to an MX format.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// Name of the weight, unique in the checkpoint.
    pub tensor: &'a str,
    /// Whole rows `[_, K]`.
    pub values: Values<'a>,
    /// Index in the tensor of the first value.
    pub first_index: u64,
}

/// What turns rows into codes and scales.
pub trait Quantizer: Sync {
    /// Writes the packed codes and scales of `rows`; returns what was lost.
    ///
    /// # Errors
    /// See [`QuantizeError`].
    fn quantize(
        &self,
        cast: Cast,
        rows: Rows<'_>,
        codes: &mut [u8],
        scales: &mut [u8],
    ) -> Result<Energy, QuantizeError>;
}

/// Rows that could not be quantized.
#[derive(Debug, thiserror::Error)]
pub enum QuantizeError {
    /// The first NaN or Inf.
    #[error(transparent)]
    NonFinite(#[from] NonFinite),
    /// What calibration stored cannot be read.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
}

/// A method that needs calibration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CalibratedMethod {
    /// [`gptq()`], columns by importance, then coordinate descent.
    Gptq,
    /// [`error_diffusion()`].
    ErrorDiffusion,
}

impl CalibratedMethod {
    /// Passes of coordinate descent after GPTQ: more of them change little.
    const SWEEPS: usize = 2;

    /// Name on the command line, in records and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gptq => "gptq",
            Self::ErrorDiffusion => "error-diffusion",
        }
    }

    /// Rounds `problem.weight`.
    pub fn quantize(self, problem: &Problem<'_>) -> Quantized {
        match self {
            Self::Gptq => gptq(problem, ColumnOrder::Importance, Self::SWEEPS),
            Self::ErrorDiffusion => error_diffusion(problem),
        }
    }
}

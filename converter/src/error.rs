//! Why a conversion failed. Every message is one line and names the file, tensor or flag.

use std::path::PathBuf;

use kernels::mx::Scheme;
use models::checkpoint::CheckpointError;
use models::checkpoint::quantization::Dialect;

use crate::calibrate::CalibrationError;
use crate::mix::MixError;
use crate::plan::PlanError;

/// A conversion that failed. The output's name is as it was, save after an [`Io`](Self::Io) error of the very last
/// step, which makes the rename durable: then it holds the new checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The source cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The recipe does not fit the model.
    #[error("{}: {error}", path.display())]
    Plan {
        /// The source, or its file that holds the tensor.
        path: PathBuf,
        /// What does not fit.
        error: PlanError,
    },
    /// The file system refused.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// The GGUF file cannot be converted.
    #[error("{}: {reason}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, or not supported.
        reason: String,
    },
    /// The source is quantized already.
    #[error("{}: already quantized ({method}); convert the unquantized checkpoint instead", path.display())]
    AlreadyQuantized {
        /// The folder.
        path: PathBuf,
        /// What its `quantization_config` declares.
        method: &'static str,
    },
    /// The model could not be calibrated.
    #[error(transparent)]
    Calibration(#[from] CalibrationError),
    /// No mix of formats does what was asked for.
    #[error(transparent)]
    Mix(#[from] MixError),
    /// The chosen layout has no place for what was asked.
    #[error("--layout {layout} has no place for {what}; --layout ocp-mx has")]
    Layout {
        /// The layout.
        layout: Dialect,
        /// A scheme, or quantized embeddings.
        what: Unexpressed,
    },
    /// The output exists.
    #[error("{}: exists already; --force replaces it", path.display())]
    OutputExists {
        /// The output.
        path: PathBuf,
    },
    /// The output is not something to replace.
    #[error("{}: {reason}", path.display())]
    OutputRefused {
        /// The output.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The disk has not enough room.
    #[error("{}: the disk is full: the output takes {needed} bytes{}", path.display(), free(*.available))]
    DiskFull {
        /// The output.
        path: PathBuf,
        /// Bytes that the output takes.
        needed: u64,
        /// Bytes that were free before the start, if that is why.
        available: Option<u64>,
    },
    /// A weight is not a number.
    #[error("{}: tensor {tensor}: element {index:?} is {value}", path.display())]
    NonFinite {
        /// The file that holds the tensor.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Index along each dimension.
        index: Vec<u64>,
        /// `NaN`, `inf` or `-inf`.
        value: &'static str,
    },
}

/// What a layout has no place for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unexpressed {
    /// These formats.
    Scheme(Scheme),
    /// Quantized embeddings.
    Embeddings,
}

impl std::fmt::Display for Unexpressed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Scheme(scheme) if scheme.rotation.is_some() => {
                write!(f, "{scheme}: what rotates inputs is declared by ocp-mx alone")
            }
            Self::Scheme(scheme) => write!(f, "{scheme}"),
            Self::Embeddings => f.write_str("quantized embeddings"),
        }
    }
}

fn free(available: Option<u64>) -> String {
    available.map(|bytes| format!(", {bytes} are free")).unwrap_or_default()
}

impl ConvertError {
    /// Adds the path that an operation was on.
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |error| Self::Io { path, error }
    }
}

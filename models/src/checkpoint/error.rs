//! Why a checkpoint cannot be read.

use std::path::PathBuf;

use kernels::mx::MxTensorError;

/// A checkpoint that cannot be read. Every message names the file, and the tensor or field in it, and is complete:
/// it says what the error below it said.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file system refused.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// The folder holds no safetensors checkpoint.
    #[error("{}: {reason}", dir.display())]
    NotACheckpoint {
        /// The folder.
        dir: PathBuf,
        /// What is missing.
        reason: &'static str,
    },
    /// A JSON file does not have the form it must have.
    #[error("{}: {error}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What serde says, with line and column.
        error: serde_json::Error,
    },
    /// A safetensors file, the index or `config.json` is truncated or corrupt.
    #[error("{}: {reason}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor that is needed is not there.
    #[error("{}: tensor {tensor} is missing", dir.display())]
    MissingTensor {
        /// The checkpoint's folder.
        dir: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A tensor does not have the dtype, shape or values it must have.
    #[error("{}: tensor {tensor}: {reason}", path.display())]
    Tensor {
        /// The shard that holds it.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Codes and scales do not fit together.
    #[error("{}: tensor {tensor}: {error}", path.display())]
    Mx {
        /// The shard that holds it.
        path: PathBuf,
        /// The weight tensor.
        tensor: String,
        /// What is wrong with it.
        error: MxTensorError,
    },
    /// The checkpoint declares a quantization that this crate does not execute, and will not ignore.
    #[error("{}: {field}: {reason}", path.display())]
    Quantization {
        /// `config.json`, `hf_quant_config.json` or `mx_conversion.json`.
        path: PathBuf,
        /// The JSON field.
        field: String,
        /// What it declares.
        reason: String,
    },
}

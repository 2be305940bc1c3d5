//! What can be wrong with a model's files.

use kernels::mx::MxTensorError;

use crate::checkpoint::CheckpointError;

/// A `config.json` or `generation_config.json` that describes no model which runs here.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A field that has no default is absent or null.
    #[error("{file}: {field} is missing")]
    Missing {
        /// The file.
        file: &'static str,
        /// The field, dotted: `rope_scaling.factor`.
        field: String,
    },
    /// A field has the wrong type, or a value outside its range.
    #[error("{file}: {field} is {value}, not {expected}")]
    Invalid {
        /// The file.
        file: &'static str,
        /// The field, dotted.
        field: String,
        /// What the file says.
        value: String,
        /// What would be accepted.
        expected: String,
    },
    /// A field asks for something that is not implemented.
    #[error("{file}: {field} = {value} is not supported; supported: {supported}")]
    Unsupported {
        /// The file.
        file: &'static str,
        /// The field, dotted.
        field: String,
        /// What the file says.
        value: String,
        /// What is implemented.
        supported: String,
    },
    /// The file is there but cannot be read.
    #[error("{path}: {error}")]
    Io {
        /// The file.
        path: String,
        /// Why.
        error: std::io::Error,
    },
    /// The file is no JSON.
    #[error("{path}: {error}")]
    Json {
        /// The file.
        path: String,
        /// Why.
        error: serde_json::Error,
    },
}

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The configuration is wrong or not supported.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A tensor is missing or unreadable.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A tensor has not the shape that the configuration calls for.
    #[error("{tensor} has shape {actual:?}; config.json calls for {expected:?}")]
    Shape {
        /// The tensor's name.
        tensor: String,
        /// What the configuration calls for.
        expected: Vec<usize>,
        /// What the checkpoint holds.
        actual: Vec<usize>,
    },
    /// Random weights of this shape cannot be in the format asked for.
    #[error("random weights for {tensor}: {error}")]
    Synthetic {
        /// The module.
        tensor: String,
        /// Why.
        error: MxTensorError,
    },
    /// The device is out of memory, or cannot run a format.
    #[error(transparent)]
    Device(#[from] kernels::Error),
}

//! Why a model could not be calibrated.

use std::path::PathBuf;

use models::ModelError;

use crate::text_tokenizer::TokenizerError;

/// A calibration that failed. Every message is one line and names the file, module or flag.
#[derive(Debug, thiserror::Error)]
pub enum CalibrationError {
    /// A file of the calibration cannot be read or written.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// The model has no tokenizer, or none that can be read.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The model is no Hugging Face folder.
    #[error(
        "{}: calibration needs a Hugging Face folder with tokenizer.json; convert from one",
        path.display()
    )]
    NoFolder {
        /// The model.
        path: PathBuf,
    },
    /// The text is too short to fill two windows: one to calibrate on, one to check with.
    #[error(
        "--calibration {}: {tokens} tokens; two windows of {window} (--calibration-window) are the least",
        path.display()
    )]
    TooShort {
        /// The text.
        path: PathBuf,
        /// Tokens it has.
        tokens: usize,
        /// Tokens of a window.
        window: usize,
    },
    /// A window is longer than the model's context, or too short to score.
    #[error("--calibration-window {window}: between 2 and {max}, the model's context, is possible")]
    Window {
        /// As asked for.
        window: usize,
        /// The longest context.
        max: usize,
    },
    /// The text has a token that the model has no embedding for.
    #[error("{}: token {token} of the calibration text is not among the model's {vocab}", path.display())]
    Vocabulary {
        /// `tokenizer.json`.
        path: PathBuf,
        /// The token.
        token: u32,
        /// The model's vocabulary.
        vocab: usize,
    },
    /// Activations overflow.
    #[error("{module}: its inputs are not finite numbers on the calibration text")]
    NonFinite {
        /// The first module of the stage.
        module: String,
    },
    /// A calibrated method without a text.
    #[error("--method {method} needs --calibration FILE, a text like those the model will see")]
    NoText {
        /// The method.
        method: &'static str,
    },
    /// The model is not one that runs here.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The device is out of memory.
    #[error(transparent)]
    Device(#[from] kernels::Error),
    /// A checkpoint of the calibration is not what was written.
    #[error("{}: {reason}; remove it to start over", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl CalibrationError {
    /// Adds the path that an operation was on.
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |error| Self::Io { path, error }
    }
}

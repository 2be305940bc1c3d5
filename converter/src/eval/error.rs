//! Why an evaluation failed. Every message is one line and names the file or flag.

use std::path::PathBuf;

use models::ModelError;
use models::checkpoint::CheckpointError;

use crate::text_tokenizer::TokenizerError;

/// An evaluation that failed.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// A checkpoint cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A model cannot be loaded.
    #[error("{}: {error}", path.display())]
    Model {
        /// Its folder.
        path: PathBuf,
        /// Why.
        error: Box<ModelError>,
    },
    /// Out of memory, or a KV cache that the device does not have.
    #[error(transparent)]
    Device(#[from] kernels::Error),
    /// The file system refused.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// The tokenizer is missing or wrong, or has no token for some of the text.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The text has fewer tokens than the windows take.
    #[error("{}: {actual} tokens; {windows} windows of {length} take {}", path.display(), windows * length)]
    ShortText {
        /// The text.
        path: PathBuf,
        /// Tokens it has.
        actual: usize,
        /// Windows asked for.
        windows: usize,
        /// Tokens of a window.
        length: usize,
    },
    /// A line of a task is no question.
    #[error("{}, line {line}: {reason}", path.display())]
    Task {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A checkpoint cannot be compared with the first one.
    #[error("{}: {reason}; compare it separately", path.display())]
    Incomparable {
        /// Its folder.
        path: PathBuf,
        /// How they differ.
        reason: String,
    },
    /// A sequence is longer than the model's context.
    #[error("{what} has {tokens} tokens; the context of {} is {limit}", path.display())]
    Context {
        /// A window, or a line of a file.
        what: String,
        /// Its tokens.
        tokens: usize,
        /// The model's folder.
        path: PathBuf,
        /// The longest context, in tokens.
        limit: usize,
    },
}

impl EvalError {
    /// Adds the path that an operation was on.
    pub(super) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |error| Self::Io { path, error }
    }
}

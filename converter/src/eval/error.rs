//! Why an evaluation failed. Every message is one line and names the file or flag.

use std::path::PathBuf;

/// An evaluation that failed.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
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
    #[error("{}: {reason}", path.display())]
    Tokenizer {
        /// Its file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
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
}

impl EvalError {
    /// Adds the path that an operation was on.
    pub(super) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |error| Self::Io { path, error }
    }
}

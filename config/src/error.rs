//! What can be wrong with the settings.

use std::path::PathBuf;

/// An error in the settings. Names the file or the key; a key `max_num_seqs` is the flag `--max-num-seqs` and the
/// environment variable `MXSERVE_MAX_NUM_SEQS`.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file given as `--config`.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML, has an unknown key, or a value of the wrong type.
    #[error("{}: {}", path.display(), message.trim_end())]
    Parse {
        /// The file given as `--config`.
        path: PathBuf,
        /// The parser's words, with line and key.
        message: String,
    },
    /// A value outside its range.
    #[error("{key}: {message}")]
    Invalid {
        /// The key, as in the file.
        key: &'static str,
        /// What is allowed.
        message: String,
    },
}

//! What can go wrong on a device.

/// An error of a backend. Shape mistakes are bugs and panic with a sentence; these are the world's doing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device has not enough memory.
    #[error("out of memory: {what} needs {bytes} bytes on {device}")]
    OutOfMemory {
        /// What the memory was for.
        what: String,
        /// Bytes asked for.
        bytes: usize,
        /// Device that refused.
        device: String,
    },
    /// The device cannot be used at all.
    #[error("{device} is not available: {why}")]
    Unavailable {
        /// The device asked for.
        device: String,
        /// What is missing.
        why: String,
    },
    /// The device has no kernel for what was asked.
    #[error("{device} cannot run {what}")]
    Unsupported {
        /// What was asked for.
        what: String,
        /// Device that refused.
        device: String,
    },
}

/// Result of a backend call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

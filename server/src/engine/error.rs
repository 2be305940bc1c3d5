//! Why an engine does not start.

/// Why an engine did not start.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The device or the model could not be opened.
    #[error(transparent)]
    Load(Box<dyn std::error::Error + Send + Sync>),
    /// The device could not hold the KV cache or the workspace.
    #[error(transparent)]
    Device(#[from] kernels::Error),
    /// A limit must not be zero.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
    /// A longer context than the model was made for.
    #[error(
        "max_model_len is {asked}, but the model was made for {supported} tokens (max_position_embeddings)"
    )]
    MaxModelLen {
        /// What was asked for.
        asked: usize,
        /// What the model says.
        supported: usize,
    },
    /// The KV cache holds less than one sequence of the asked length.
    #[error(
        "the KV cache holds {held} tokens, less than one sequence of max_model_len {asked}: \
         it needs {needed_bytes} bytes (kv_cache_memory_bytes)"
    )]
    KvCacheTooSmall {
        /// Tokens it holds.
        held: usize,
        /// The length that was asked for.
        asked: usize,
        /// Bytes that one such sequence needs.
        needed_bytes: usize,
    },
    /// A share was asked for of memory that the device does not have.
    #[error("the KV cache is to take a share of the memory of {0}, which has none of its own")]
    NoDeviceMemory(String),
    /// Weights and workspace take more than the share of memory that was allowed.
    #[error(
        "no memory is left for the KV cache: {used} of {total} bytes are in use before it, and {share} of them may be; \
         raise gpu_memory_utilization, or lower max_num_batched_tokens or max_num_seqs"
    )]
    NothingLeft {
        /// Bytes in use, by this process and others.
        used: usize,
        /// The device's memory.
        total: usize,
        /// Share of it that may be used.
        share: f64,
    },
    /// Drafts are verified by other kernels than those of steps of one token, which this device has recorded.
    #[error("speculative_config: {0} does not verify drafts exactly; leave it out")]
    Speculation(String),
    /// The engine's thread could not be started.
    #[error("cannot start the engine's thread: {0}")]
    Thread(#[from] std::io::Error),
    /// The engine's thread panicked while it was loading.
    #[error("the engine died while loading")]
    Died,
}

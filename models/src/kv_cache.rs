//! The paged KV cache of all layers.

use kernels::{Backend, KvCacheDtype, PagedKv};

use crate::ModelConfig;

/// Keys and values of every layer, in blocks of [`KV_BLOCK_TOKENS`](kernels::KV_BLOCK_TOKENS) tokens. Block `b` is the same block in every
/// layer, so one block table serves the whole model.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<PagedKv>,
}

impl KvCache {
    /// Allocates `blocks` blocks for each layer.
    ///
    /// # Errors
    /// Out of memory, or a dtype that the device cannot store these heads in.
    pub fn new(
        backend: &dyn Backend,
        config: &ModelConfig,
        blocks: usize,
        dtype: KvCacheDtype,
    ) -> kernels::Result<Self> {
        let layers = (0..config.num_layers)
            .map(|_| backend.alloc_kv(blocks, config.heads, dtype))
            .collect::<kernels::Result<_>>()?;
        Ok(Self { layers })
    }

    /// Bytes that one block takes in all layers together.
    ///
    /// # Errors
    /// A dtype that the device cannot store these heads in.
    pub fn bytes_per_block(
        backend: &dyn Backend,
        config: &ModelConfig,
        dtype: KvCacheDtype,
    ) -> kernels::Result<usize> {
        Ok(config.num_layers * backend.kv_block_bytes(config.heads, dtype)?)
    }

    /// The caches of the layers, in order.
    pub(crate) fn layers_mut(&mut self) -> &mut [PagedKv] {
        &mut self.layers
    }
}

//! How large the engine is: what was asked for, what it comes to for a model, and what came of it.

use std::sync::Arc;

use config::SchedulingPolicy;
use kernels::{Backend, DeviceMemory, KV_BLOCK_TOKENS, KvCacheDtype, MemoryAccount};
use models::{KvCache, LinearInfo, Model};

use super::block_manager::blocks_for;
use super::error::EngineError;
use super::ngram::NgramLookup;
use super::scheduler::{Features, Limits};

/// Tokens per sequence that an automatically sized KV cache makes room for. Most conversations are shorter; with
/// longer ones fewer run at a time.
const TYPICAL_CONTEXT_TOKENS: usize = 2048;

/// Size and limits of an engine.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EngineOptions {
    /// Most tokens of a sequence, prompt and output. `None`: as many as the model was made for and the cache holds.
    pub max_model_len: Option<usize>,
    /// Sequences that run at a time.
    pub max_num_seqs: usize,
    /// Tokens that one step computes. More make prefill faster and the steps in between decodes longer.
    pub max_num_batched_tokens: usize,
    /// Sequences that may wait, beyond the `max_num_seqs` that may run.
    pub max_num_queued_reqs: usize,
    /// How large the KV cache is.
    pub kv_cache: KvCacheSize,
    /// How it is stored.
    pub kv_cache_dtype: KvCacheDtype,
    /// Whose turn it is.
    pub scheduling_policy: SchedulingPolicy,
    /// Find the beginnings of prompts in the KV cache of earlier requests.
    pub prefix_caching: bool,
    /// Draft tokens and verify them in one step, on devices where the kernels of such steps give the same results as
    /// those of others.
    pub speculation: Option<NgramLookup>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            max_model_len: None,
            max_num_seqs: 64,
            // As fast as larger steps on a processor, whose caches hold the activations of this many tokens, and running
            // sequences wait half as long for a prompt's step as with 512.
            max_num_batched_tokens: 256,
            max_num_queued_reqs: 1024,
            kv_cache: KvCacheSize::Auto { at_most_bytes: 4 << 30 },
            kv_cache_dtype: KvCacheDtype::default(),
            scheduling_policy: SchedulingPolicy::default(),
            prefix_caching: true,
            speculation: None,
        }
    }
}

/// Size of the KV cache.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum KvCacheSize {
    /// Room for `max_num_seqs` sequences of 2048 tokens and for one of `max_model_len`, within a bound.
    Auto {
        /// The bound.
        at_most_bytes: usize,
    },
    /// As many blocks as fit.
    Bytes(usize),
    /// This many blocks of [`KV_BLOCK_TOKENS`] tokens.
    Blocks(usize),
    /// What is left of this share of the device's memory; on a device that has its own.
    DeviceShare(f64),
}

/// The sizes of a running engine: [`EngineOptions`], decided for one model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sizes {
    pub(super) limits: Limits,
    pub(super) max_model_len: usize,
    pub(super) kv_blocks: usize,
}

/// What a model needs of the cache.
#[derive(Debug, Clone, Copy)]
pub(super) struct ModelNeeds {
    /// Longest context the model was made for.
    pub(super) max_model_len: usize,
    /// Bytes of one KV block in all layers.
    pub(super) block_bytes: usize,
    /// The device's memory before the cache is allocated, if it has its own.
    pub(super) memory: Option<DeviceMemory>,
}

/// Refuses a context that is longer than the model was made for.
pub(crate) fn check_model_len(asked: usize, supported: usize) -> Result<(), EngineError> {
    if asked > supported { Err(EngineError::MaxModelLen { asked, supported }) } else { Ok(()) }
}

impl EngineOptions {
    /// The limits of a step.
    pub(super) fn limits(&self) -> Result<Limits, EngineError> {
        for (name, value) in [
            ("max_num_seqs", self.max_num_seqs),
            ("max_num_batched_tokens", self.max_num_batched_tokens),
            ("max_model_len", self.max_model_len.unwrap_or(1)),
        ] {
            if value == 0 {
                return Err(EngineError::Zero(name));
            }
        }
        Ok(Limits { max_num_seqs: self.max_num_seqs, max_num_batched_tokens: self.max_num_batched_tokens })
    }

    /// What the scheduler may do.
    pub(super) fn features(&self) -> Features {
        Features { prefix_caching: self.prefix_caching, speculation: self.speculation }
    }

    /// Decides the sizes.
    pub(super) fn sizes(&self, model: ModelNeeds, device: &str) -> Result<Sizes, EngineError> {
        let limits = self.limits()?;
        let wanted_len = self.max_model_len.unwrap_or(model.max_model_len);
        check_model_len(wanted_len, model.max_model_len)?;
        let kv_blocks = match self.kv_cache {
            KvCacheSize::Blocks(blocks) => blocks,
            KvCacheSize::Bytes(bytes) => bytes / model.block_bytes,
            KvCacheSize::Auto { at_most_bytes } => {
                let typical = blocks_for(wanted_len.min(TYPICAL_CONTEXT_TOKENS));
                let wanted = self.max_num_seqs.saturating_mul(typical).max(blocks_for(wanted_len));
                wanted.min(at_most_bytes / model.block_bytes)
            }
            KvCacheSize::DeviceShare(share) => {
                let DeviceMemory { free_bytes, total_bytes } =
                    model.memory.ok_or_else(|| EngineError::NoDeviceMemory(device.to_owned()))?;
                let used = total_bytes - free_bytes;
                let left = ((total_bytes as f64 * share) as usize).saturating_sub(used);
                if left < model.block_bytes {
                    return Err(EngineError::NothingLeft { used, total: total_bytes, share });
                }
                left / model.block_bytes
            }
        };
        let held = kv_blocks.saturating_mul(KV_BLOCK_TOKENS);
        // Shortening a length nobody asked for is help; shortening one that was asked for is a surprise.
        if held == 0 || (self.max_model_len.is_some() && held < wanted_len) {
            let needed_bytes = blocks_for(wanted_len).saturating_mul(model.block_bytes);
            return Err(EngineError::KvCacheTooSmall { held, asked: wanted_len, needed_bytes });
        }
        Ok(Sizes { limits, max_model_len: wanted_len.min(held), kv_blocks })
    }
}

/// What an engine runs, fixed once it has started.
#[derive(Debug, Clone)]
pub struct EngineInfo {
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Elements of a hidden state.
    pub hidden_size: usize,
    /// Most tokens of a sequence, prompt and output.
    pub max_model_len: usize,
    /// Sequences that run at a time.
    pub max_num_seqs: usize,
    /// Blocks of the KV cache, of [`KV_BLOCK_TOKENS`] tokens each.
    pub kv_blocks: usize,
    /// Element type of the KV cache.
    pub kv_cache_dtype: KvCacheDtype,
    /// Whose turn it is.
    pub scheduling_policy: SchedulingPolicy,
    /// The kernel that executes attention over it.
    pub attention_kernel: String,
    /// The device, for people: `cpu, avx512, 2 threads`.
    pub backend: String,
    /// The model's linear layers by group and scheme.
    pub linears: Vec<LinearKernel>,
    /// Parameters of the whole model.
    pub parameters: usize,
    /// Bytes held on the device now, by component.
    pub memory: Arc<MemoryAccount>,
    /// The memory of a device of its own when the engine was ready: it allocates all of it before.
    pub device_memory: Option<DeviceMemory>,
}

/// Linear layers of one group and scheme, and what executes them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearKernel {
    /// The layers, and the scheme that the checkpoint declares.
    pub linear: LinearInfo,
    /// What the device runs for it.
    pub kernel: kernels::LinearKernel,
}

impl EngineInfo {
    pub(super) fn new(
        backend: &dyn Backend,
        model: &dyn Model,
        sizes: Sizes,
        options: &EngineOptions,
    ) -> Self {
        let dtype = options.kv_cache_dtype;
        let kernel =
            |linear: LinearInfo| LinearKernel { kernel: backend.linear_kernel(linear.scheme), linear };
        Self {
            vocab_size: model.config().vocab_size,
            hidden_size: model.config().hidden_size,
            max_model_len: sizes.max_model_len,
            max_num_seqs: sizes.limits.max_num_seqs,
            kv_blocks: sizes.kv_blocks,
            kv_cache_dtype: dtype,
            scheduling_policy: options.scheduling_policy,
            attention_kernel: backend.attention_kernel(dtype),
            backend: backend.description(),
            linears: model.linear_info().into_iter().map(kernel).collect(),
            parameters: model.parameters(),
            memory: Arc::clone(backend.memory()),
            device_memory: backend.device_memory(),
        }
    }
}

impl ModelNeeds {
    pub(super) fn of(backend: &dyn Backend, model: &dyn Model, dtype: KvCacheDtype) -> kernels::Result<Self> {
        let config = model.config();
        let block_bytes = KvCache::bytes_per_block(backend, config, dtype)?;
        Ok(Self { max_model_len: config.max_model_len, block_bytes, memory: backend.device_memory() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: ModelNeeds = ModelNeeds { max_model_len: 8192, block_bytes: 1000, memory: None };

    fn options(max_model_len: Option<usize>, kv_cache: KvCacheSize) -> EngineOptions {
        EngineOptions { max_model_len, kv_cache, max_num_seqs: 4, ..EngineOptions::default() }
    }

    #[test]
    fn sizes_follow_from_what_was_asked_for() {
        let auto = |at_most_bytes| KvCacheSize::Auto { at_most_bytes };
        // (max_model_len, cache, expected length and blocks)
        let cases = [
            (None, auto(1 << 40), (8192, 512)),          // 4 x 2048 tokens, and 8192
            (Some(1000), auto(1 << 40), (1000, 4 * 63)), // 4 x 1000 tokens
            (None, auto(100_000), (1600, 100)),          // what fits decides the length
            (None, KvCacheSize::Bytes(3_999), (48, 3)),
            (None, KvCacheSize::Blocks(1_000), (8192, 1_000)),
            (Some(48), KvCacheSize::Blocks(3), (48, 3)),
        ];
        for (len, cache, (expected_len, expected_blocks)) in cases {
            let sizes = options(len, cache).sizes(MODEL, "cpu").unwrap();
            assert_eq!(
                (sizes.max_model_len, sizes.kv_blocks),
                (expected_len, expected_blocks),
                "{len:?} {cache:?}"
            );
        }
    }

    #[test]
    fn what_cannot_be_is_said_plainly() {
        let fails = |options: EngineOptions| options.sizes(MODEL, "cpu").unwrap_err().to_string();
        let auto = KvCacheSize::Auto { at_most_bytes: 1 << 40 };
        assert_eq!(
            fails(options(Some(10_000), auto)),
            "max_model_len is 10000, but the model was made for 8192 tokens (max_position_embeddings)"
        );
        assert_eq!(
            fails(options(Some(49), KvCacheSize::Blocks(3))),
            "the KV cache holds 48 tokens, less than one sequence of max_model_len 49: \
             it needs 4000 bytes (kv_cache_memory_bytes)"
        );
        assert!(fails(options(None, KvCacheSize::Bytes(999))).contains("holds 0 tokens"));
        assert_eq!(fails(options(Some(0), auto)), "max_model_len must be at least 1");
        let none_running = EngineOptions { max_num_seqs: 0, ..EngineOptions::default() };
        assert_eq!(fails(none_running), "max_num_seqs must be at least 1");
        assert!(fails(options(None, KvCacheSize::DeviceShare(0.9))).contains("memory of cpu"));
    }

    #[test]
    fn the_cache_takes_what_its_share_leaves() {
        let memory = Some(DeviceMemory { free_bytes: 60_000, total_bytes: 100_000 });
        let blocks = |share| {
            let options = options(None, KvCacheSize::DeviceShare(share));
            options.sizes(ModelNeeds { memory, ..MODEL }, "cuda:0").map(|sizes| sizes.kv_blocks)
        };
        assert_eq!((blocks(0.9).unwrap(), blocks(1.0).unwrap()), (50, 60));
        for share in [0.1, 0.4] {
            let error = blocks(share).unwrap_err().to_string();
            assert!(error.contains("40000 of 100000") && error.contains("gpu_memory_utilization"), "{error}");
        }
    }
}

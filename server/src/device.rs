//! Which device runs, and what sizes suit it.

use config::{DeviceChoice, ServerConfig};
use kernels::Device;

use crate::engine::{EngineOptions, KvCacheSize, NgramLookup};

/// Share of a GPU's memory that is used where nothing else was said. The rest is for the driver, and for what else
/// runs there.
const GPU_MEMORY_SHARE: f64 = 0.9;

/// The first GPU if `--device auto` finds one that runs the kernels, and says why not if a build is made for GPUs.
pub(crate) fn choose(config: &ServerConfig) -> Device {
    let cpu = Device::Cpu { threads: config.threads };
    match config.device {
        DeviceChoice::Cpu => cpu,
        DeviceChoice::Cuda { ordinal } => Device::Cuda { ordinal, strict: config.strict },
        DeviceChoice::Auto if !cfg!(feature = "cuda") => cpu,
        DeviceChoice::Auto => {
            let gpu = Device::Cuda { ordinal: 0, strict: config.strict };
            match gpu.check() {
                Ok(()) => gpu,
                Err(error) => {
                    tracing::info!("serving on the CPU: {error}");
                    cpu
                }
            }
        }
    }
}

/// A knob that has no effect on the device is refused, not ignored.
#[derive(Debug, thiserror::Error)]
#[error("gpu_memory_utilization: has no effect on the CPU; kv_cache_memory_bytes sizes the KV cache")]
pub struct ShareOfCpu;

/// The engine's size: what the configuration says, over the device's defaults.
pub(crate) fn engine_options(config: &ServerConfig, device: Device) -> Result<EngineOptions, ShareOfCpu> {
    let defaults = match device {
        Device::Cpu { .. } => EngineOptions::default(),
        Device::Cuda { .. } => EngineOptions {
            max_num_seqs: 256,
            max_num_batched_tokens: 8192,
            kv_cache: KvCacheSize::DeviceShare(GPU_MEMORY_SHARE),
            ..EngineOptions::default()
        },
    };
    let kv_cache = match (config.kv_cache_memory_bytes, config.gpu_memory_utilization) {
        (_, Some(_)) if matches!(device, Device::Cpu { .. }) => return Err(ShareOfCpu),
        (Some(bytes), _) => KvCacheSize::Bytes(bytes),
        (None, Some(share)) => KvCacheSize::DeviceShare(share),
        (None, None) => defaults.kv_cache,
    };
    Ok(EngineOptions {
        max_model_len: config.max_model_len,
        max_num_seqs: config.max_num_seqs.unwrap_or(defaults.max_num_seqs),
        max_num_batched_tokens: config.max_num_batched_tokens.unwrap_or(defaults.max_num_batched_tokens),
        max_num_queued_reqs: config.max_num_queued_reqs,
        kv_cache,
        kv_cache_dtype: config.kv_cache_dtype,
        scheduling_policy: config.scheduling_policy,
        prefix_caching: config.enable_prefix_caching,
        speculation: config.speculative_config.map(|speculative| {
            let (max, min) = speculative.lookup_lengths();
            NgramLookup { num_speculative_tokens: speculative.num_speculative_tokens, max, min }
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GPU: Device = Device::Cuda { ordinal: 0, strict: false };

    #[test]
    fn defaults_depend_on_the_device_and_what_was_said_wins() {
        let config = ServerConfig::default();
        let cpu = engine_options(&config, Device::Cpu { threads: 1 }).unwrap();
        assert_eq!(cpu, EngineOptions::default());
        let gpu = engine_options(&config, GPU).unwrap();
        assert_eq!((gpu.max_num_seqs, gpu.max_num_batched_tokens), (256, 8192));
        assert_eq!(gpu.kv_cache, KvCacheSize::DeviceShare(GPU_MEMORY_SHARE));

        let config = ServerConfig {
            max_num_seqs: Some(3),
            max_num_batched_tokens: Some(5),
            gpu_memory_utilization: Some(0.25),
            ..config
        };
        let gpu = engine_options(&config, GPU).unwrap();
        assert_eq!((gpu.max_num_seqs, gpu.max_num_batched_tokens), (3, 5));
        assert_eq!(gpu.kv_cache, KvCacheSize::DeviceShare(0.25));
        let config = ServerConfig { kv_cache_memory_bytes: Some(7), ..config };
        assert_eq!(engine_options(&config, GPU).unwrap().kv_cache, KvCacheSize::Bytes(7));
    }

    #[test]
    fn a_share_of_the_cpu_is_refused() {
        let config = ServerConfig { gpu_memory_utilization: Some(0.5), ..ServerConfig::default() };
        let error = engine_options(&config, Device::Cpu { threads: 1 }).unwrap_err();
        assert!(error.to_string().starts_with("gpu_memory_utilization: "), "{error}");
    }
}

//! What was said: the same knobs in the file, the environment and the flags.

use std::net::{AddrParseError, IpAddr, Ipv4Addr};
use std::path::PathBuf;

use kernels::KvCacheDtype;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use crate::values::{
    DeviceChoice, GenerationConfig, LogFormat, LogLevel, ReasoningParser, SchedulingPolicy,
    SpeculativeConfig, ToolCallParser, kv_cache_dtype,
};

/// Every knob, as far as it was set. Names are vLLM's where it has the same knob.
#[derive(Clone, Default, PartialEq, clap::Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Folder of the model: config.json, safetensors, tokenizer.json
    #[arg(value_name = "MODEL", env = "MXSERVE_MODEL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<PathBuf>,

    /// Address to listen on, or localhost [default: 0.0.0.0]
    #[arg(long, env = "MXSERVE_HOST", value_parser = address, help_heading = "HTTP")]
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "optional_address")]
    pub host: Option<IpAddr>,

    /// Port to listen on; 0 takes a free one [default: 8000]. A value tcp://… of the environment variable is
    /// Kubernetes' (it sets MXSERVE_PORT for a service named mxserve) and ignored
    #[arg(long, env = "MXSERVE_PORT", help_heading = "HTTP")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,

    /// Names that requests may use for the model, the first one reported [default: the folder's name and its path]
    #[arg(
        long,
        env = "MXSERVE_SERVED_MODEL_NAME",
        value_name = "NAME",
        value_delimiter = ',',
        help_heading = "HTTP"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub served_model_name: Option<Vec<String>>,

    /// Bearer tokens, one of which every /v1 request must carry
    #[arg(
        long,
        env = "MXSERVE_API_KEY",
        hide_env_values = true,
        value_name = "KEY",
        value_delimiter = ',',
        help_heading = "HTTP"
    )]
    #[serde(skip_serializing)]
    pub api_key: Option<Vec<String>>,

    /// File with more of them, one per line; # begins a comment. Read again when it changes, and at SIGHUP
    #[arg(long, env = "MXSERVE_API_KEY_FILE", value_name = "FILE", help_heading = "HTTP")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_key_file: Option<PathBuf>,

    /// PEM file with the certificate chain, for HTTPS. Read again, with the key, when it changes, and at SIGHUP
    #[arg(long, env = "MXSERVE_SSL_CERTFILE", value_name = "FILE", help_heading = "HTTP")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ssl_certfile: Option<PathBuf>,

    /// PEM file with the certificate's private key
    #[arg(long, env = "MXSERVE_SSL_KEYFILE", value_name = "FILE", help_heading = "HTTP")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ssl_keyfile: Option<PathBuf>,

    /// Origins that browsers may call from; * for all
    #[arg(
        long,
        env = "MXSERVE_ALLOWED_ORIGINS",
        value_name = "ORIGIN",
        value_delimiter = ',',
        help_heading = "HTTP"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allowed_origins: Option<Vec<String>>,

    /// Largest request body in bytes [default: 33554432]
    #[arg(long, env = "MXSERVE_MAX_BODY_BYTES", value_name = "BYTES", help_heading = "HTTP")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_body_bytes: Option<usize>,

    /// Connections at a time; more wait until one closes [default: 4096]
    #[arg(long, env = "MXSERVE_MAX_CONNECTIONS", value_name = "N", help_heading = "HTTP")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_connections: Option<usize>,

    /// Seconds that a client may take to send a request's headers, then its body, and to take what it is sent; an idle
    /// connection is closed after as long [default: 60]
    #[arg(long, env = "MXSERVE_CLIENT_TIMEOUT", value_name = "SECS", help_heading = "HTTP")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_timeout: Option<u64>,

    /// Seconds from a request to the end of its answer; what takes longer is ended with an error [default: no limit]
    #[arg(long, env = "MXSERVE_REQUEST_TIMEOUT", value_name = "SECS", help_heading = "HTTP")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_timeout: Option<u64>,

    /// Seconds that running requests may take to finish after SIGTERM or SIGINT [default: 30]
    #[arg(long, env = "MXSERVE_SHUTDOWN_TIMEOUT", value_name = "SECS", help_heading = "HTTP")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shutdown_timeout: Option<u64>,

    /// No web page at /
    #[arg(
        long,
        env = "MXSERVE_DISABLE_WEB_PAGE",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        help_heading = "HTTP"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disable_web_page: Option<bool>,

    /// Longest sequence, prompt and answer together [default: the model's context]
    #[arg(long, env = "MXSERVE_MAX_MODEL_LEN", value_name = "TOKENS", help_heading = "Model")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_model_len: Option<usize>,

    /// File with a Jinja chat template, instead of the model's own
    #[arg(long, env = "MXSERVE_CHAT_TEMPLATE", value_name = "FILE", help_heading = "Model")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<PathBuf>,

    /// How the model writes calls of tools [default: auto, what its chat template shows]
    #[arg(long, env = "MXSERVE_TOOL_CALL_PARSER", help_heading = "Model")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_call_parser: Option<ToolCallParser>,

    /// How the model writes what it thinks before it answers [default: auto, what its chat template shows]
    #[arg(long, env = "MXSERVE_REASONING_PARSER", help_heading = "Model")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_parser: Option<ReasoningParser>,

    /// Where the sampling parameters' defaults come from [default: auto]
    #[arg(long, env = "MXSERVE_GENERATION_CONFIG", help_heading = "Model")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation_config: Option<GenerationConfig>,

    /// Device to run on: auto, cpu, cuda or cuda:N [default: auto, the first GPU if there is one]
    #[arg(long, env = "MXSERVE_DEVICE", value_name = "DEVICE", help_heading = "Device")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<DeviceChoice>,

    /// Threads of the CPU backend [default: one per core]
    #[arg(long, env = "MXSERVE_THREADS", value_name = "N", help_heading = "Device")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,

    /// Share of the GPU's memory to use, the KV cache taking what weights and workspace leave [default: 0.9; refused on
    /// the CPU]
    #[arg(long, env = "MXSERVE_GPU_MEMORY_UTILIZATION", value_name = "SHARE", help_heading = "Device")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu_memory_utilization: Option<f64>,

    /// Multiply quantized activations in BF16, which holds them exactly, also where FP8 would be faster (CUDA only; the
    /// CPU is always exact)
    #[arg(
        long,
        env = "MXSERVE_STRICT",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        help_heading = "Device"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strict: Option<bool>,

    /// GPUs that share the model; 1 is all there is [default: 1]
    #[arg(long, env = "MXSERVE_TENSOR_PARALLEL_SIZE", value_name = "N", help_heading = "Device")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tensor_parallel_size: Option<usize>,

    /// Sequences that run at once [default: 64 on the CPU, 256 on a GPU]
    #[arg(long, env = "MXSERVE_MAX_NUM_SEQS", value_name = "N", help_heading = "Scheduler")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_num_seqs: Option<usize>,

    /// Tokens computed in one step [default: 256 on the CPU, 8192 on a GPU]
    #[arg(long, env = "MXSERVE_MAX_NUM_BATCHED_TOKENS", value_name = "N", help_heading = "Scheduler")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_num_batched_tokens: Option<usize>,

    /// Sequences that may wait; more are answered with 429 [default: 1024]
    #[arg(long, env = "MXSERVE_MAX_NUM_QUEUED_REQS", value_name = "N", help_heading = "Scheduler")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_num_queued_reqs: Option<usize>,

    /// Order of service: fcfs, or by the requests' priority, lower first [default: fcfs]
    #[arg(long, env = "MXSERVE_SCHEDULING_POLICY", help_heading = "Scheduler")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scheduling_policy: Option<SchedulingPolicy>,

    /// Look for the beginnings of prompts in the KV cache of earlier requests [default: true]
    #[arg(
        long,
        env = "MXSERVE_ENABLE_PREFIX_CACHING",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        help_heading = "Scheduler"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub enable_prefix_caching: Option<bool>,

    /// Compute every prompt from its first token
    #[arg(
        long,
        num_args = 0,
        default_missing_value = "true",
        conflicts_with = "enable_prefix_caching",
        help_heading = "Scheduler"
    )]
    #[serde(skip)]
    pub no_enable_prefix_caching: Option<bool>,

    /// Draft tokens and verify them in one step (CPU only): {"method": "ngram", "num_speculative_tokens": 4,
    /// "prompt_lookup_max": 4, "prompt_lookup_min": 2} [default: none]
    #[arg(long, env = "MXSERVE_SPECULATIVE_CONFIG", value_name = "JSON", help_heading = "Scheduler")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub speculative_config: Option<SpeculativeConfig>,

    /// Element type of the KV cache; the MX types need heads of a multiple of 32 [default: auto, which is bf16]
    #[arg(
        long,
        env = "MXSERVE_KV_CACHE_DTYPE",
        value_name = "DTYPE",
        value_parser = kv_cache_dtype::parser(),
        help_heading = "Scheduler"
    )]
    #[serde(default, skip_serializing_if = "Option::is_none", with = "kv_cache_dtype")]
    pub kv_cache_dtype: Option<KvCacheDtype>,

    /// Size of the KV cache in bytes [default: on the CPU for max_num_seqs sequences of 2048 tokens, at most 4 GiB; on a
    /// GPU by gpu_memory_utilization]
    #[arg(long, env = "MXSERVE_KV_CACHE_MEMORY_BYTES", value_name = "BYTES", help_heading = "Scheduler")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_cache_memory_bytes: Option<usize>,

    /// Least important log lines to write [default: info]
    #[arg(long, env = "MXSERVE_LOG_LEVEL", help_heading = "Logging")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_level: Option<LogLevel>,

    /// How log lines are written, to standard error [default: text]
    #[arg(long, env = "MXSERVE_LOG_FORMAT", help_heading = "Logging")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_format: Option<LogFormat>,

    /// No log line per request
    #[arg(
        long,
        env = "MXSERVE_DISABLE_LOG_REQUESTS",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        help_heading = "Logging"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disable_log_requests: Option<bool>,

    /// Send a trace of each request to this OTLP collector, over HTTP: http://localhost:4318 [default: none]
    #[arg(long, env = "MXSERVE_OTLP_TRACES_ENDPOINT", value_name = "URL", help_heading = "Logging")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub otlp_traces_endpoint: Option<String>,
}

/// API keys are not shown.
impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&toml::to_string(self).unwrap_or_default())
    }
}

/// An address, or the name that every machine has for itself.
fn address(text: &str) -> Result<IpAddr, AddrParseError> {
    if text.eq_ignore_ascii_case("localhost") { Ok(Ipv4Addr::LOCALHOST.into()) } else { text.parse() }
}

fn optional_address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<IpAddr>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    text.map(|text| address(&text).map_err(D::Error::custom)).transpose()
}

impl Settings {
    /// `self` where it is set, else `lower`.
    #[must_use]
    pub fn or(self, lower: Self) -> Self {
        macro_rules! first_set {
            ($($field:ident),* $(,)?) => { Self { $($field: self.$field.or(lower.$field)),* } };
        }
        first_set!(
            model,
            host,
            port,
            served_model_name,
            api_key,
            api_key_file,
            ssl_certfile,
            ssl_keyfile,
            allowed_origins,
            max_body_bytes,
            max_connections,
            client_timeout,
            request_timeout,
            shutdown_timeout,
            disable_web_page,
            max_model_len,
            chat_template,
            tool_call_parser,
            reasoning_parser,
            generation_config,
            device,
            threads,
            gpu_memory_utilization,
            strict,
            tensor_parallel_size,
            max_num_seqs,
            max_num_batched_tokens,
            max_num_queued_reqs,
            scheduling_policy,
            enable_prefix_caching,
            no_enable_prefix_caching,
            speculative_config,
            kv_cache_dtype,
            kv_cache_memory_bytes,
            log_level,
            log_format,
            disable_log_requests,
            otlp_traces_endpoint,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn localhost_is_an_address() {
        let settings: Settings = toml::from_str("host = \"localhost\"").unwrap();
        assert_eq!(settings.host, Some(Ipv4Addr::LOCALHOST.into()));
        assert!(address("nowhere").is_err());
    }
}

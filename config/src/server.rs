//! What the settings mean.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use kernels::KvCacheDtype;

use crate::checks::{
    at_least_one, collector, connections, context, names, origins, refuse, seconds, share, speculative,
    threads, tls,
};
use crate::error::ConfigError;
use crate::settings::Settings;
use crate::values::{
    DeviceChoice, GenerationConfig, LogFormat, LogLevel, ReasoningParser, SchedulingPolicy,
    SpeculativeConfig, ToolCallParser,
};

/// The PEM files of HTTPS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate chain, the server's own certificate first.
    pub certificates: PathBuf,
    /// Its private key: PKCS#8, PKCS#1 or SEC1.
    pub key: PathBuf,
}

/// The server's configuration: checked once, then trusted.
#[derive(Clone, PartialEq)]
pub struct ServerConfig {
    /// Folder of the model; `None` where the command does not need one.
    pub model: Option<PathBuf>,
    /// Address to listen on.
    pub host: IpAddr,
    /// Port to listen on; 0 takes a free one.
    pub port: u16,
    /// Names that requests may use, the first one reported; empty: the folder's name and its path.
    pub served_model_name: Vec<String>,
    /// Bearer tokens, one of which every `/v1` request must carry; empty: open to all.
    pub api_key: Vec<String>,
    /// File with more of them, one per line.
    pub api_key_file: Option<PathBuf>,
    /// PEM files for HTTPS; `None`: HTTP.
    pub tls: Option<TlsFiles>,
    /// Origins that browsers may call from; empty: none but the server's own.
    pub allowed_origins: Vec<String>,
    /// Largest request body.
    pub max_body_bytes: usize,
    /// Connections at a time.
    pub max_connections: usize,
    /// How long a client may take to send a request's headers, then its body, and to take what it is sent.
    pub client_timeout: Duration,
    /// How long a request may take, from its headers to the end of its answer; `None`: no limit.
    pub request_timeout: Option<Duration>,
    /// How long running requests may take to finish after SIGTERM or SIGINT.
    pub shutdown_timeout: Duration,
    /// Whether there is a web page at `/`.
    pub web_page: bool,
    /// Longest sequence in tokens; `None`: the model's context.
    pub max_model_len: Option<usize>,
    /// File with a chat template, instead of the model's own.
    pub chat_template: Option<PathBuf>,
    /// Where the sampling parameters' defaults come from.
    pub generation_config: GenerationConfig,
    /// How the model writes calls of tools.
    pub tool_call_parser: ToolCallParser,
    /// How the model writes what it thinks before it answers.
    pub reasoning_parser: ReasoningParser,
    /// Device to run on.
    pub device: DeviceChoice,
    /// Threads of the CPU backend.
    pub threads: usize,
    /// Share of a GPU's memory to use; `None`: the device's default.
    pub gpu_memory_utilization: Option<f64>,
    /// Whether a GPU multiplies quantized activations in BF16 alone, which holds them exactly.
    pub strict: bool,
    /// Sequences that run at once; `None`: the device's default.
    pub max_num_seqs: Option<usize>,
    /// Tokens computed in one step; `None`: the device's default.
    pub max_num_batched_tokens: Option<usize>,
    /// Sequences that may wait.
    pub max_num_queued_reqs: usize,
    /// In which order requests are served.
    pub scheduling_policy: SchedulingPolicy,
    /// Whether the beginnings of prompts are looked for in the KV cache of earlier requests.
    pub enable_prefix_caching: bool,
    /// How tokens are drafted; `None`: one is computed at a time.
    pub speculative_config: Option<SpeculativeConfig>,
    /// Element type of the KV cache.
    pub kv_cache_dtype: KvCacheDtype,
    /// Size of the KV cache; `None`: the device's default.
    pub kv_cache_memory_bytes: Option<usize>,
    /// Least important log lines to write.
    pub log_level: LogLevel,
    /// How log lines are written.
    pub log_format: LogFormat,
    /// Whether each request gets a log line.
    pub log_requests: bool,
    /// OTLP collector that gets a trace of each request; `None`: nobody does.
    pub otlp_traces_endpoint: Option<String>,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            model: None,
            host: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            port: 8000,
            served_model_name: Vec::new(),
            api_key: Vec::new(),
            api_key_file: None,
            tls: None,
            allowed_origins: Vec::new(),
            max_body_bytes: 32 << 20,
            max_connections: 4096,
            client_timeout: Duration::from_secs(60),
            request_timeout: None,
            shutdown_timeout: Duration::from_secs(30),
            web_page: true,
            max_model_len: None,
            chat_template: None,
            generation_config: GenerationConfig::default(),
            tool_call_parser: ToolCallParser::default(),
            reasoning_parser: ReasoningParser::default(),
            device: DeviceChoice::default(),
            threads: std::thread::available_parallelism().map_or(1, NonZeroUsize::get),
            gpu_memory_utilization: None,
            strict: false,
            max_num_seqs: None,
            max_num_batched_tokens: None,
            max_num_queued_reqs: 1024,
            scheduling_policy: SchedulingPolicy::default(),
            enable_prefix_caching: true,
            speculative_config: None,
            kv_cache_dtype: KvCacheDtype::default(),
            kv_cache_memory_bytes: None,
            log_level: LogLevel::default(),
            log_format: LogFormat::default(),
            log_requests: true,
            otlp_traces_endpoint: None,
        }
    }
}

impl ServerConfig {
    /// Merges the two sources (the flags already hold the environment where no flag was given) over the defaults,
    /// and checks every value.
    ///
    /// # Errors
    /// A value outside its range, or a knob that this build could only ignore.
    pub fn resolve(file: Settings, flags: Settings) -> Result<Self, ConfigError> {
        let said = flags.or(file);
        refuse(&said)?;
        let d = Self::default();
        Ok(Self {
            model: said.model,
            host: said.host.unwrap_or(d.host),
            port: said.port.unwrap_or(d.port),
            served_model_name: names("served_model_name", said.served_model_name)?,
            api_key: names("api_key", said.api_key)?,
            api_key_file: said.api_key_file,
            tls: tls(said.ssl_certfile, said.ssl_keyfile)?,
            allowed_origins: origins(said.allowed_origins)?,
            max_body_bytes: at_least_one("max_body_bytes", said.max_body_bytes)?.unwrap_or(d.max_body_bytes),
            max_connections: connections(said.max_connections)?.unwrap_or(d.max_connections),
            client_timeout: seconds("client_timeout", said.client_timeout)?.unwrap_or(d.client_timeout),
            request_timeout: seconds("request_timeout", said.request_timeout)?,
            shutdown_timeout: said.shutdown_timeout.map_or(d.shutdown_timeout, Duration::from_secs),
            web_page: !said.disable_web_page.unwrap_or(!d.web_page),
            max_model_len: context(said.max_model_len)?,
            chat_template: said.chat_template,
            generation_config: said.generation_config.unwrap_or(d.generation_config),
            tool_call_parser: said.tool_call_parser.unwrap_or(d.tool_call_parser),
            reasoning_parser: said.reasoning_parser.unwrap_or(d.reasoning_parser),
            device: said.device.unwrap_or(d.device),
            threads: threads(said.threads)?.unwrap_or(d.threads),
            strict: said.strict.unwrap_or(d.strict),
            gpu_memory_utilization: share("gpu_memory_utilization", said.gpu_memory_utilization)?,
            max_num_seqs: at_least_one("max_num_seqs", said.max_num_seqs)?,
            max_num_batched_tokens: at_least_one("max_num_batched_tokens", said.max_num_batched_tokens)?,
            max_num_queued_reqs: at_least_one("max_num_queued_reqs", said.max_num_queued_reqs)?
                .unwrap_or(d.max_num_queued_reqs),
            scheduling_policy: said.scheduling_policy.unwrap_or(d.scheduling_policy),
            enable_prefix_caching: match said.no_enable_prefix_caching {
                Some(off) => !off,
                None => said.enable_prefix_caching.unwrap_or(d.enable_prefix_caching),
            },
            speculative_config: said.speculative_config.map(speculative).transpose()?,
            kv_cache_dtype: said.kv_cache_dtype.unwrap_or(d.kv_cache_dtype),
            kv_cache_memory_bytes: at_least_one("kv_cache_memory_bytes", said.kv_cache_memory_bytes)?,
            log_level: said.log_level.unwrap_or(d.log_level),
            log_format: said.log_format.unwrap_or(d.log_format),
            log_requests: !said.disable_log_requests.unwrap_or(!d.log_requests),
            otlp_traces_endpoint: collector(said.otlp_traces_endpoint)?,
        })
    }

    /// The settings that say the same, every knob that has a value set; API keys are left out when it is written.
    pub fn to_settings(&self) -> Settings {
        let listed = |names: &[String]| (!names.is_empty()).then(|| names.to_vec());
        Settings {
            model: self.model.clone(),
            host: Some(self.host),
            port: Some(self.port),
            served_model_name: listed(&self.served_model_name),
            api_key: listed(&self.api_key),
            api_key_file: self.api_key_file.clone(),
            ssl_certfile: self.tls.as_ref().map(|files| files.certificates.clone()),
            ssl_keyfile: self.tls.as_ref().map(|files| files.key.clone()),
            allowed_origins: listed(&self.allowed_origins),
            max_body_bytes: Some(self.max_body_bytes),
            max_connections: Some(self.max_connections),
            client_timeout: Some(self.client_timeout.as_secs()),
            request_timeout: self.request_timeout.map(|limit| limit.as_secs()),
            shutdown_timeout: Some(self.shutdown_timeout.as_secs()),
            disable_web_page: Some(!self.web_page),
            max_model_len: self.max_model_len,
            chat_template: self.chat_template.clone(),
            generation_config: Some(self.generation_config),
            tool_call_parser: Some(self.tool_call_parser),
            reasoning_parser: Some(self.reasoning_parser),
            device: Some(self.device),
            threads: Some(self.threads),
            gpu_memory_utilization: self.gpu_memory_utilization,
            strict: Some(self.strict),
            tensor_parallel_size: None,
            max_num_seqs: self.max_num_seqs,
            max_num_batched_tokens: self.max_num_batched_tokens,
            max_num_queued_reqs: Some(self.max_num_queued_reqs),
            scheduling_policy: Some(self.scheduling_policy),
            enable_prefix_caching: Some(self.enable_prefix_caching),
            no_enable_prefix_caching: None,
            speculative_config: self.speculative_config,
            kv_cache_dtype: Some(self.kv_cache_dtype),
            kv_cache_memory_bytes: self.kv_cache_memory_bytes,
            log_level: Some(self.log_level),
            log_format: Some(self.log_format),
            disable_log_requests: Some(!self.log_requests),
            otlp_traces_endpoint: self.otlp_traces_endpoint.clone(),
        }
    }
}

/// API keys are not shown.
impl fmt::Debug for ServerConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.to_settings(), f)
    }
}

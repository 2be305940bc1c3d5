//! Metrics under the names that dashboards, routers and autoscalers know: vLLM's, and ours for the memory footprint.

mod engine_metrics;
mod footprint;
mod maker;
mod process;
mod record;
mod traces;

use std::fmt;
use std::sync::{Mutex, PoisonError};

use prometheus::{
    Counter, Encoder, Gauge, GaugeVec, Histogram, IntCounter, IntCounterVec, Opts, Registry, TextEncoder,
};

use crate::engine::{EngineHandle, SubmitError};
pub use engine_metrics::EngineMetrics;
pub(crate) use footprint::Footprint;
use footprint::FootprintMetrics;
use maker::{FIRST_TOKEN_SECS, Maker, REQUEST_SECS, REQUEST_TOKENS, STEP_TOKENS, TOKEN_SECS};
pub(crate) use record::{Record, Recorder};
pub(crate) use traces::{RequestSpan, TraceParent, Traces};

/// Content type of [`Telemetry::render`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// How a sequence ended, for a client: `finished_reason`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// A stop string, a stop token, the end of the sequence.
    Stop,
    /// `max_tokens` or the context was reached.
    Length,
    /// The client went away.
    Abort,
    /// The server was stopped, or its engine died.
    Error,
}

impl Outcome {
    const ALL: [Self; 4] = [Self::Stop, Self::Length, Self::Abort, Self::Error];

    const fn label(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
            Self::Error => "error",
        }
    }
}

/// Why requests were turned away: `reason` of `vllm:admission_rejections_total`.
const REJECTIONS: [&str; 4] = ["queue_full", "too_long", "shutting_down", "invalid"];

/// Every metric of the server.
pub struct Telemetry {
    registry: Registry,
    /// Held while the values that the engine counts are copied, so that two scrapes do not add them twice.
    copying: Mutex<()>,

    num_requests_running: Gauge,
    num_requests_waiting: Gauge,
    kv_cache_usage_perc: Gauge,
    cache_config_info: GaugeVec,
    lora_requests_info: GaugeVec,
    prompt_tokens_total: IntCounter,
    generation_tokens_total: IntCounter,
    num_preemptions_total: IntCounter,
    prefix_cache_queries_total: IntCounter,
    prefix_cache_hits_total: IntCounter,
    spec_decode_num_drafts_total: IntCounter,
    spec_decode_num_draft_tokens_total: IntCounter,
    spec_decode_num_accepted_tokens_total: IntCounter,
    request_success_total: IntCounterVec,
    admission_rejections_total: IntCounterVec,
    process_cpu_seconds_total: Counter,
    process_resident_memory_bytes: Gauge,

    time_to_first_token_seconds: Histogram,
    inter_token_latency_seconds: Histogram,
    request_time_per_output_token_seconds: Histogram,
    e2e_request_latency_seconds: Histogram,
    request_queue_time_seconds: Histogram,
    request_prefill_time_seconds: Histogram,
    request_decode_time_seconds: Histogram,
    request_prompt_tokens: Histogram,
    request_generation_tokens: Histogram,
    iteration_tokens_total: Histogram,

    footprint: FootprintMetrics,
}

impl fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Telemetry").finish_non_exhaustive()
    }
}

impl Telemetry {
    /// Metrics with the label `model_name`.
    ///
    /// # Errors
    /// A name or label that Prometheus does not allow; none of ours is one.
    pub fn new(model_name: &str) -> prometheus::Result<Self> {
        let registry = Registry::new();
        let m = Maker { registry: &registry, model_name };
        Ok(Self {
            num_requests_running: m.gauge("vllm:num_requests_running", "Sequences in the running batch.")?,
            num_requests_waiting: m.gauge("vllm:num_requests_waiting", "Sequences that wait to run.")?,
            kv_cache_usage_perc: m
                .gauge("vllm:kv_cache_usage_perc", "Part of the KV cache in use, 0 to 1.")?,
            cache_config_info: m.gauges(
                "vllm:cache_config_info",
                "The KV cache: tokens per block, blocks, element type.",
                &["block_size", "num_gpu_blocks", "cache_dtype"],
            )?,
            lora_requests_info: m.gauges(
                "vllm:lora_requests_info",
                "LoRA adapters in use; this server has none.",
                &["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
            )?,
            prompt_tokens_total: m.counter(
                "vllm:prompt_tokens_total",
                "Tokens of prompts that are done, computed or found in the prefix cache.",
            )?,
            generation_tokens_total: m.counter("vllm:generation_tokens_total", "Tokens generated.")?,
            num_preemptions_total: m
                .counter("vllm:num_preemptions_total", "Times a sequence gave its KV blocks to another.")?,
            prefix_cache_queries_total: m.counter(
                "vllm:prefix_cache_queries_total",
                "Prompt tokens looked for in the prefix cache.",
            )?,
            prefix_cache_hits_total: m
                .counter("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache.")?,
            spec_decode_num_drafts_total: m
                .counter("vllm:spec_decode_num_drafts_total", "Drafts that were verified.")?,
            spec_decode_num_draft_tokens_total: m
                .counter("vllm:spec_decode_num_draft_tokens_total", "Drafted tokens.")?,
            spec_decode_num_accepted_tokens_total: m
                .counter("vllm:spec_decode_num_accepted_tokens_total", "Drafted tokens that were right.")?,
            request_success_total: m.counters(
                "vllm:request_success_total",
                "Sequences that ended, by reason.",
                "finished_reason",
                Outcome::ALL.map(Outcome::label),
            )?,
            admission_rejections_total: m.counters(
                "vllm:admission_rejections_total",
                "Requests that the engine did not take, by reason.",
                "reason",
                REJECTIONS,
            )?,
            process_cpu_seconds_total: m.register(Counter::with_opts(Opts::new(
                "process_cpu_seconds_total",
                "Processor time of this process, in seconds.",
            ))?)?,
            process_resident_memory_bytes: m.register(Gauge::with_opts(Opts::new(
                "process_resident_memory_bytes",
                "Resident memory of this process.",
            ))?)?,
            time_to_first_token_seconds: m.histogram(
                "vllm:time_to_first_token_seconds",
                "From submission to the first token.",
                FIRST_TOKEN_SECS,
            )?,
            inter_token_latency_seconds: m.histogram(
                "vllm:inter_token_latency_seconds",
                "From one token to the next.",
                TOKEN_SECS,
            )?,
            request_time_per_output_token_seconds: m.histogram(
                "vllm:request_time_per_output_token_seconds",
                "Mean time from one token of a sequence to the next.",
                TOKEN_SECS,
            )?,
            e2e_request_latency_seconds: m.histogram(
                "vllm:e2e_request_latency_seconds",
                "From submission to the end.",
                REQUEST_SECS,
            )?,
            request_queue_time_seconds: m.histogram(
                "vllm:request_queue_time_seconds",
                "From submission to the first step.",
                REQUEST_SECS,
            )?,
            request_prefill_time_seconds: m.histogram(
                "vllm:request_prefill_time_seconds",
                "From the first step to the first token.",
                REQUEST_SECS,
            )?,
            request_decode_time_seconds: m.histogram(
                "vllm:request_decode_time_seconds",
                "From the first token to the last.",
                REQUEST_SECS,
            )?,
            request_prompt_tokens: m.histogram(
                "vllm:request_prompt_tokens",
                "Prompt tokens of a sequence.",
                REQUEST_TOKENS,
            )?,
            request_generation_tokens: m.histogram(
                "vllm:request_generation_tokens",
                "Generated tokens of a sequence.",
                REQUEST_TOKENS,
            )?,
            iteration_tokens_total: m.histogram(
                "vllm:iteration_tokens_total",
                "Tokens computed in a step.",
                STEP_TOKENS,
            )?,
            footprint: FootprintMetrics::new(&m)?,
            copying: Mutex::new(()),
            registry,
        })
    }

    /// A sequence ended, as its client saw it.
    pub fn finished(&self, outcome: Outcome) {
        self.request_success_total.with_label_values(&[outcome.label()]).inc();
    }

    /// The engine did not take a request.
    pub fn rejected(&self, error: &SubmitError) {
        let reason = match error {
            SubmitError::Overloaded { .. } => REJECTIONS[0],
            SubmitError::TooLong { .. } => REJECTIONS[1],
            SubmitError::ShuttingDown => REJECTIONS[2],
            SubmitError::Invalid(_) => REJECTIONS[3],
        };
        self.admission_rejections_total.with_label_values(&[reason]).inc();
    }

    /// Prometheus' text format, with what the engine counts itself copied now.
    ///
    /// # Errors
    /// None that metrics of this struct have; Prometheus' encoder declares one.
    pub fn render(&self, engine: Option<&EngineHandle>) -> prometheus::Result<String> {
        let _copying = self.copying.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(engine) = engine {
            self.copy(engine);
        }
        let process = process::usage();
        self.process_cpu_seconds_total.reset();
        self.process_cpu_seconds_total.inc_by(process.cpu_secs);
        self.process_resident_memory_bytes.set(process.resident_bytes as f64);
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    fn copy(&self, engine: &EngineHandle) {
        let (stats, info) = (engine.stats(), engine.info());
        self.num_requests_running.set(stats.running as f64);
        self.num_requests_waiting.set(stats.waiting as f64);
        self.kv_cache_usage_perc.set(stats.kv_cache_usage());
        for (counter, total) in [
            (&self.prompt_tokens_total, stats.prompt_tokens),
            (&self.generation_tokens_total, stats.generation_tokens),
            (&self.num_preemptions_total, stats.preemptions),
            (&self.prefix_cache_queries_total, stats.prefix_cache_queries),
            (&self.prefix_cache_hits_total, stats.prefix_cache_hits),
            (&self.spec_decode_num_drafts_total, stats.spec_decode_drafts),
            (&self.spec_decode_num_draft_tokens_total, stats.spec_decode_draft_tokens),
            (&self.spec_decode_num_accepted_tokens_total, stats.spec_decode_accepted_tokens),
        ] {
            counter.inc_by(total.saturating_sub(counter.get()));
        }
        self.cache_config_info
            .with_label_values(&[
                kernels::KV_BLOCK_TOKENS.to_string().as_str(),
                info.kv_blocks.to_string().as_str(),
                info.kv_cache_dtype.name(),
            ])
            .set(1.0);
        self.lora_requests_info.with_label_values(&["0", "", ""]).set(0.0);
        self.footprint.set(info);
    }
}

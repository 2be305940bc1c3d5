//! Metrics under the names that dashboards, routers and autoscalers know: vLLM's, and ours for the memory footprint.

mod footprint;
mod process;

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus::{
    Counter, Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry,
    TextEncoder,
};

use crate::engine::{EngineHandle, EngineObserver, FinishReason, SequenceReport, SubmitError};
use footprint::FootprintMetrics;
pub(crate) use footprint::{Footprint, dtype_name};

/// Content type of [`Telemetry::render`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The `engine` label: this server has one.
const ENGINE: &str = "0";

const FIRST_TOKEN_SECS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
const TOKEN_SECS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const REQUEST_SECS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
const REQUEST_TOKENS: &[f64] =
    &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6];
const STEP_TOKENS: &[f64] =
    &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];

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
    request_success_total: IntCounterVec,
    admission_rejections_total: IntCounterVec,
    process_cpu_seconds_total: Counter,

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

/// Makes metrics of one model and registers them.
struct Maker<'a> {
    registry: &'a Registry,
    model_name: &'a str,
}

impl Maker<'_> {
    fn opts(&self, name: &str, help: &str) -> Opts {
        Opts::new(name, help).const_label("model_name", self.model_name).const_label("engine", ENGINE)
    }

    fn register<M: prometheus::core::Collector + Clone + 'static>(&self, metric: M) -> prometheus::Result<M> {
        self.registry.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    fn gauge(&self, name: &str, help: &str) -> prometheus::Result<Gauge> {
        self.register(Gauge::with_opts(self.opts(name, help))?)
    }

    /// Labels are added by the values: a gauge without values is not shown.
    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<GaugeVec> {
        self.register(GaugeVec::new(self.opts(name, help), labels)?)
    }

    fn counter(&self, name: &str, help: &str) -> prometheus::Result<IntCounter> {
        self.register(IntCounter::with_opts(self.opts(name, help))?)
    }

    /// With a 0 for every label, so that the first event is seen as an increase.
    fn counters<'v>(
        &self,
        name: &str,
        help: &str,
        label: &str,
        values: impl IntoIterator<Item = &'v str>,
    ) -> prometheus::Result<IntCounterVec> {
        let counters = self.register(IntCounterVec::new(self.opts(name, help), &[label])?)?;
        for value in values {
            counters.with_label_values(&[value]).inc_by(0);
        }
        Ok(counters)
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> prometheus::Result<Histogram> {
        let opts = HistogramOpts::from(self.opts(name, help)).buckets(buckets.to_vec());
        self.register(Histogram::with_opts(opts)?)
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
            prompt_tokens_total: m.counter("vllm:prompt_tokens_total", "Prompt tokens computed.")?,
            generation_tokens_total: m.counter("vllm:generation_tokens_total", "Tokens generated.")?,
            num_preemptions_total: m
                .counter("vllm:num_preemptions_total", "Times a sequence gave its KV blocks to another.")?,
            prefix_cache_queries_total: m.counter(
                "vllm:prefix_cache_queries_total",
                "Prompt tokens looked for in the prefix cache.",
            )?,
            prefix_cache_hits_total: m
                .counter("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache.")?,
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
        ] {
            counter.inc_by(total.saturating_sub(counter.get()));
        }
        self.cache_config_info
            .with_label_values(&[
                kernels::KV_BLOCK_TOKENS.to_string().as_str(),
                info.kv_blocks.to_string().as_str(),
                dtype_name(info.kv_cache_dtype),
            ])
            .set(1.0);
        self.lora_requests_info.with_label_values(&["0", "", ""]).set(0.0);
        self.footprint.set(info);
    }
}

/// Fills the histograms, on the engine's thread.
#[derive(Debug)]
pub struct EngineMetrics(Arc<Telemetry>);

impl EngineMetrics {
    /// An observer for the engine.
    pub fn new(telemetry: &Arc<Telemetry>) -> Self {
        Self(Arc::clone(telemetry))
    }
}

impl EngineObserver for EngineMetrics {
    fn step(&mut self, tokens: usize) {
        self.0.iteration_tokens_total.observe(tokens as f64);
    }

    fn first_token(&mut self, since_submission: Duration) {
        self.0.time_to_first_token_seconds.observe(since_submission.as_secs_f64());
    }

    fn next_token(&mut self, since_previous: Duration) {
        self.0.inter_token_latency_seconds.observe(since_previous.as_secs_f64());
    }

    fn ended(&mut self, report: &SequenceReport) {
        let SequenceReport { reason, usage, timing } = report;
        // Without a reason, the client went away or a stop string was found; before the first token it was the former.
        let cut_short = reason.is_none() && usage.completion_tokens == 0;
        if cut_short || *reason == Some(FinishReason::Aborted) {
            return;
        }
        let metrics = &self.0;
        // Every prompt token is one that a prefix cache could have had; as long as there is none, none is found.
        metrics.prefix_cache_queries_total.inc_by(usage.prompt_tokens as u64);
        metrics.prefix_cache_hits_total.inc_by(usage.cached_tokens as u64);
        metrics.e2e_request_latency_seconds.observe(timing.total.as_secs_f64());
        metrics.request_queue_time_seconds.observe(timing.queue.as_secs_f64());
        metrics.request_prefill_time_seconds.observe(timing.prefill.as_secs_f64());
        metrics.request_decode_time_seconds.observe(timing.decode.as_secs_f64());
        metrics.request_prompt_tokens.observe(usage.prompt_tokens as f64);
        metrics.request_generation_tokens.observe(usage.completion_tokens as f64);
        if usage.completion_tokens > 1 {
            let intervals = (usage.completion_tokens - 1) as f64;
            metrics.request_time_per_output_token_seconds.observe(timing.decode.as_secs_f64() / intervals);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Timing, Usage};

    fn line<'a>(text: &'a str, start: &str) -> Option<&'a str> {
        text.lines().find(|line| line.starts_with(start)).and_then(|line| line.rsplit(' ').next())
    }

    #[test]
    fn sequences_are_counted() {
        let telemetry = Arc::new(Telemetry::new("m").unwrap());
        let mut observer = EngineMetrics::new(&telemetry);
        let report = |reason, completion_tokens| SequenceReport {
            reason,
            usage: Usage { prompt_tokens: 7, cached_tokens: 0, completion_tokens },
            timing: Timing {
                decode: Duration::from_secs(4),
                total: Duration::from_secs(5),
                ..Timing::default()
            },
        };
        observer.ended(&report(Some(FinishReason::Length), 5));
        observer.ended(&report(None, 0));
        observer.ended(&report(Some(FinishReason::Aborted), 3));
        telemetry.finished(Outcome::Length);
        telemetry.rejected(&SubmitError::Overloaded { queued: 1 });
        let text = telemetry.render(None).unwrap();
        let labels = r#"{engine="0",model_name="m"}"#;
        assert_eq!(line(&text, &format!("vllm:e2e_request_latency_seconds_count{labels}")), Some("1"));
        assert_eq!(
            line(&text, &format!("vllm:request_time_per_output_token_seconds_sum{labels}")),
            Some("1")
        );
        assert_eq!(line(&text, &format!("vllm:request_prompt_tokens_sum{labels}")), Some("7"));
        let success =
            |reason: &str| format!("vllm:request_success_total{{engine=\"0\",finished_reason=\"{reason}\"");
        assert_eq!(line(&text, &success("length")), Some("1"));
        assert_eq!(line(&text, &success("stop")), Some("0"));
        let rejections =
            "vllm:admission_rejections_total{engine=\"0\",model_name=\"m\",reason=\"queue_full\"}";
        assert_eq!(line(&text, rejections), Some("1"));
    }
}

//! The engine's reports, as histograms.

use std::sync::Arc;
use std::time::Duration;

use super::Telemetry;
use crate::engine::{EngineObserver, FinishReason, SequenceReport};

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
    use crate::engine::{SubmitError, Timing, Usage};
    use crate::telemetry::Outcome;

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

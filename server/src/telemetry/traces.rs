//! Traces over OTLP: a span per request of the API, with the GenAI attributes of OpenTelemetry's semantic conventions.
//!
//! A span is made when its request has ended, from what was noted meanwhile: nothing of this is on the way of a token.
//! Spans are sent in batches by a thread of their own.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{Event, Span, SpanKind, Status, Tracer, TracerProvider};
use opentelemetry::{Array, Context, KeyValue, StringValue, Value};
use opentelemetry_otlp::{ExporterBuildError, Protocol, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};

use super::Record;

/// How long a collector may take for a batch.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the last batch may take at the end.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(3);

/// Where spans go.
pub(crate) struct Traces {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

impl fmt::Debug for Traces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Traces").finish_non_exhaustive()
    }
}

/// Whose span a request's is a child of: a client's or a router's, as W3C's header `traceparent` names it.
#[derive(Debug, Default)]
pub(crate) struct TraceParent(Context);

impl TraceParent {
    /// Of the header's value; one that is malformed names nobody.
    pub(crate) fn parse(header: &str) -> Self {
        let headers = HashMap::from([("traceparent".to_owned(), header.to_owned())]);
        Self(TraceContextPropagator::new().extract_with_context(&Context::new(), &headers))
    }
}

/// A request that is over.
pub(crate) struct RequestSpan<'a> {
    /// The span around it.
    pub(crate) parent: &'a TraceParent,
    /// HTTP method.
    pub(crate) method: &'a str,
    /// Path, without a query.
    pub(crate) path: &'a str,
    /// `x-request-id`.
    pub(crate) request_id: String,
    /// HTTP status; `None` if the client left before there was one.
    pub(crate) status: Option<u16>,
    /// Whether the answer came to its end.
    pub(crate) complete: bool,
    /// What was noted.
    pub(crate) record: &'a Record,
}

impl Traces {
    /// Sends to a collector: `endpoint` is its URL, to which `/v1/traces` is added where it has no path. Nothing is
    /// sent yet, so a collector that is down is no error.
    ///
    /// # Errors
    /// The endpoint is no URL.
    pub(crate) fn start(endpoint: &str) -> Result<Self, ExporterBuildError> {
        let exporter = SpanExporter::builder()
            .with_http()
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(with_path(endpoint))
            .with_timeout(EXPORT_TIMEOUT)
            .build()?;
        let resource = Resource::builder()
            .with_service_name("mxserve")
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .build();
        let provider =
            SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
        let tracer = provider.tracer("mxserve");
        Ok(Self { provider, tracer })
    }

    /// Makes the span of a request.
    pub(crate) fn request(&self, request: RequestSpan<'_>) {
        let record = request.record;
        let operation = operation(request.path);
        let mut attributes = vec![
            KeyValue::new("http.request.method", request.method.to_owned()),
            KeyValue::new("url.path", request.path.to_owned()),
            KeyValue::new("gen_ai.request.id", request.request_id),
            KeyValue::new("gen_ai.server.request.duration", record.started().elapsed().as_secs_f64()),
        ];
        attributes.extend(request.status.map(|s| KeyValue::new("http.response.status_code", i64::from(s))));
        attributes.extend(operation.map(|name| KeyValue::new("gen_ai.operation.name", name)));
        let mut name =
            operation.map_or_else(|| format!("{} {}", request.method, request.path), str::to_owned);
        let mut events = Vec::new();
        if let Some(generated) = record.generated() {
            name = format!("{name} {}", generated.model);
            let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
            let reasons = generated.finish_reasons.iter().map(|&reason| StringValue::from(reason)).collect();
            attributes.extend([
                KeyValue::new("gen_ai.request.model", generated.model.clone()),
                KeyValue::new("gen_ai.response.model", generated.model.clone()),
                KeyValue::new("gen_ai.request.choice.count", count(generated.sequences)),
                KeyValue::new("gen_ai.request.max_tokens", count(generated.max_tokens)),
                KeyValue::new("gen_ai.request.temperature", f64::from(generated.temperature)),
                KeyValue::new("gen_ai.request.top_p", f64::from(generated.top_p)),
                KeyValue::new("gen_ai.response.finish_reasons", Value::Array(Array::String(reasons))),
                KeyValue::new("gen_ai.usage.input_tokens", count(generated.prompt_tokens)),
                KeyValue::new("gen_ai.usage.cache_read.input_tokens", count(generated.cached_tokens)),
                KeyValue::new("gen_ai.usage.output_tokens", count(generated.completion_tokens)),
            ]);
            if let Some(first) = generated.first_token {
                attributes.push(KeyValue::new("gen_ai.server.time_to_first_token", first.as_secs_f64()));
                events.push(Event::new("first token", record.started_at() + first, Vec::new(), 0));
            }
            if let Some(time) = generated.time_per_output_token() {
                attributes.push(KeyValue::new("gen_ai.server.time_per_output_token", time.as_secs_f64()));
            }
        }
        let error = match request.status {
            Some(status) if status >= 500 => Some(status.to_string()),
            _ if !request.complete => Some("client_left".to_owned()),
            _ => None,
        };
        attributes.extend(error.clone().map(|error| KeyValue::new("error.type", error)));
        let mut span = self
            .tracer
            .span_builder(name)
            .with_kind(SpanKind::Server)
            .with_start_time(record.started_at())
            .with_attributes(attributes)
            .with_events(events)
            .start_with_context(&self.tracer, &request.parent.0);
        if let Some(error) = error {
            span.set_status(Status::error(error));
        }
        // By the same clock as the durations, so that a clock that was set meanwhile does no harm.
        span.end_with_timestamp(record.started_at() + record.started().elapsed());
    }

    /// Sends what is left. Blocks for as long as that takes, at most a few seconds.
    pub(crate) fn shutdown(&self) {
        if let Err(error) = self.provider.shutdown_with_timeout(FLUSH_TIMEOUT) {
            tracing::warn!("the last traces were not sent: {error}");
        }
    }
}

/// The conventions' name for what an endpoint does.
fn operation(path: &str) -> Option<&'static str> {
    match path {
        "/v1/chat/completions" | "/v1/responses" => Some("chat"),
        "/v1/completions" => Some("text_completion"),
        "/v1/embeddings" => Some("embeddings"),
        _ => None,
    }
}

/// As OTLP's own variable `OTEL_EXPORTER_OTLP_ENDPOINT` is read: the signal's path is added to a bare host.
fn with_path(endpoint: &str) -> String {
    let has_path = endpoint
        .split_once("://")
        .and_then(|(_, rest)| rest.split_once('/'))
        .is_some_and(|(_, path)| !path.is_empty());
    if has_path { endpoint.to_owned() } else { format!("{}/v1/traces", endpoint.trim_end_matches('/')) }
}

#[cfg(test)]
mod tests {
    use opentelemetry::trace::TraceContextExt;

    use super::*;

    #[test]
    fn a_bare_host_gets_the_path_of_traces() {
        for (endpoint, expected) in [
            ("http://a:4318", "http://a:4318/v1/traces"),
            ("http://a:4318/", "http://a:4318/v1/traces"),
            ("http://a:4318/v1/traces", "http://a:4318/v1/traces"),
            ("http://a/other", "http://a/other"),
        ] {
            assert_eq!(with_path(endpoint), expected);
        }
        assert!(Traces::start("no url").is_err());
    }

    #[test]
    fn parents_are_read_and_nonsense_is_none() {
        let of = |header: &str| TraceParent::parse(header).0.span().span_context().clone();
        let parent = of("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
        assert!(parent.is_valid() && parent.is_remote() && parent.is_sampled());
        assert_eq!(parent.trace_id().to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        for nonsense in ["", "00-xyz", "00-00000000000000000000000000000000-0000000000000000-01"] {
            assert!(!of(nonsense).is_valid(), "{nonsense}");
        }
    }
}

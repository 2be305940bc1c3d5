//! Traces, received by a collector that keeps them.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::routing::post;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use serde_json::json;

use crate::support::TestServer;

const COMPLETIONS: &str = "/v1/completions";

#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<ExportTraceServiceRequest>>>);

impl Collector {
    /// Listens; returns the endpoint.
    async fn start(&self) -> String {
        let take = async |State(collector): State<Self>, headers: HeaderMap, body: Bytes| {
            assert_eq!(headers["content-type"], "application/x-protobuf");
            collector.0.lock().unwrap().push(ExportTraceServiceRequest::decode(body).unwrap());
        };
        let routes = Router::new().route("/v1/traces", post(take)).with_state(self.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, routes).await });
        format!("http://{address}")
    }

    /// Spans of the path, in the order of their ends.
    fn spans(&self, path: &str) -> Vec<Span> {
        let requests = self.0.lock().unwrap();
        let resources = requests.iter().flat_map(|request| &request.resource_spans);
        let spans = resources.flat_map(|resource| &resource.scope_spans).flat_map(|scope| &scope.spans);
        spans.filter(|span| text(span, "url.path") == Some(path)).cloned().collect()
    }
}

fn attribute<'a>(span: &'a Span, key: &str) -> Option<&'a Value> {
    let attribute = span.attributes.iter().find(|attribute| attribute.key == key)?;
    attribute.value.as_ref()?.value.as_ref()
}

fn text<'a>(span: &'a Span, key: &str) -> Option<&'a str> {
    match attribute(span, key)? {
        Value::StringValue(text) => Some(text),
        _ => None,
    }
}

fn integer(span: &Span, key: &str) -> Option<i64> {
    match attribute(span, key)? {
        Value::IntValue(number) => Some(*number),
        _ => None,
    }
}

fn seconds(span: &Span, key: &str) -> f64 {
    match attribute(span, key) {
        Some(Value::DoubleValue(number)) => *number,
        other => panic!("{key}: {other:?}"),
    }
}

#[tokio::test]
async fn a_request_leaves_a_span_with_the_genai_attributes() {
    let collector = Collector::default();
    let endpoint = collector.start().await;
    let mut server =
        TestServer::with(|settings, _| settings.otlp_traces_endpoint = Some(endpoint.clone())).await;
    let parent = ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
    let body = json!({"prompt": [5, 6, 7], "max_tokens": 8, "ignore_eos": true, "temperature": 0.5, "request_id": "r-1"});
    server.send_with(COMPLETIONS, &body, parent).await.text().await.unwrap();
    let mut streamed = body.clone();
    streamed["n"] = json!(2);
    server.stream(COMPLETIONS, streamed).await;
    server.post(COMPLETIONS, &json!({"prompt": "a", "n": 0})).await;
    server.get("/health").await;
    drop(server.endless().await);
    server.until("vllm:num_requests_running", &[], 0.0).await;
    // The last spans are sent before the server ends.
    server.stop();
    server.ended().await;

    let spans = collector.spans(COMPLETIONS);
    let [whole, streamed, refused, left] = &spans[..] else { panic!("{} spans", spans.len()) };
    assert_eq!(whole.name, "text_completion rustdoc-6m");
    assert_eq!(whole.trace_id, 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736_u128.to_be_bytes());
    assert_eq!(whole.parent_span_id, 0x00f0_67aa_0ba9_02b7_u64.to_be_bytes());
    assert_ne!(streamed.trace_id, whole.trace_id);
    for (key, value) in [
        ("gen_ai.operation.name", "text_completion"),
        ("gen_ai.request.model", "rustdoc-6m"),
        ("gen_ai.request.id", "r-1"),
        ("http.request.method", "POST"),
    ] {
        assert_eq!(text(whole, key), Some(value), "{key}");
    }
    for (span, sequences) in [(whole, 1), (streamed, 2)] {
        assert_eq!(integer(span, "gen_ai.usage.input_tokens"), Some(3));
        assert_eq!(integer(span, "gen_ai.usage.output_tokens"), Some(8 * sequences));
        assert_eq!(integer(span, "gen_ai.request.choice.count"), Some(sequences));
        assert_eq!(integer(span, "gen_ai.request.max_tokens"), Some(8));
        assert_eq!(seconds(span, "gen_ai.request.temperature"), 0.5);
        assert_eq!(integer(span, "http.response.status_code"), Some(200));
        let duration = seconds(span, "gen_ai.server.request.duration");
        let first = seconds(span, "gen_ai.server.time_to_first_token");
        let per_token = seconds(span, "gen_ai.server.time_per_output_token");
        assert!(first > 0.0 && per_token > 0.0, "{first} {per_token}");
        assert!(first + 7.0 * per_token <= duration * 1.001, "{first} + 7 * {per_token} > {duration}");
        let nanos = span.end_time_unix_nano - span.start_time_unix_nano;
        assert!((Duration::from_nanos(nanos).as_secs_f64() - duration).abs() < 0.01);
        assert!(attribute(span, "error.type").is_none());
    }
    assert_eq!(integer(refused, "http.response.status_code"), Some(400));
    assert!(attribute(refused, "gen_ai.usage.input_tokens").is_none());
    assert_eq!(text(left, "error.type"), Some("client_left"));
    assert!(collector.spans("/health").is_empty());
}

#[tokio::test]
async fn a_collector_that_is_not_there_disturbs_nobody() {
    let mut server = TestServer::with(|settings, _| {
        settings.otlp_traces_endpoint = Some("http://127.0.0.1:9".into());
    })
    .await;
    server.complete(json!({"prompt": "a", "max_tokens": 2})).await;
    server.stop();
    server.ended().await;
}

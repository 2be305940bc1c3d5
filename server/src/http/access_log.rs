//! A line in the log, and a trace, for each request: written when its answer has ended, streams included.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, BodyDataStream, Bytes};
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use futures::stream::{Stream, StreamExt};

use super::App;
use super::request_id::RequestId;
use super::sse;
use crate::telemetry::{RequestSpan, TraceParent, Traces};

/// Notes a request, and tells of it when it is over.
pub(super) async fn tell(
    State(app): State<Arc<App>>,
    request_id: RequestId,
    request: Request,
    next: Next,
) -> Response {
    let (logs, traces) = (app.config().log_requests, app.traces().cloned());
    if !logs && traces.is_none() {
        return next.run(request).await;
    }
    let header = request.headers().get("traceparent").and_then(|value| value.to_str().ok());
    let mut telling = Telling {
        method: request.method().clone(),
        path: request.uri().path().to_owned(),
        request_id,
        logs,
        parent: traces.as_ref().and(header).map(TraceParent::parse).unwrap_or_default(),
        traces,
        status: None,
        complete: false,
    };
    let response = next.run(request).await;
    telling.status = Some(response.status());
    if sse::is_event_stream(&response) {
        return response.map(|body| Body::from_stream(Observed { events: body.into_data_stream(), telling }));
    }
    telling.complete = true;
    response
}

/// Tells of the request when it is dropped, also when that is because its client has left.
struct Telling {
    method: Method,
    path: String,
    request_id: RequestId,
    logs: bool,
    traces: Option<Arc<Traces>>,
    parent: TraceParent,
    /// `None`: there was no answer yet.
    status: Option<StatusCode>,
    /// Whether the answer came to its end.
    complete: bool,
}

impl Telling {
    fn log(&self) {
        let record = self.request_id.record();
        let ms = millis(record.started().elapsed());
        let (method, path, request_id) = (&self.method, self.path.as_str(), &self.request_id);
        let status = self.status.map(|status| status.as_u16());
        let client_left = (!self.complete).then_some(true);
        let Some(generated) = record.generated() else {
            // Probes and scrapes come every few seconds.
            if path.starts_with("/v1/") {
                tracing::info!(%method, path, status, client_left, ms, %request_id, "request");
            } else {
                tracing::debug!(%method, path, status, client_left, ms, %request_id, "request");
            }
            return;
        };
        tracing::info!(
            %method,
            path,
            status,
            client_left,
            ms,
            first_token_ms = generated.first_token.map(millis),
            prompt_tokens = generated.prompt_tokens,
            cached_tokens = generated.cached_tokens,
            completion_tokens = generated.completion_tokens,
            finish_reasons = generated.finish_reasons.join(","),
            %request_id,
            "request"
        );
    }
}

/// As JSON's numbers go, which have no 128 bits.
fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl Drop for Telling {
    fn drop(&mut self) {
        if self.logs {
            self.log();
        }
        // Probes and scrapes are no requests of anybody.
        if let Some(traces) = self.traces.as_ref().filter(|_| self.path.starts_with("/v1/")) {
            traces.request(RequestSpan {
                parent: &self.parent,
                method: self.method.as_str(),
                path: &self.path,
                request_id: self.request_id.to_string(),
                status: self.status.map(|status| status.as_u16()),
                complete: self.complete,
                record: self.request_id.record(),
            });
        }
    }
}

/// The events of an answer; the order of the fields makes the generation end before it is told of.
struct Observed {
    events: BodyDataStream,
    telling: Telling,
}

impl Stream for Observed {
    type Item = Result<Bytes, axum::Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let event = ready!(self.events.poll_next_unpin(context));
        self.telling.complete |= event.is_none();
        Poll::Ready(event)
    }
}

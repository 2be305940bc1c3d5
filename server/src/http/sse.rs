//! Answers as server-sent events.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::Bytes;
use axum::http::header;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, Stream, StreamExt};
use serde::Serialize;
use utoipa::ToSchema;

use super::error::ApiError;

/// Proxies close connections that are silent for long; a comment is ignored by clients and keeps them open.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// An event of a stream.
#[derive(ToSchema)]
#[schema(as = StreamEvent)]
#[expect(dead_code, reason = "events are written by axum; this is for the document")]
pub(super) struct EventSchema {
    /// JSON: a part of the answer, or an error. The last event of completions and chats has `[DONE]`.
    data: String,
    /// The event's type, in `/v1/responses`.
    event: Option<String>,
}

/// Streams `chunks`, an event each, and `[DONE]`. An error ends the stream with its body as an event.
pub(super) fn respond<T, S>(chunks: S) -> Response
where
    T: Serialize,
    S: Stream<Item = Result<T, ApiError>> + Send + 'static,
{
    let events = chunks.map(|chunk| match chunk {
        Ok(chunk) => event(&chunk),
        Err(error) => event(&error.body()),
    });
    let done = stream::once(async { Event::default().data("[DONE]") });
    let events = events.chain(done).map(Ok::<_, Infallible>);
    Sse::new(events).keep_alive(keep_alive()).into_response()
}

/// Comments in silence.
pub(super) fn keep_alive() -> KeepAlive {
    KeepAlive::new().interval(KEEP_ALIVE).text("keep-alive")
}

/// Whether this is an answer of [`respond`].
pub(super) fn is_event_stream(response: &Response) -> bool {
    response.headers().get(header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes() == b"text/event-stream")
}

/// The end of a stream that is broken off.
pub(super) fn last_words(error: &ApiError) -> Bytes {
    let body = serde_json::to_string(&error.body()).unwrap_or_default();
    Bytes::from(format!("data: {body}\n\ndata: [DONE]\n\n"))
}

fn event(chunk: &impl Serialize) -> Event {
    // Only a map with keys that are no strings cannot be written, and the wire has none.
    Event::default().data(serde_json::to_string(chunk).unwrap_or_else(|e| {
        tracing::error!("a chunk cannot be written as JSON: {e}");
        "{}".to_owned()
    }))
}

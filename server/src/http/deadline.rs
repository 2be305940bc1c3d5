//! `request_timeout`: how long a request may take, from its headers to the end of its answer.

use std::sync::Arc;
use std::time::Duration;

use axum::BoxError;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures::stream::{self, Stream, StreamExt};
use tokio::time::Instant;

use super::App;
use super::error::ApiError;
use super::sse;

/// Ends what takes too long: an answer that has not begun becomes an error, a stream ends with one. Dropping either
/// cancels its sequences.
pub(super) async fn limit(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let Some(limit) = app.config().request_timeout else { return next.run(request).await };
    let deadline = Instant::now() + limit;
    match tokio::time::timeout_at(deadline, next.run(request)).await {
        Ok(response) if sse::is_event_stream(&response) => {
            response.map(|body| Body::from_stream(until(deadline, limit, body.into_data_stream())))
        }
        Ok(response) => response,
        Err(_) => too_late(limit).into_response(),
    }
}

fn too_late(limit: Duration) -> ApiError {
    ApiError::Timeout { limit_secs: limit.as_secs() }
}

/// `events` until the deadline, then an error and the end.
fn until<S, E>(
    deadline: Instant,
    limit: Duration,
    events: S,
) -> impl Stream<Item = Result<Bytes, BoxError>> + Send + 'static
where
    S: Stream<Item = Result<Bytes, E>> + Send + Unpin + 'static,
    E: Into<BoxError>,
{
    stream::unfold(Some(events), move |events| async move {
        let mut events = events?;
        match tokio::time::timeout_at(deadline, events.next()).await {
            Ok(Some(event)) => Some((event.map_err(Into::into), Some(events))),
            Ok(None) => None,
            Err(_) => Some((Ok(sse::last_words(&too_late(limit))), None)),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stream_ends_with_an_error_at_its_deadline() {
        let limit = Duration::from_millis(20);
        let event = |text: &'static str| Ok::<_, BoxError>(Bytes::from_static(text.as_bytes()));
        let endless = stream::iter([event("data: 1\n\n")]).chain(stream::pending());
        let got: Vec<_> = until(Instant::now() + limit, limit, endless).map(Result::unwrap).collect().await;
        let text = String::from_utf8(got.concat()).unwrap();
        assert!(
            text.starts_with("data: 1\n\ndata: {\"error\":") && text.ends_with("}\n\ndata: [DONE]\n\n"),
            "{text}"
        );
        // One that ends in time is left alone.
        let short = stream::iter([event("data: 1\n\n")]);
        let got: Vec<_> = until(Instant::now() + limit, limit, short).map(Result::unwrap).collect().await;
        assert_eq!(got.concat(), b"data: 1\n\n");
    }
}

//! `x-request-id`: taken from the client or made up, in the log, in the answer's id and header.

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use axum::extract::{FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;

use super::App;

const HEADER: HeaderName = HeaderName::from_static("x-request-id");

/// Longest id that is taken from a client.
const MAX_LEN: usize = 128;

/// The id of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RequestId {
    id: String,
    /// Whether the client chose it.
    given: bool,
}

impl RequestId {
    /// The client's, if it can be shown as it is; else a random one.
    fn of(headers: &HeaderMap) -> Self {
        let given = headers.get(HEADER).and_then(|value| value.to_str().ok()).filter(|id| is_showable(id));
        match given {
            Some(id) => Self { id: id.to_owned(), given: true },
            None => Self { id: format!("{:032x}", fastrand::u128(..)), given: false },
        }
    }

    /// This id, unless only the body (`request_id`) has one from the client.
    pub(super) fn or(self, body: Option<String>) -> Self {
        match body.filter(|id| is_showable(id)) {
            Some(id) if !self.given => Self { id, given: true },
            _ => self,
        }
    }
}

fn is_showable(id: &str) -> bool {
    (1..=MAX_LEN).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic())
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id)
    }
}

impl<S: Sync> FromRequestParts<S> for RequestId {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(parts.extensions.get::<Self>().cloned().unwrap_or_else(|| Self::of(&parts.headers)))
    }
}

/// Gives the request its id, the response the header, and the log a line.
pub(super) async fn identify(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = RequestId::of(request.headers());
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    request.extensions_mut().insert(id.clone());
    let mut response = next.run(request).await;
    if let Ok(value) = HeaderValue::from_str(&id.id) {
        response.headers_mut().insert(HEADER, value);
    }
    if app.config().log_requests {
        let (status, ms) = (response.status().as_u16(), started.elapsed().as_millis());
        // Probes and scrapes come every few seconds.
        if path.starts_with("/v1/") {
            tracing::info!(%method, path, status, ms, request_id = %id, "request");
        } else {
            tracing::debug!(%method, path, status, ms, request_id = %id, "request");
        }
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clients_id_is_kept_when_it_can_be_shown() {
        let mut headers = HeaderMap::new();
        headers.insert(HEADER, HeaderValue::from_static("abc-1"));
        assert_eq!(RequestId::of(&headers).or(Some("body".into())).to_string(), "abc-1");
        for bad in ["", "two words", "é"] {
            headers.insert(HEADER, HeaderValue::from_bytes(bad.as_bytes()).unwrap());
            let id = RequestId::of(&headers);
            assert!(!id.given && id.to_string().len() == 32, "{bad}");
        }
        assert_eq!(RequestId::of(&HeaderMap::new()).or(Some("body".into())).to_string(), "body");
        assert_ne!(RequestId::of(&HeaderMap::new()), RequestId::of(&HeaderMap::new()));
    }
}

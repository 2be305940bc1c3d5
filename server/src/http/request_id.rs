//! `x-request-id`: taken from the client or made up, in the log, in the answer's id and header. It carries what is noted
//! about the request while it is answered.

use std::convert::Infallible;
use std::fmt;
use std::sync::{Arc, OnceLock};

use axum::extract::{FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;

use crate::telemetry::Record;

/// The header, of requests and of answers.
pub(super) const HEADER: HeaderName = HeaderName::from_static("x-request-id");

/// Longest id that is taken from a client.
const MAX_LEN: usize = 128;

/// The id of a request. Clones are the same id, also after [`adopt`](RequestId::adopt).
#[derive(Debug, Clone)]
pub(super) struct RequestId {
    /// The header's, or a random one.
    id: String,
    /// Whether the client chose it.
    given: bool,
    /// The body's, once that was read.
    body: Arc<OnceLock<String>>,
    record: Arc<Record>,
}

impl RequestId {
    /// The client's, if it can be shown as it is; else a random one.
    fn of(headers: &HeaderMap) -> Self {
        let given = headers.get(HEADER).and_then(|value| value.to_str().ok()).filter(|id| is_showable(id));
        let (id, given) = match given {
            Some(id) => (id.to_owned(), true),
            None => (format!("{:032x}", fastrand::u128(..)), false),
        };
        Self { id, given, body: Arc::default(), record: Arc::new(Record::new()) }
    }

    /// Takes the body's `request_id`, unless the header has one: header, log and answer show the same.
    pub(super) fn adopt(&self, body: Option<&str>) {
        if let Some(id) = body.filter(|id| !self.given && is_showable(id)) {
            // A body is read once.
            let _ = self.body.set(id.to_owned());
        }
    }

    /// What is noted about the request.
    pub(super) fn record(&self) -> &Arc<Record> {
        &self.record
    }

    fn as_str(&self) -> &str {
        self.body.get().unwrap_or(&self.id)
    }
}

fn is_showable(id: &str) -> bool {
    (1..=MAX_LEN).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic())
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl<S: Sync> FromRequestParts<S> for RequestId {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(parts.extensions.get::<Self>().cloned().unwrap_or_else(|| Self::of(&parts.headers)))
    }
}

/// Gives the request its id, and the response the header.
pub(super) async fn identify(mut request: Request, next: Next) -> Response {
    let id = RequestId::of(request.headers());
    request.extensions_mut().insert(id.clone());
    let mut response = next.run(request).await;
    if let Ok(value) = HeaderValue::from_str(id.as_str()) {
        response.headers_mut().insert(HEADER, value);
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
        let adopted = |headers: &HeaderMap| {
            let id = RequestId::of(headers);
            id.clone().adopt(Some("body"));
            id.to_string()
        };
        assert_eq!(adopted(&headers), "abc-1");
        for bad in ["", "two words", "é"] {
            headers.insert(HEADER, HeaderValue::from_bytes(bad.as_bytes()).unwrap());
            let id = RequestId::of(&headers);
            assert!(!id.given && id.to_string().len() == 32, "{bad}");
        }
        assert_eq!(adopted(&HeaderMap::new()), "body");
        let made = || RequestId::of(&HeaderMap::new()).to_string();
        assert_ne!(made(), made());
    }
}

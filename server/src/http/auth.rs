//! API keys, checked on `/v1` alone: probes and scrapers have none.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::Response;

use super::App;
use super::error::ApiError;

/// Lets a request pass if it needs no key or has one.
pub(super) async fn authorize(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let keys = &app.config().api_key;
    let guarded = request.uri().path() == "/v1" || request.uri().path().starts_with("/v1/");
    if guarded && !keys.is_empty() && !has_key(request.headers(), keys) {
        return Err(ApiError::Unauthorized);
    }
    Ok(next.run(request).await)
}

fn has_key(headers: &HeaderMap, keys: &[String]) -> bool {
    let Some(value) = headers.get(header::AUTHORIZATION).map(axum::http::HeaderValue::as_bytes) else {
        return false;
    };
    let Some((scheme, given)) = value.split_at_checked("bearer ".len()) else { return false };
    // Every key is compared, so that the time taken does not tell which one came close.
    scheme.eq_ignore_ascii_case(b"bearer ")
        && keys.iter().fold(false, |found, key| found | same_bytes(given, key.as_bytes()))
}

/// Compares in a time that depends on the lengths alone.
fn same_bytes(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn keys() {
        let keys = ["one".to_owned(), "two".to_owned()];
        let cases = [
            (Some("Bearer one"), true),
            (Some("bearer two"), true),
            (Some("Bearer three"), false),
            (Some("Bearer on"), false),
            (Some("Bearer "), false),
            (Some("Basic one"), false),
            (Some("one"), false),
            (None, false),
        ];
        for (value, expected) in cases {
            let headers = value.map(|value| (header::AUTHORIZATION, HeaderValue::from_static(value)));
            assert_eq!(has_key(&headers.into_iter().collect(), &keys), expected, "{value:?}");
        }
    }
}

//! Request bodies: JSON, whatever the content type says, with errors that name the field.

use std::sync::{Arc, LazyLock};

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::IntoResponse;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::App;
use super::error::ApiError;

/// A request body that is a JSON object. The parts of a request are read from it one struct at a time, so that
/// endpoints share them and each error has the path of its field.
#[derive(Debug)]
pub(super) struct JsonBody {
    value: Value,
    /// Of its text.
    bytes: usize,
}

impl JsonBody {
    /// How long its text was: what the work with it depends on.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Parses a body.
    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self, ApiError> {
        let bad = |message: String| ApiError::BadRequest { message, param: None };
        let value: Value = serde_json::from_slice(bytes)
            .map_err(|e| bad(format!("the request body is not valid JSON: {e}")))?;
        if value.is_object() {
            Ok(Self { value, bytes: bytes.len() })
        } else {
            Err(bad("the request body must be a JSON object".to_owned()))
        }
    }

    /// The fields that `T` has; all others are ignored here.
    pub(super) fn read<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        serde_path_to_error::deserialize(&self.value).map_err(|e| {
            let path = e.path().to_string();
            match path.as_str() {
                "." => {
                    ApiError::BadRequest { param: missing_field(e.inner()), message: e.inner().to_string() }
                }
                _ => ApiError::field(path.as_str(), format!("{path}: {}", e.inner())),
            }
        })
    }

    /// Takes a field out that may be large; `null` when it is not there.
    pub(super) fn take(&mut self, field: &str) -> Value {
        self.value.get_mut(field).map(Value::take).unwrap_or_default()
    }

    /// The body that has these fields, made from one of so many bytes.
    pub(super) fn from_object(fields: Map<String, Value>, bytes: usize) -> Self {
        Self { value: Value::Object(fields), bytes }
    }

    /// All fields.
    pub(super) fn object(&self) -> &Map<String, Value> {
        // Every way to make a body makes an object.
        static NONE: LazyLock<Map<String, Value>> = LazyLock::new(Map::new);
        self.value.as_object().unwrap_or(&NONE)
    }

    /// One field.
    pub(super) fn get(&self, field: &str) -> Option<&Value> {
        self.value.get(field)
    }
}

fn declared_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// The field of serde's "missing field `prompt`".
fn missing_field(error: &serde_json::Error) -> Option<String> {
    let message = error.to_string();
    let (name, _) = message.strip_prefix("missing field `")?.split_once('`')?;
    Some(name.to_owned())
}

impl FromRequest<Arc<App>> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        let most = app.config().max_body_bytes;
        // Said at once, before anything of the body is waited for.
        if declared_length(request.headers()).is_some_and(|length| length > most as u64) {
            return Err(ApiError::BodyTooLarge { limit: most });
        }
        let limit = app.config().client_timeout;
        let received = tokio::time::timeout(limit, Bytes::from_request(request, app)).await;
        let received = received.map_err(|_| ApiError::BodyTimeout { limit_secs: limit.as_secs() })?;
        let bytes = received.map_err(|rejection| {
            let message = rejection.body_text();
            match rejection.into_response().status() {
                StatusCode::PAYLOAD_TOO_LARGE => ApiError::BodyTooLarge { limit: most },
                _ => ApiError::BadRequest { message, param: None },
            }
        })?;
        app.prepare(bytes.len(), move || Self::from_bytes(&bytes)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    #[allow(dead_code, reason = "only its parsing is of interest")]
    struct Fields {
        prompt: String,
        stream_options: Option<Options>,
    }

    #[derive(Debug, serde::Deserialize)]
    #[allow(dead_code, reason = "only its parsing is of interest")]
    struct Options {
        include_usage: Option<bool>,
    }

    #[test]
    fn errors_name_the_field() {
        let cases = [
            (r#"{"prompt": 1}"#, Some("prompt")),
            (
                r#"{"prompt": "a", "stream_options": {"include_usage": "yes"}}"#,
                Some("stream_options.include_usage"),
            ),
            ("{}", Some("prompt")),
        ];
        for (body, field) in cases {
            let error = JsonBody::from_bytes(body.as_bytes()).unwrap().read::<Fields>().unwrap_err();
            let ApiError::BadRequest { param, message } = error else { panic!("{error:?}") };
            assert_eq!(param.as_deref(), field, "{message}");
        }
        let body = r#"{"prompt": "a", "unknown": 1, "stream_options": null}"#;
        JsonBody::from_bytes(body.as_bytes()).unwrap().read::<Fields>().unwrap();
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for body in ["", "{", "[1]", "\"text\"", "{\"a\": 1} x"] {
            assert!(
                matches!(JsonBody::from_bytes(body.as_bytes()), Err(ApiError::BadRequest { .. })),
                "{body}"
            );
        }
    }
}

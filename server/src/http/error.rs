//! What a client is told when a request fails. This is the only table of statuses.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::engine::SubmitError;

/// An error of a request, in the form of OpenAI's API.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// The request is malformed, out of range, or asks for what this server does not do.
    #[error("{message}")]
    BadRequest {
        /// What is wrong.
        message: String,
        /// The field that is wrong.
        param: Option<String>,
    },
    /// No or a wrong API key.
    #[error("a valid API key is needed: Authorization: Bearer KEY")]
    Unauthorized,
    /// Not a model of this server.
    #[error("the model '{0}' does not exist")]
    UnknownModel(String),
    /// Not a response that this server still has.
    #[error("there is no response '{0}', or it is no longer kept")]
    UnknownResponse(String),
    /// Not a path of this server.
    #[error("there is no {0} here")]
    UnknownRoute(String),
    /// A path of this server, with another method.
    #[error("{0} is not allowed here")]
    MethodNotAllowed(String),
    /// The body is larger than `max_body_bytes`.
    #[error("the request body is larger than {limit} bytes")]
    BodyTooLarge {
        /// The limit.
        limit: usize,
    },
    /// The body did not arrive within `client_timeout`.
    #[error("the request body did not arrive within {limit_secs} seconds")]
    BodyTimeout {
        /// The limit.
        limit_secs: u64,
    },
    /// The answer was not finished within `request_timeout`.
    #[error("the request took longer than the {limit_secs} seconds that this server allows")]
    Timeout {
        /// The limit.
        limit_secs: u64,
    },
    /// The queue is full.
    #[error("the server is overloaded: {queued} requests are waiting; try again later")]
    Overloaded {
        /// Sequences waiting.
        queued: usize,
    },
    /// A grammar's next tokens could not be computed within their limits.
    #[error("the grammar of the structured output is too complex to be followed")]
    GrammarLost,
    /// The model is being loaded.
    #[error("the model is being loaded; try again later")]
    Loading,
    /// The server is stopping.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// A probe of a server whose engine has died.
    #[error("the engine has died")]
    Unhealthy,
    /// The engine's thread ended by a bug; the process ends soon.
    #[error("the engine has died; the answer is lost")]
    EngineDied,
    /// A bug.
    #[error("{0}")]
    Internal(String),
}

/// An error, in the form of OpenAI's API.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"error": {"message": "n must be at least 1", "type": "BadRequestError", "param": "n", "code": 400}}))]
pub(super) struct ErrorBody {
    error: ErrorFields,
}

#[derive(Debug, Serialize, ToSchema)]
struct ErrorFields {
    /// What is wrong, for people.
    message: String,
    r#type: ErrorType,
    /// The path of the field that is wrong: `messages[0].role`.
    param: Option<String>,
    /// The HTTP status.
    #[schema(minimum = 400, maximum = 599)]
    code: u16,
}

/// The kind of an error, as OpenAI's clients know them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[expect(clippy::enum_variant_names, reason = "the names on the wire")]
enum ErrorType {
    BadRequestError,
    AuthenticationError,
    NotFoundError,
    RateLimitError,
    TimeoutError,
    InternalServerError,
    ServiceUnavailableError,
}

impl ApiError {
    /// A bad request for which one field is to blame.
    pub(super) fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::BadRequest { message: message.into(), param: Some(param.into()) }
    }

    /// The status and the type's name.
    fn status(&self) -> (StatusCode, ErrorType) {
        use ErrorType::*;
        match self {
            Self::BadRequest { .. } | Self::GrammarLost => (StatusCode::BAD_REQUEST, BadRequestError),
            Self::Unauthorized => (StatusCode::UNAUTHORIZED, AuthenticationError),
            Self::UnknownModel(_) | Self::UnknownResponse(_) | Self::UnknownRoute(_) => {
                (StatusCode::NOT_FOUND, NotFoundError)
            }
            Self::MethodNotAllowed(_) => (StatusCode::METHOD_NOT_ALLOWED, BadRequestError),
            Self::BodyTooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, BadRequestError),
            Self::BodyTimeout { .. } => (StatusCode::REQUEST_TIMEOUT, BadRequestError),
            Self::Timeout { .. } => (StatusCode::GATEWAY_TIMEOUT, TimeoutError),
            Self::Overloaded { .. } => (StatusCode::TOO_MANY_REQUESTS, RateLimitError),
            Self::Loading | Self::ShuttingDown | Self::Unhealthy => {
                (StatusCode::SERVICE_UNAVAILABLE, ServiceUnavailableError)
            }
            Self::EngineDied | Self::Internal(_) => (StatusCode::INTERNAL_SERVER_ERROR, InternalServerError),
        }
    }

    /// The body, for a response or an event of a stream.
    pub(super) fn body(&self) -> ErrorBody {
        let (status, r#type) = self.status();
        let param = match self {
            Self::BadRequest { param, .. } => param.clone(),
            Self::UnknownModel(_) => Some("model".to_owned()),
            _ => None,
        };
        ErrorBody { error: ErrorFields { message: self.to_string(), r#type, param, code: status.as_u16() } }
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::Overloaded { queued } => Self::Overloaded { queued },
            SubmitError::TooLong { .. } => Self::field("prompt", error.to_string()),
            SubmitError::Invalid(message) => Self::Internal(message),
            SubmitError::ShuttingDown => Self::ShuttingDown,
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (status, _) = self.status();
        let mut response = (status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        match self {
            Self::Overloaded { .. } | Self::Loading => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            Self::Unauthorized => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            _ => {}
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_body_has_openais_form() {
        let body = serde_json::to_value(ApiError::field("n", "n must be at least 1").body()).unwrap();
        let expected = serde_json::json!({"error": {
            "message": "n must be at least 1", "type": "BadRequestError", "param": "n", "code": 400}});
        assert_eq!(body, expected);
    }

    #[test]
    fn who_is_turned_away_is_told_when_to_come_back() {
        let response = ApiError::Overloaded { queued: 3 }.into_response();
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(response.headers()[header::RETRY_AFTER], "1");
    }
}

//! `GET /health`, `/ping`.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;

use super::App;
use super::error::ApiError;
use super::openapi::ReadErrors;

/// `GET /health`: 200 when requests are taken; 503 while the model is loaded, while the server stops, or when its engine has died.
#[utoipa::path(get, path = "/health", responses((status = 200, description = "Requests are taken."), ReadErrors))]
pub(super) async fn health(State(app): State<Arc<App>>) -> Result<StatusCode, ApiError> {
    let engine = &app.model()?.engine;
    if engine.is_draining() {
        return Err(ApiError::ShuttingDown);
    }
    if engine.is_alive() { Ok(StatusCode::OK) } else { Err(ApiError::Unhealthy) }
}

/// `GET /ping`: as `/health`, by the name that SageMaker asks for.
#[utoipa::path(get, path = "/ping", responses((status = 200, description = "Requests are taken."), ReadErrors))]
pub(super) async fn ping(state: State<Arc<App>>) -> Result<StatusCode, ApiError> {
    health(state).await
}

/// `POST /ping`: the same.
#[utoipa::path(
    post,
    path = "/ping",
    operation_id = "postPing",
    responses((status = 200, description = "Requests are taken."), ReadErrors)
)]
pub(super) async fn post_ping(state: State<Arc<App>>) -> Result<StatusCode, ApiError> {
    health(state).await
}

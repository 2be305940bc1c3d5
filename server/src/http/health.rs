//! `GET /health`, `/ping`.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;

use super::App;
use super::error::ApiError;

/// 200 when requests are taken; 503 while the model is loaded, while the server stops, or when its engine has died.
pub(super) async fn health(State(app): State<Arc<App>>) -> Result<StatusCode, ApiError> {
    let engine = &app.model()?.engine;
    if engine.is_draining() {
        return Err(ApiError::ShuttingDown);
    }
    if engine.is_alive() { Ok(StatusCode::OK) } else { Err(ApiError::Unhealthy) }
}

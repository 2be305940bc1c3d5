//! `GET /version`.

use axum::Json;
use serde::Serialize;

#[derive(Debug, Serialize)]
pub(super) struct Version {
    version: &'static str,
}

/// `GET /version`.
pub(super) async fn version() -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION") })
}

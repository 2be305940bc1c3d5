//! `GET /load`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use super::App;

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Load {
    server_load: usize,
}

/// `GET /load`: sequences in the engine, running and waiting; routers send the next request to the lowest.
#[utoipa::path(get, path = "/load", responses((status = 200, description = "How many.", body = Load)))]
pub(super) async fn load(State(app): State<Arc<App>>) -> Json<Load> {
    let stats = app.loaded().map(|model| model.engine.stats()).unwrap_or_default();
    Json(Load { server_load: stats.running + stats.waiting })
}

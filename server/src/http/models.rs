//! `GET /v1/models` and `GET /v1/models/{id}`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;

use super::App;
use super::error::ApiError;
use crate::model::ServedModel;

/// A model card. `owned_by` is vLLM's: routers choose the protocol by it.
#[derive(Debug, Serialize)]
pub(super) struct ModelCard {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: String,
    parent: Option<String>,
    max_model_len: usize,
    permission: Vec<()>,
}

#[derive(Debug, Serialize)]
pub(super) struct ModelList {
    object: &'static str,
    data: Vec<ModelCard>,
}

fn card(model: &ServedModel, name: &str) -> ModelCard {
    ModelCard {
        id: name.to_owned(),
        object: "model",
        created: model.created,
        owned_by: "vllm",
        root: model.root.clone(),
        parent: None,
        max_model_len: model.max_model_len(),
        permission: Vec::new(),
    }
}

/// `GET /v1/models`: a card for each name of the model.
pub(super) async fn list(State(app): State<Arc<App>>) -> Result<Json<ModelList>, ApiError> {
    let model = app.model()?;
    let data = model.names.iter().map(|name| card(model, name)).collect();
    Ok(Json(ModelList { object: "list", data }))
}

/// `GET /v1/models/{id}`; an id may have slashes.
pub(super) async fn one(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<Json<ModelCard>, ApiError> {
    let model = app.model()?;
    // The path's leading slash is the router's.
    let name = model
        .resolve_name(Some(&id))
        .or_else(|e| model.resolve_name(Some(&format!("/{id}"))).map_err(|_| e))?;
    Ok(Json(card(model, name)))
}

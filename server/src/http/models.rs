//! `GET /v1/models` and `GET /v1/models/{id}`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use super::App;
use super::error::ApiError;
use super::openapi::{LookupErrors, ReadErrors};
use super::path_id::PathId;
use crate::model::ServedModel;

/// A model card. `owned_by` is vLLM's: routers choose the protocol by it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ModelCard {
    id: String,
    #[schema(example = "model")]
    object: &'static str,
    /// Seconds since 1970.
    created: u64,
    #[schema(example = "vllm")]
    owned_by: &'static str,
    /// The folder that it was loaded from.
    root: String,
    parent: Option<String>,
    /// Most tokens of prompt and answer together.
    max_model_len: usize,
    #[schema(value_type = Vec<Object>)]
    permission: Vec<()>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ModelList {
    #[schema(example = "list")]
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
#[utoipa::path(
    get,
    path = "/v1/models",
    operation_id = "listModels",
    responses((status = 200, description = "The cards.", body = ModelList), ReadErrors)
)]
pub(super) async fn list(State(app): State<Arc<App>>) -> Result<Json<ModelList>, ApiError> {
    let model = app.model()?;
    let data = model.names.iter().map(|name| card(model, name)).collect();
    Ok(Json(ModelList { object: "list", data }))
}

/// `GET /v1/models/{id}`: the card of one; an id may have slashes.
#[utoipa::path(
    get,
    path = "/v1/models/{*id}",
    operation_id = "retrieveModel",
    params(("id" = String, Path, description = "A name of the served model.")),
    responses((status = 200, description = "The card.", body = ModelCard), LookupErrors)
)]
pub(super) async fn one(
    State(app): State<Arc<App>>,
    PathId(id): PathId,
) -> Result<Json<ModelCard>, ApiError> {
    let model = app.model()?;
    // The path's leading slash is the router's.
    let name = model
        .resolve_name(Some(&id))
        .or_else(|e| model.resolve_name(Some(&format!("/{id}"))).map_err(|_| e))?;
    Ok(Json(card(model, name)))
}

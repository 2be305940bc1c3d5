//! `POST /detokenize`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::App;
use super::check::require_in_vocabulary;
use super::error::ApiError;
use super::json::JsonBody;
use super::openapi::BodyErrors;

/// Token ids.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = DetokenizeRequest, example = json!({"tokens": [1, 2, 3]}))]
pub(super) struct DetokenizeFields {
    /// A name of the served model [default: its first].
    model: Option<String>,
    tokens: Vec<u32>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct DetokenizeResponse {
    /// Their text.
    prompt: String,
}

/// `POST /detokenize`: the text of token ids, special tokens included.
#[utoipa::path(
    post,
    path = "/detokenize",
    request_body = DetokenizeFields,
    responses((status = 200, description = "The text.", body = DetokenizeResponse), BodyErrors)
)]
pub(super) async fn detokenize(
    State(app): State<Arc<App>>,
    body: JsonBody,
) -> Result<Json<DetokenizeResponse>, ApiError> {
    let model = Arc::clone(app.model()?);
    app.off_the_reactor(move || {
        let fields: DetokenizeFields = body.read()?;
        model.resolve_name(fields.model.as_deref())?;
        require_in_vocabulary("tokens", &fields.tokens, model.vocab_size())?;
        let prompt = model.tokenizer()?.decode(&fields.tokens, false);
        Ok(Json(DetokenizeResponse { prompt }))
    })
    .await
}

//! `POST /detokenize`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};

use super::App;
use super::check::require_in_vocabulary;
use super::error::ApiError;
use super::json::JsonBody;

#[derive(Debug, Deserialize)]
struct DetokenizeFields {
    model: Option<String>,
    tokens: Vec<u32>,
}

#[derive(Debug, Serialize)]
pub(super) struct DetokenizeResponse {
    prompt: String,
}

/// `POST /detokenize`: the text of token ids, special tokens included.
pub(super) async fn detokenize(
    State(app): State<Arc<App>>,
    body: JsonBody,
) -> Result<Json<DetokenizeResponse>, ApiError> {
    let model = Arc::clone(app.model()?);
    let fields: DetokenizeFields = body.read()?;
    model.resolve_name(fields.model.as_deref())?;
    require_in_vocabulary("tokens", &fields.tokens, model.vocab_size())?;
    app.off_the_reactor(move || {
        let prompt = model.tokenizer()?.decode(&fields.tokens, false);
        Ok(Json(DetokenizeResponse { prompt }))
    })
    .await
}

//! `GET /tokenizer_info`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Map, Value};

use super::App;
use super::error::ApiError;
use super::openapi::LookupErrors;
use crate::model::ServedModel;
use crate::tokenizer::Tokenizer;

/// `GET /tokenizer_info`: `tokenizer_config.json` with special tokens as plain text, and the chat template in use.
#[utoipa::path(
    get,
    path = "/tokenizer_info",
    operation_id = "tokenizerInfo",
    responses((status = 200, description = "What is known of the tokenizer.", body = Object), LookupErrors)
)]
pub(super) async fn tokenizer_info(
    State(app): State<Arc<App>>,
) -> Result<Json<Map<String, Value>>, ApiError> {
    let model = app.model()?;
    Ok(Json(describe(model.tokenizer()?, model)))
}

fn describe(tokenizer: &Tokenizer, model: &ServedModel) -> Map<String, Value> {
    let mut info = tokenizer.config().clone();
    for (key, text) in tokenizer.special_tokens() {
        info.insert(key.to_owned(), Value::from(text));
    }
    // lm-eval takes a tokenizer without this key for none at all.
    info.entry("eos_token").or_insert(Value::Null);
    if let Ok(template) = model.chat_template() {
        info.insert("chat_template".to_owned(), Value::from(template.source()));
    }
    info.insert("max_model_len".to_owned(), Value::from(model.max_model_len()));
    info
}

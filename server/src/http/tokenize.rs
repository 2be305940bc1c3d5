//! `POST /tokenize`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::App;
use super::chat_messages::{ChatPromptFields, check_messages};
use super::error::ApiError;
use super::json::JsonBody;
use super::unsupported;

/// A text or the messages of a chat.
#[derive(Debug, Deserialize)]
struct TokenizeFields {
    model: Option<String>,
    prompt: Option<String>,
    messages: Option<Vec<Map<String, Value>>>,
    add_special_tokens: Option<bool>,
    return_token_strs: Option<bool>,
}

#[derive(Debug, Serialize)]
pub(super) struct TokenizeResponse {
    count: usize,
    max_model_len: usize,
    tokens: Vec<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_strs: Option<Vec<String>>,
}

/// `POST /tokenize`: the tokens that a completion or a chat would get as its prompt.
pub(super) async fn tokenize(
    State(app): State<Arc<App>>,
    body: JsonBody,
) -> Result<Json<TokenizeResponse>, ApiError> {
    let model = Arc::clone(app.model()?);
    let fields: TokenizeFields = body.read()?;
    model.resolve_name(fields.model.as_deref())?;
    unsupported::check_tokenize(&body)?;
    let chat: ChatPromptFields = body.read()?;
    app.off_the_reactor(move || {
        let tokens = match (fields.prompt, fields.messages) {
            (Some(text), None) => {
                model.encode("prompt", &text, fields.add_special_tokens.unwrap_or(true))?.ids
            }
            (None, Some(messages)) => {
                check_messages(&messages)?;
                chat.prompt(&model, messages, None)?.ids
            }
            _ => return Err(ApiError::field("prompt", "either prompt or messages is needed")),
        };
        let spelled = fields.return_token_strs.unwrap_or(false).then(|| {
            let spell = |&id: &u32| model.tokenizer.as_ref().and_then(|t| t.token(id)).unwrap_or_default();
            tokens.iter().map(spell).collect()
        });
        Ok(Json(TokenizeResponse {
            count: tokens.len(),
            max_model_len: model.max_model_len(),
            token_strs: spelled,
            tokens,
        }))
    })
    .await
}

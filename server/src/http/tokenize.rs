//! `POST /tokenize`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::App;
use super::chat::{ChatPromptFields, MessageSchema, check_messages};
use super::error::ApiError;
use super::json::JsonBody;
use super::openapi::BodyErrors;
use super::unsupported;

/// A text or the messages of a chat.
#[derive(Debug, Deserialize, ToSchema)]
struct TokenizeFields {
    /// A name of the served model [default: its first].
    model: Option<String>,
    /// The text.
    prompt: Option<String>,
    /// The chat.
    #[schema(value_type = Option<Vec<MessageSchema>>)]
    messages: Option<Vec<Map<String, Value>>>,
    /// Whether the tokenizer adds special tokens [default: to a text, not to a chat].
    add_special_tokens: Option<bool>,
    /// Whether the answer has `token_strs` [default: false].
    return_token_strs: Option<bool>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct TokenizeResponse {
    count: usize,
    /// Most tokens of prompt and answer together.
    max_model_len: usize,
    tokens: Vec<u32>,
    /// The tokens as the vocabulary spells them.
    #[serde(skip_serializing_if = "Option::is_none")]
    token_strs: Option<Vec<String>>,
}

/// The body of `/tokenize`: a text, or the messages of a chat with what else makes its prompt.
#[derive(ToSchema)]
#[schema(example = json!({"prompt": "Hello"}))]
#[expect(dead_code, reason = "fields are read one struct at a time; this is their sum, for the document")]
pub(super) struct TokenizeRequest {
    #[serde(flatten)]
    fields: TokenizeFields,
    #[serde(flatten)]
    chat: ChatPromptFields,
}

/// `POST /tokenize`: the tokens that a completion or a chat would get as its prompt.
#[utoipa::path(
    post,
    path = "/tokenize",
    request_body = TokenizeRequest,
    responses((status = 200, description = "The tokens.", body = TokenizeResponse), BodyErrors)
)]
pub(super) async fn tokenize(
    State(app): State<Arc<App>>,
    body: JsonBody,
) -> Result<Json<TokenizeResponse>, ApiError> {
    let model = Arc::clone(app.model()?);
    app.off_the_reactor(move || {
        let fields: TokenizeFields = body.read()?;
        model.resolve_name(fields.model.as_deref())?;
        unsupported::check_tokenize(&body)?;
        let chat: ChatPromptFields = body.read()?;
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

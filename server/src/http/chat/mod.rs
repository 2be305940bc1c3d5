//! `POST /v1/chat/completions`.

mod answer;
mod earlier_calls;
mod messages;
mod request;
mod running;

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};

use super::App;
use super::check::require;
use super::error::ApiError;
use super::json::JsonBody;
use super::openapi::GenerationErrors;
use super::request_id::RequestId;
use super::sse::EventSchema;
use super::usage::StreamFields;
use answer::Choice;
pub(super) use answer::{ChatResponse, ChunkChoice};
pub(super) use messages::{ChatPromptFields, MessageSchema, check_messages};
pub(super) use request::{Chat, ChatRequest};
pub(super) use running::ChatAnswer;

/// `POST /v1/chat/completions`: answers a conversation.
#[utoipa::path(
    post,
    path = "/v1/chat/completions",
    operation_id = "createChatCompletion",
    request_body = ChatRequest,
    responses(
        (
            status = 200,
            description = "The answer; with `stream: true` events of `ChatCompletionChunk`, then `[DONE]`.",
            content((ChatResponse<Choice> = "application/json"), (EventSchema = "text/event-stream"))
        ),
        GenerationErrors
    )
)]
pub(super) async fn chat(
    State(app): State<Arc<App>>,
    request_id: RequestId,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let (reader, id, bytes) = (Arc::clone(&app), request_id.clone(), body.bytes());
    let read = move || {
        let chat = Chat::read(&reader, &id, &body)?;
        let streaming = body.read::<StreamFields>()?.plan()?;
        let whole = chat.plan.prompt_logprobs.is_none() || streaming.is_none();
        require("prompt_logprobs", whole, "absent in a stream")?;
        Ok((chat, streaming))
    };
    let (chat, streaming) = app.prepare(bytes, read).await?;
    let answer = chat.start(&app, format!("chatcmpl-{request_id}")).await?;
    match streaming {
        None => answer.whole().await.map(|whole| Json(whole).into_response()),
        Some(streaming) => Ok(answer.stream(streaming)),
    }
}

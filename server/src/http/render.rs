//! `POST /v1/completions/render`, `/v1/chat/completions/render`: the prompt's token ids, and nothing generated. Routers
//! that know which server has which prefix cached ask for them.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::App;
use super::chat::{ChatPromptFields, ChatRequest, check_messages};
use super::completions::CompletionRequest;
use super::error::ApiError;
use super::json::JsonBody;
use super::openapi::BodyErrors;
use super::prompt::{PromptOptions, parse_prompts};
use super::request_id::RequestId;
use super::sampling::SamplingFields;
use super::tools::ToolPlan;
use super::unsupported;

/// The fields that matter here; all others are those of the endpoint that generates.
#[derive(Debug, Deserialize)]
struct RenderFields {
    model: Option<String>,
    add_special_tokens: Option<bool>,
    request_id: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Messages {
    messages: Vec<Map<String, Value>>,
}

/// A prompt as the engine would get it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Rendered {
    request_id: String,
    model: String,
    token_ids: Vec<u32>,
}

/// `POST /v1/completions/render`: an entry per prompt.
#[utoipa::path(
    post,
    path = "/v1/completions/render",
    operation_id = "renderCompletion",
    request_body = CompletionRequest,
    responses((status = 200, description = "An entry for each prompt.", body = Vec<Rendered>), BodyErrors)
)]
pub(super) async fn completions(
    State(app): State<Arc<App>>,
    request_id: RequestId,
    mut body: JsonBody,
) -> Result<Json<Vec<Rendered>>, ApiError> {
    let model = Arc::clone(app.model()?);
    app.off_the_reactor(move || {
        let fields: RenderFields = body.read()?;
        request_id.adopt(fields.request_id.as_deref());
        unsupported::check_completion(&body)?;
        let name = model.resolve_name(fields.model.as_deref())?.to_owned();
        let truncate = body.read::<SamplingFields>()?.plan(model.facts())?.truncate_prompt;
        let add_special_tokens = fields.add_special_tokens.unwrap_or(true);
        let options = PromptOptions { add_special_tokens, truncate, echo: false, field: "prompt" };
        let prompt = body.take("prompt");
        let given = parse_prompts(prompt, "prompt", model.longest_prompt(truncate))?;
        let rendered = given.into_iter().enumerate().map(|(index, prompt)| {
            let token_ids = prompt.prepare(&model, options)?.ids;
            Ok(Rendered { request_id: format!("cmpl-{request_id}-{index}"), model: name.clone(), token_ids })
        });
        rendered.collect::<Result<_, _>>().map(Json)
    })
    .await
}

/// `POST /v1/chat/completions/render`: the tokens of the rendered messages.
#[utoipa::path(
    post,
    path = "/v1/chat/completions/render",
    operation_id = "renderChatCompletion",
    request_body = ChatRequest,
    responses((status = 200, description = "The prompt.", body = Rendered), BodyErrors)
)]
pub(super) async fn chat(
    State(app): State<Arc<App>>,
    request_id: RequestId,
    body: JsonBody,
) -> Result<Json<Rendered>, ApiError> {
    let model = Arc::clone(app.model()?);
    app.off_the_reactor(move || {
        let fields: RenderFields = body.read()?;
        request_id.adopt(fields.request_id.as_deref());
        let Messages { messages } = body.read()?;
        unsupported::check_chat(&body)?;
        ToolPlan::read(&body, model.tool_format)?;
        let name = model.resolve_name(fields.model.as_deref())?.to_owned();
        let truncate = body.read::<SamplingFields>()?.plan(model.facts())?.truncate_prompt;
        let prompt: ChatPromptFields = body.read()?;
        check_messages(&messages)?;
        let limited = truncate.is_none().then_some("messages");
        let mut token_ids = prompt.prompt(&model, messages, limited)?.ids;
        token_ids.drain(..truncate.map_or(0, |keep| token_ids.len().saturating_sub(keep)));
        Ok(Json(Rendered { request_id: format!("chatcmpl-{request_id}"), model: name, token_ids }))
    })
    .await
}

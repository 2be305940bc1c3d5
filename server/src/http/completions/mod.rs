//! `POST /v1/completions`.

mod answer;
mod request;

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};

use super::App;
use super::error::ApiError;
use super::generation::Generation;
use super::json::JsonBody;
use super::openapi::GenerationErrors;
use super::request_id::RequestId;
use super::sampling::SamplingFields;
use super::sse::EventSchema;
use super::structured_output::StructuredOutput;
use super::unsupported;
use super::usage::StreamFields;
use answer::{Answer, CompletionResponse};
pub(super) use request::CompletionRequest;
use request::{Completion, CompletionFields};

/// `POST /v1/completions`: continues prompts.
#[utoipa::path(
    post,
    path = "/v1/completions",
    operation_id = "createCompletion",
    request_body = CompletionRequest,
    responses(
        (
            status = 200,
            description = "The answer; with `stream: true` events of the same form, then `[DONE]`.",
            content((CompletionResponse = "application/json"), (EventSchema = "text/event-stream"))
        ),
        GenerationErrors
    )
)]
pub(super) async fn complete(
    State(app): State<Arc<App>>,
    request_id: RequestId,
    mut body: JsonBody,
) -> Result<Response, ApiError> {
    let model = Arc::clone(app.model()?);
    let (reader, id, bytes) = (Arc::clone(&model), request_id.clone(), body.bytes());
    let read = move || {
        let fields: CompletionFields = body.read()?;
        id.adopt(fields.request_id.as_deref());
        unsupported::check_completion(&body)?;
        let served_name = reader.resolve_name(fields.model.as_deref())?.to_owned();
        let plan = body.read::<SamplingFields>()?.plan(reader.facts())?;
        let streaming = body.read::<StreamFields>()?.plan()?;
        let prompt = body.take("prompt");
        Ok((fields, served_name, plan, streaming, prompt, StructuredOutput::read(&body)?))
    };
    let (fields, served_name, plan, streaming, prompt, structured) = app.prepare(bytes, read).await?;
    let completion = Completion::prepare(&app, &model, &fields, prompt, plan, structured, streaming).await?;
    let id = format!("cmpl-{request_id}");
    let requests = completion.requests(&id)?;
    let generation =
        Generation::start(&model, app.telemetry(), &completion.plan, requests, completion.prompt_tokens())?
            .recorded(&request_id);
    let answer = Answer { id, created: super::unix_time(), model: served_name, completion, generation };
    match streaming {
        None => answer.whole().await.map(|whole| Json(whole).into_response()),
        Some(streaming) => Ok(answer.stream(streaming)),
    }
}

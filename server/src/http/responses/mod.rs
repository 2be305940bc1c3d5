//! `/v1/responses`: OpenAI's Responses API over the same chats. Responses are kept in memory: to be retrieved, and to be
//! gone on from.

mod document;
mod input;
mod items;
mod request;
mod store;

use std::convert::Infallible;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::sse::{Event as SseEvent, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, StreamExt};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::App;
use super::chat::{Chat, ChatAnswer};
use super::error::ApiError;
use super::json::JsonBody;
use super::openapi::{GenerationErrors, LookupErrors};
use super::path_id::PathId;
use super::request_id::RequestId;
use super::sse::EventSchema;
use crate::answer::Part;
use document::{DeletedResponse, ResponseObject, ResponseRequest};
use items::{Event, Output, new_id};
use request::{ResponseFields, blamed};
pub(super) use store::ResponseStore;
use store::Stored;

/// `POST /v1/responses`: answers, at once, as a stream, or in the background.
#[utoipa::path(
    post,
    path = "/v1/responses",
    operation_id = "createResponse",
    request_body = ResponseRequest,
    responses(
        (
            status = 200,
            description = "The response; with `stream: true` OpenAI's events, from `response.created` to \
                           `response.completed`, `response.incomplete` or `response.failed`.",
            content((ResponseObject = "application/json"), (EventSchema = "text/event-stream"))
        ),
        GenerationErrors
    )
)]
pub(super) async fn create(
    State(app): State<Arc<App>>,
    request_id: RequestId,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let (reader, bytes) = (Arc::clone(&app), body.bytes());
    let read = move || {
        let fields: ResponseFields = body.read()?;
        let mut messages = earlier(&reader, fields.previous_response_id.as_deref())?;
        messages.extend(fields.messages()?);
        let chat = fields.chat(&body, messages.clone())?;
        let chat = Chat::read(&reader, &request_id, &chat).map_err(blamed)?;
        Ok((fields, messages, chat))
    };
    let (fields, messages, chat) = app.prepare(bytes, read).await?;
    let id = new_id("resp");
    let (model, stream, background) = (chat.served_name().to_owned(), fields.stream, fields.background);
    let answer = chat.start(&app, id.clone()).await.map_err(blamed)?;
    let run = Run {
        app,
        head: head(&id, &model, &fields),
        id,
        messages,
        keeps: fields.store.unwrap_or(true),
        answer,
        output: Output::default(),
        reasoning_tokens: 0,
        finish: None,
    };
    if background == Some(true) {
        return Ok(Json(run.detach()).into_response());
    }
    if stream == Some(true) {
        Ok(run.stream())
    } else {
        run.whole().await.map(|whole| Json(whole).into_response())
    }
}

/// `GET /v1/responses/{id}`: a response that is kept, complete or not.
#[utoipa::path(
    get,
    path = "/v1/responses/{id}",
    operation_id = "getResponse",
    params(("id" = String, Path, description = "The id of a response.")),
    responses((status = 200, description = "The response.", body = ResponseObject), LookupErrors)
)]
pub(super) async fn retrieve(
    State(app): State<Arc<App>>,
    PathId(id): PathId,
) -> Result<Json<Value>, ApiError> {
    stored(&app, &id).map(|stored| Json(stored.response))
}

/// `DELETE /v1/responses/{id}`: it is not kept any longer; one that is still being made ends.
#[utoipa::path(
    delete,
    path = "/v1/responses/{id}",
    operation_id = "deleteResponse",
    params(("id" = String, Path, description = "The id of a response.")),
    responses((status = 200, description = "It is gone.", body = DeletedResponse), LookupErrors)
)]
pub(super) async fn delete(State(app): State<Arc<App>>, PathId(id): PathId) -> Result<Json<Value>, ApiError> {
    let stored = app.responses().remove(&id).ok_or_else(|| ApiError::UnknownResponse(id.clone()))?;
    if let Some(running) = stored.running {
        running.abort();
    }
    Ok(Json(json!({"id": id, "object": "response", "deleted": true})))
}

/// `POST /v1/responses/{id}/cancel`: ends a response that is made in the background.
#[utoipa::path(
    post,
    path = "/v1/responses/{id}/cancel",
    operation_id = "cancelResponse",
    params(("id" = String, Path, description = "The id of a response.")),
    responses((status = 200, description = "The response as it is now.", body = ResponseObject), LookupErrors)
)]
pub(super) async fn cancel(State(app): State<Arc<App>>, PathId(id): PathId) -> Result<Json<Value>, ApiError> {
    let mut stored = stored(&app, &id)?;
    if stored.response["background"] != true {
        let message = "only a response with background: true can be cancelled";
        return Err(ApiError::field("response_id", message));
    }
    // One that has ended stays as it is.
    if let Some(running) = stored.running.take() {
        running.abort();
        stored.response["status"] = Value::from("cancelled");
        app.responses().put(stored.clone());
    }
    Ok(Json(stored.response))
}

fn stored(app: &App, id: &str) -> Result<Stored, ApiError> {
    app.responses().get(id).ok_or_else(|| ApiError::UnknownResponse(id.to_owned()))
}

/// The conversation that a response ended.
fn earlier(app: &App, id: Option<&str>) -> Result<Vec<Value>, ApiError> {
    let Some(id) = id else { return Ok(Vec::new()) };
    let stored = stored(app, id)?;
    if stored.response["status"] == "in_progress" || stored.response["status"] == "cancelled" {
        let message = format!("previous_response_id: {id} has no answer to go on from");
        return Err(ApiError::field("previous_response_id", message));
    }
    Ok(stored.messages)
}

/// What a response has from its beginning to its end.
fn head(id: &str, model: &str, fields: &ResponseFields) -> Value {
    let format = fields.text.as_ref().and_then(|text| text.format.clone());
    json!({
        "id": id, "object": "response", "created_at": super::unix_time(), "status": "in_progress",
        "background": fields.background.unwrap_or(false), "error": null, "incomplete_details": null,
        "instructions": fields.instructions, "max_output_tokens": fields.max_output_tokens, "model": model,
        "output": [], "parallel_tool_calls": fields.parallel_tool_calls.unwrap_or(true),
        "previous_response_id": fields.previous_response_id, "reasoning": {"effort": fields.effort(), "summary": null},
        "store": fields.store.unwrap_or(true), "temperature": fields.temperature,
        "text": {"format": format.unwrap_or_else(|| json!({"type": "text"}))},
        "tool_choice": fields.tool_choice.clone().unwrap_or_else(|| Value::from("auto")),
        "tools": fields.tools.clone().unwrap_or_default(), "top_p": fields.top_p, "truncation": "disabled",
        "usage": null, "metadata": fields.metadata.clone().unwrap_or_default(),
    })
}

/// A response that is being made.
struct Run {
    app: Arc<App>,
    id: String,
    head: Value,
    messages: Vec<Value>,
    keeps: bool,
    answer: ChatAnswer,
    output: Output,
    reasoning_tokens: usize,
    finish: Option<&'static str>,
}

impl Run {
    /// What the next token brings, as events; `None` when the answer is complete.
    async fn next(&mut self) -> Option<Result<Vec<Event>, ApiError>> {
        let (parts, common) = match self.answer.next().await? {
            Ok(next) => next,
            Err(error) => return Some(Err(error)),
        };
        let thinks = parts.iter().any(|part| matches!(part, Part::Reasoning(_)));
        self.reasoning_tokens += usize::from(thinks);
        let mut events = Vec::new();
        for part in parts {
            let call_id = || self.answer.call_id();
            self.output.push(part, call_id, common.logprobs.as_ref(), &mut events);
        }
        if let Some(finish) = common.finish_reason {
            self.output.finish(finish != "length", &mut events);
            self.finish = Some(finish);
        }
        Some(Ok(events))
    }

    /// The response as it is now, complete or not.
    fn response(&self) -> Value {
        let mut response = self.head.clone();
        response["output"] = Value::from(self.output.items());
        if let Some(finish) = self.finish {
            let usage = self.answer.usage();
            response["status"] = Value::from(if finish == "length" { "incomplete" } else { "completed" });
            if finish == "length" {
                response["incomplete_details"] = json!({"reason": "max_output_tokens"});
            }
            response["usage"] = json!({
                "input_tokens": usage.prompt_tokens(), "input_tokens_details": {"cached_tokens": usage.cached_tokens()},
                "output_tokens": usage.completion_tokens(),
                "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
                "total_tokens": usage.prompt_tokens() + usage.completion_tokens()});
        }
        response
    }

    fn to_store(&self) -> Stored {
        let mut messages = self.messages.clone();
        messages.push(self.output.message());
        Stored { id: self.id.clone(), response: self.response(), messages, running: None }
    }

    /// Keeps the complete response, if it is to be kept.
    fn keep(&self) {
        if self.keeps {
            self.app.responses().put(self.to_store());
        }
    }

    async fn whole(mut self) -> Result<Value, ApiError> {
        while let Some(events) = self.next().await {
            events?;
        }
        self.keep();
        Ok(self.response())
    }

    /// Goes on by itself; the response at its beginning.
    fn detach(mut self) -> Value {
        let (app, id, response) = (Arc::clone(&self.app), self.id.clone(), self.response());
        let begin = Stored { id, response: response.clone(), messages: Vec::new(), running: None };
        // It is there before it can end.
        app.responses().put(begin.clone());
        let (known, is_known) = oneshot::channel::<()>();
        let task = tokio::spawn(async move {
            // The store has to know whom to stop first. An error is the other end dropped, which it is only then.
            let _ = is_known.await;
            let mut failure = None;
            while let Some(events) = self.next().await {
                failure = failure.or(events.err());
            }
            let mut stored = self.to_store();
            if let Some(error) = failure {
                stored.response["status"] = Value::from("failed");
                stored.response["error"] = json!({"code": "server_error", "message": error.to_string()});
            }
            self.app.responses().finish(stored);
        });
        app.responses().set_running(&begin.id, task.abort_handle());
        drop(known);
        response
    }

    fn stream(self) -> Response {
        let first = |run: &Self| {
            let response = json!({"response": run.response()});
            vec![("response.created", response.clone()), ("response.in_progress", response)]
        };
        let begun = first(&self);
        let events = stream::unfold(Some(self), |run| async move {
            let mut run = run?;
            match run.next().await {
                Some(Ok(events)) => Some((events, Some(run))),
                Some(Err(error)) => {
                    let mut response = run.response();
                    response["status"] = Value::from("failed");
                    response["error"] = json!({"code": "server_error", "message": error.to_string()});
                    Some((vec![("response.failed", json!({"response": response}))], None))
                }
                None => {
                    run.keep();
                    let name = if run.finish == Some("length") {
                        "response.incomplete"
                    } else {
                        "response.completed"
                    };
                    Some((vec![(name, json!({"response": run.response()}))], None))
                }
            }
        });
        let events = stream::iter([begun]).chain(events).flat_map(stream::iter).enumerate();
        let events = events.map(|(number, (name, mut fields))| {
            fields["type"] = Value::from(name);
            fields["sequence_number"] = Value::from(number);
            Ok::<_, Infallible>(SseEvent::default().event(name).data(fields.to_string()))
        });
        Sse::new(events).keep_alive(super::sse::keep_alive()).into_response()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use utoipa::PartialSchema;

    use super::*;

    /// The fields that a type's schema has.
    fn documented<T: PartialSchema>() -> BTreeSet<String> {
        let schema = serde_json::to_value(T::schema()).unwrap();
        schema["properties"].as_object().unwrap().keys().cloned().collect()
    }

    fn fields(value: &Value) -> BTreeSet<String> {
        value.as_object().unwrap().keys().cloned().collect()
    }

    #[test]
    fn the_document_has_the_fields_that_are_sent() {
        let response = head("resp_1", "m", &ResponseFields::default());
        assert_eq!(fields(&response), documented::<ResponseObject>());
    }
}

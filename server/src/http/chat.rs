//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures::stream;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::App;
use super::chat_messages::{ChatPromptFields, check_messages};
use super::check::{self, require};
use super::error::ApiError;
use super::generation::{Delta, Generation, Output, StopReason};
use super::json::JsonBody;
use super::logprobs::{ChatLogprobs, PromptLogprobs, TokenNames, prompt_logprobs};
use super::request_id::RequestId;
use super::sampling::{SamplingFields, SamplingPlan};
use super::unsupported;
use super::usage::{StreamFields, Streaming, Usage};
use crate::engine::GenerateRequest;
use crate::model::ServedModel;

const ROLE: &str = "assistant";

/// The fields that only chats have, besides those that make the prompt.
#[derive(Debug, Deserialize)]
struct ChatFields {
    model: Option<String>,
    messages: Vec<Map<String, Value>>,
    #[serde(default, deserialize_with = "super::integer::optional")]
    max_tokens: Option<usize>,
    #[serde(default, deserialize_with = "super::integer::optional")]
    max_completion_tokens: Option<usize>,
    logprobs: Option<bool>,
    #[serde(default, deserialize_with = "super::integer::optional")]
    top_logprobs: Option<i64>,
    request_id: Option<String>,
}

#[derive(Debug, Serialize)]
struct ChatResponse<C> {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    choices: Vec<C>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
}

/// A whole answer.
#[derive(Debug, Serialize)]
struct Choice {
    index: usize,
    message: Message,
    #[serde(flatten)]
    part: Part,
}

#[derive(Debug, Serialize)]
struct Message {
    role: &'static str,
    content: String,
    refusal: Option<String>,
}

/// A part of an answer, as a stream sends it.
#[derive(Debug, Serialize)]
struct ChunkChoice {
    index: usize,
    delta: MessageDelta,
    #[serde(flatten)]
    part: Part,
}

#[derive(Debug, Serialize)]
struct MessageDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    content: String,
}

/// What a whole answer and a part of one have in common.
#[derive(Debug, Default, Serialize)]
struct Part {
    #[serde(skip)]
    content: String,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

/// `POST /v1/chat/completions`: answers a conversation.
pub(super) async fn chat(
    State(app): State<Arc<App>>,
    request_id: RequestId,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let model = Arc::clone(app.model()?);
    let fields: ChatFields = body.read()?;
    request_id.adopt(fields.request_id.as_deref());
    unsupported::check_chat(&body)?;
    let served_name = model.resolve_name(fields.model.as_deref())?.to_owned();
    let plan = body.read::<SamplingFields>()?.plan(model.facts())?;
    let streaming = body.read::<StreamFields>()?.plan()?;
    let prompt_fields: ChatPromptFields = body.read()?;
    let whole = plan.prompt_logprobs.is_none() || streaming.is_none();
    require("prompt_logprobs", whole, "absent in a stream")?;
    let wanted = fields.logprobs.unwrap_or(false);
    require(
        "top_logprobs",
        wanted || fields.top_logprobs.unwrap_or(0) == 0,
        "absent without logprobs: true",
    )?;
    let top_logprobs = check::logprobs("top_logprobs", fields.top_logprobs.unwrap_or(0))?;
    require("max_completion_tokens", fields.max_completion_tokens != Some(0), "at least 1")?;
    require("max_tokens", fields.max_tokens != Some(0), "at least 1")?;
    let max_tokens = fields.max_completion_tokens.or(fields.max_tokens);

    check_messages(&fields.messages)?;
    let (tokenizing, messages, truncate) = (Arc::clone(&model), fields.messages, plan.truncate_prompt);
    let mut prompt = app
        .off_the_reactor(move || {
            let limited = truncate.is_none().then_some("messages");
            prompt_fields.prompt(&tokenizing, &messages, limited)
        })
        .await?;
    prompt.drain(..truncate.map_or(0, |keep| prompt.len().saturating_sub(keep)));

    let id = format!("chatcmpl-{request_id}");
    model.require_capacity(1, plan.n)?;
    let stop = plan.stop_for("messages", prompt.len(), max_tokens, model.max_model_len())?;
    let requests = (0..plan.n).map(|index| GenerateRequest {
        id: format!("{id}-{index}"),
        prompt: prompt.clone(),
        sampling: plan.sampling_of(index),
        stop: stop.clone(),
        scheduling: plan.scheduling.clone(),
        logprobs: wanted.then_some(top_logprobs),
        prompt_logprobs: plan.prompt_logprobs,
    });
    let generation = Generation::start(&model, app.telemetry(), &plan, requests.collect(), prompt.len())?;
    let answer = Answer { id, created: super::unix_time(), served_name, model, plan, prompt, generation };
    match streaming {
        None => answer.whole().await.map(|whole| Json(whole).into_response()),
        Some(streaming) => Ok(answer.stream(streaming)),
    }
}

/// A running chat.
struct Answer {
    id: String,
    created: u64,
    served_name: String,
    model: Arc<ServedModel>,
    plan: SamplingPlan,
    prompt: Vec<u32>,
    generation: Generation,
}

impl Answer {
    fn names(&self) -> TokenNames<'_> {
        TokenNames::new(self.model.tokenizer.as_ref(), self.plan.tokens_as_ids)
    }

    /// What a token adds to a sequence's answer.
    fn part(&self, delta: Delta) -> Part {
        let mut part = Part { content: delta.text, ..Part::default() };
        if let Some(token) = &delta.token {
            part.token_ids = self.plan.return_token_ids.then(|| vec![token.id]);
            part.logprobs = token.logprobs.as_ref().map(|logprobs| {
                let mut list = ChatLogprobs::default();
                list.push(token.id, logprobs, self.names());
                list
            });
        }
        if let Some(finish) = delta.finish {
            part.finish_reason = Some(finish.reason);
            part.stop_reason = finish.stop_reason;
        }
        part
    }

    async fn whole(mut self) -> Result<ChatResponse<Choice>, ApiError> {
        let mut parts: Vec<Part> = (0..self.plan.n).map(|_| Part::default()).collect();
        let mut scores = None;
        while let Some(next) = self.generation.next().await {
            match next? {
                (_, Output::Prompt(logprobs)) => scores = Some(logprobs),
                (index, Output::Delta(delta)) => parts[index].append(self.part(delta)),
            }
        }
        let choices = parts.into_iter().enumerate().map(|(index, mut part)| {
            let content = std::mem::take(&mut part.content);
            Choice { index, message: Message { role: ROLE, content, refusal: None }, part }
        });
        let mut response = self.response("chat.completion", choices.collect(), Some(self.generation.usage()));
        response.prompt_logprobs = scores.map(|scores| {
            let k = self.plan.prompt_logprobs.unwrap_or(0);
            prompt_logprobs(&self.prompt, &scores, k, self.names())
        });
        response.prompt_token_ids = self.plan.return_token_ids.then(|| self.prompt.clone());
        Ok(response)
    }

    fn stream(self, streaming: Streaming) -> Response {
        let begun = vec![false; self.plan.n];
        super::sse::respond(stream::unfold(Some((self, begun)), move |state| async move {
            let (mut answer, mut begun) = state?;
            match answer.generation.next().await {
                Some(Ok((index, output))) => {
                    // No scores of the prompt are asked for in a stream.
                    let delta = if let Output::Delta(delta) = output { delta } else { Delta::default() };
                    let first = !std::mem::replace(&mut begun[index], true);
                    let chunk = answer.chunk(index, first, delta, streaming);
                    Some((Ok(chunk), Some((answer, begun))))
                }
                Some(Err(error)) => Some((Err(error), None)),
                None if streaming.include_usage => {
                    let usage = Some(answer.generation.usage());
                    Some((Ok(answer.response(CHUNK, Vec::new(), usage)), None))
                }
                None => None,
            }
        }))
    }

    /// An event of a stream; the first of a choice has the role.
    fn chunk(
        &self,
        index: usize,
        first: bool,
        delta: Delta,
        streaming: Streaming,
    ) -> ChatResponse<ChunkChoice> {
        let mut part = self.part(delta);
        let content = std::mem::take(&mut part.content);
        let delta = MessageDelta { role: first.then_some(ROLE), content };
        let usage = streaming.continuous_usage.then(|| self.generation.usage());
        let mut response = self.response(CHUNK, vec![ChunkChoice { index, delta, part }], usage);
        response.prompt_token_ids = (first && self.plan.return_token_ids).then(|| self.prompt.clone());
        response
    }

    fn response<C>(&self, object: &'static str, choices: Vec<C>, usage: Option<Usage>) -> ChatResponse<C> {
        ChatResponse {
            id: self.id.clone(),
            object,
            created: self.created,
            model: self.served_name.clone(),
            choices,
            usage,
            prompt_logprobs: None,
            prompt_token_ids: None,
        }
    }
}

const CHUNK: &str = "chat.completion.chunk";

impl Part {
    /// Adds the part that follows.
    fn append(&mut self, next: Self) {
        self.content.push_str(&next.content);
        match (&mut self.logprobs, next.logprobs) {
            (Some(list), Some(next)) => list.append(next),
            (list @ None, next) => *list = next,
            (Some(_), None) => {}
        }
        self.token_ids = match (self.token_ids.take(), next.token_ids) {
            (Some(ids), Some(next)) => Some([ids, next].concat()),
            (ids, next) => ids.or(next),
        };
        self.finish_reason = next.finish_reason;
        self.stop_reason = next.stop_reason;
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_of_the_wrong_type_are_named() {
        for (field, value) in [("logprobs", json!(1)), ("messages", json!("hi")), ("max_tokens", json!(-1))] {
            let mut body = json!({"messages": []});
            body[field] = value;
            let body = JsonBody::from_bytes(body.to_string().as_bytes()).unwrap();
            let error = body.read::<ChatFields>().unwrap_err();
            assert!(matches!(&error, ApiError::BadRequest { param: Some(p), .. } if p == field), "{error:?}");
        }
    }

    #[test]
    fn a_chunk_has_a_delta_and_an_answer_a_message() {
        let part = Part { finish_reason: Some("stop"), ..Part::default() };
        let chunk = ChunkChoice { index: 0, delta: MessageDelta { role: None, content: "a".into() }, part };
        let expected = json!({"index": 0, "delta": {"content": "a"}, "logprobs": null, "finish_reason": "stop",
            "stop_reason": null});
        assert_eq!(serde_json::to_value(chunk).unwrap(), expected);
    }

    #[test]
    fn parts_add_up() {
        let mut whole = Part::default();
        whole.append(Part { content: "a".into(), token_ids: Some(vec![1]), ..Part::default() });
        whole.append(Part {
            content: "b".into(),
            token_ids: Some(vec![2]),
            finish_reason: Some("length"),
            ..Part::default()
        });
        assert_eq!((whole.content.as_str(), whole.finish_reason), ("ab", Some("length")));
        assert_eq!(whole.token_ids, Some(vec![1, 2]));
    }
}

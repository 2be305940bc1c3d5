//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures::stream;
use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::App;
use super::chat_answer::{ChatResponse, Choice, ChunkChoice, Common, MessageBuilder, MessageDelta};
use super::chat_messages::{ChatPrompt, ChatPromptFields, MessageSchema, check_messages};
use super::check::{self, require};
use super::error::ApiError;
use super::generation::{Delta, Generation, Output};
use super::json::JsonBody;
use super::openapi::GenerationErrors;
use super::logprobs::{ChatLogprobs, TokenNames, prompt_logprobs};
use super::request_id::RequestId;
use super::sampling::{SamplingFields, SamplingPlan};
use super::structured_output::{StructuredOutput, StructuredOutputFields};
use super::tools::{ToolFields, ToolPlan};
use super::unsupported;
use super::usage::{StreamFields, Streaming, Usage};
use crate::answer::{AnswerParser, Part, ToolFormat};
use crate::engine::GenerateRequest;
use crate::grammar::{GrammarOptions, ReasoningTokens};
use crate::model::ServedModel;

/// The fields that only chats have, besides those that make the prompt.
#[derive(Debug, Deserialize, ToSchema)]
struct ChatFields {
    /// A name of the served model [default: its first].
    model: Option<String>,
    /// The conversation so far.
    #[schema(value_type = Vec<MessageSchema>, min_items = 1)]
    messages: Vec<Map<String, Value>>,
    /// The former name of `max_completion_tokens`, which wins.
    #[serde(default, deserialize_with = "super::integer::optional")]
    #[schema(minimum = 1)]
    max_tokens: Option<usize>,
    /// Most tokens of the answer [default: what the context holds].
    #[serde(default, deserialize_with = "super::integer::optional")]
    #[schema(minimum = 1)]
    max_completion_tokens: Option<usize>,
    /// Whether the answer has the log-probabilities of its tokens [default: false].
    logprobs: Option<bool>,
    /// Alternatives for each token; needs `logprobs` [default: 0].
    #[serde(default, deserialize_with = "super::integer::optional")]
    #[schema(minimum = 0, maximum = 20)]
    top_logprobs: Option<i64>,
    /// The answer's id, as in the header `X-Request-Id`, which wins.
    request_id: Option<String>,
    /// Whether the answer has what the model thought [default: true].
    include_reasoning: Option<bool>,
}

/// The body of a chat; unknown fields are accepted.
#[derive(ToSchema)]
#[schema(example = json!({"messages": [{"role": "user", "content": "What is 2 + 2?"}], "max_completion_tokens": 16}))]
#[expect(dead_code, reason = "fields are read one struct at a time; this is their sum, for the document")]
pub(super) struct ChatRequest {
    #[serde(flatten)]
    fields: ChatFields,
    #[serde(flatten)]
    prompt: ChatPromptFields,
    #[serde(flatten)]
    sampling: SamplingFields,
    #[serde(flatten)]
    streaming: StreamFields,
    #[serde(flatten)]
    structured: StructuredOutputFields,
    #[serde(flatten)]
    tools: ToolFields,
}

/// `POST /v1/chat/completions`: answers a conversation.
#[utoipa::path(
    post,
    path = "/v1/chat/completions",
    operation_id = "createChatCompletion",
    request_body = ChatRequest,
    responses(
        (
            status = 200,
            description = "The answer; with `stream: true` events of `ChatResponse_ChunkChoice`, then `[DONE]`.",
            content((ChatResponse<Choice> = "application/json"), (String = "text/event-stream"))
        ),
        GenerationErrors
    )
)]
pub(super) async fn chat(
    State(app): State<Arc<App>>,
    request_id: RequestId,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let chat = Chat::read(&app, &request_id, &body)?;
    let streaming = body.read::<StreamFields>()?.plan()?;
    let whole = chat.plan.prompt_logprobs.is_none() || streaming.is_none();
    require("prompt_logprobs", whole, "absent in a stream")?;
    let answer = chat.start(&app, format!("chatcmpl-{request_id}")).await?;
    match streaming {
        None => answer.whole().await.map(|whole| Json(whole).into_response()),
        Some(streaming) => Ok(answer.stream(streaming)),
    }
}

/// A checked request.
pub(super) struct Chat {
    request_id: RequestId,
    model: Arc<ServedModel>,
    served_name: String,
    messages: Vec<Map<String, Value>>,
    prompt: ChatPromptFields,
    plan: SamplingPlan,
    max_tokens: Option<usize>,
    logprobs: Option<usize>,
    structured: Option<StructuredOutput>,
    tools: Option<ToolPlan>,
    include_reasoning: bool,
}

impl Chat {
    /// Reads and checks the fields.
    pub(super) fn read(app: &App, request_id: &RequestId, body: &JsonBody) -> Result<Self, ApiError> {
        let model = Arc::clone(app.model()?);
        let fields: ChatFields = body.read()?;
        request_id.adopt(fields.request_id.as_deref());
        unsupported::check_chat(body)?;
        let served_name = model.resolve_name(fields.model.as_deref())?.to_owned();
        let mut plan = body.read::<SamplingFields>()?.plan(model.facts())?;
        let structured = StructuredOutput::read(body)?;
        let tools = ToolPlan::read(body, model.tool_format)?;
        if let Some(structured) = &structured
            && tools.as_ref().is_some_and(ToolPlan::forces_a_call)
        {
            let message =
                format!("{} and a tool_choice that forces a call exclude each other", structured.field);
            return Err(ApiError::field(structured.field, message));
        }
        // Markers of calls may be special tokens.
        plan.skip_special_tokens &= tools.is_none();
        let wanted = fields.logprobs.unwrap_or(false);
        require(
            "top_logprobs",
            wanted || fields.top_logprobs.unwrap_or(0) == 0,
            "absent without logprobs: true",
        )?;
        let top_logprobs = check::logprobs("top_logprobs", fields.top_logprobs.unwrap_or(0))?;
        require("max_completion_tokens", fields.max_completion_tokens != Some(0), "at least 1")?;
        require("max_tokens", fields.max_tokens != Some(0), "at least 1")?;
        check_messages(&fields.messages)?;
        Ok(Self {
            request_id: request_id.clone(),
            model,
            served_name,
            messages: fields.messages,
            prompt: body.read()?,
            plan,
            max_tokens: fields.max_completion_tokens.or(fields.max_tokens),
            logprobs: wanted.then_some(top_logprobs),
            structured,
            tools,
            include_reasoning: fields.include_reasoning.unwrap_or(true),
        })
    }

    /// The name by which the model was asked for.
    pub(super) fn served_name(&self) -> &str {
        &self.served_name
    }

    /// Makes the prompt and the grammar, and submits the sequences.
    pub(super) async fn start(self, app: &App, id: String) -> Result<ChatAnswer, ApiError> {
        let Self { model, prompt, messages, mut plan, structured, tools, .. } = self;
        model.require_capacity("messages", 1, plan.n)?;
        let (preparing, truncate, ignore_eos) = (Arc::clone(&model), plan.truncate_prompt, plan.ignore_eos);
        let (mut prompt, grammar, tools) = app
            .off_the_reactor(move || {
                let limited = truncate.is_none().then_some("messages");
                let prompt = prompt.prompt(&preparing, messages, limited)?;
                let reasoning = reasoning_tokens(&preparing, &prompt);
                let options = GrammarOptions { ignore_eos, reasoning };
                let grammar = match &tools {
                    Some(tools) => tools.compile(&preparing, structured, options)?,
                    None => structured.map(|asked| asked.compile(&preparing, options)).transpose()?,
                };
                Ok((prompt, grammar, tools))
            })
            .await?;
        plan.sampling.grammar = grammar;
        prompt.ids.drain(..truncate.map_or(0, |keep| prompt.ids.len().saturating_sub(keep)));
        let stop = plan.stop_for("messages", prompt.ids.len(), self.max_tokens, model.max_model_len())?;
        let requests = (0..plan.n).map(|index| GenerateRequest {
            id: format!("{id}-{index}"),
            prompt: prompt.ids.clone(),
            sampling: plan.sampling_of(index),
            stop: stop.clone(),
            scheduling: plan.scheduling.clone(),
            logprobs: self.logprobs,
            prompt_logprobs: plan.prompt_logprobs,
            pooling: None,
        });
        let generation =
            Generation::start(&model, app.telemetry(), &plan, requests.collect(), prompt.ids.len())?
                .recorded(&self.request_id);
        let parser = || {
            let mut parser = AnswerParser::new();
            if model.reasons {
                parser = parser.with_reasoning(prompt.begins_reasoning);
            }
            match tools.as_ref().and_then(ToolPlan::parser) {
                Some(calls) => parser.with_tools(calls),
                None => parser,
            }
        };
        Ok(ChatAnswer {
            id,
            created: super::unix_time(),
            served_name: self.served_name,
            parsers: (0..plan.n).map(|_| parser()).collect(),
            called: vec![false; plan.n],
            tool_format: tools.map(|tools| tools.format),
            include_reasoning: self.include_reasoning,
            model,
            plan,
            prompt: prompt.ids,
            generation,
        })
    }
}

/// The tokens around what the model thinks, if it may think before its answer.
fn reasoning_tokens(model: &ServedModel, prompt: &ChatPrompt) -> Option<ReasoningTokens> {
    let tokenizer = model.tokenizer.as_deref().filter(|_| model.reasons)?;
    let (begin, end) = (tokenizer.token_id("<think>")?, tokenizer.token_id("</think>")?);
    Some(ReasoningTokens { begin, end, begun: prompt.begins_reasoning })
}

/// A running chat.
pub(super) struct ChatAnswer {
    id: String,
    created: u64,
    served_name: String,
    model: Arc<ServedModel>,
    plan: SamplingPlan,
    prompt: Vec<u32>,
    generation: Generation,
    /// Of each choice.
    parsers: Vec<AnswerParser>,
    /// Whether each choice has called a tool.
    called: Vec<bool>,
    tool_format: Option<ToolFormat>,
    include_reasoning: bool,
}

impl ChatAnswer {
    fn names(&self) -> TokenNames<'_> {
        TokenNames::new(self.model.tokenizer.as_deref(), self.plan.tokens_as_ids)
    }

    /// Takes apart what a token adds to a choice.
    fn parts(&mut self, index: usize, delta: Delta) -> (Vec<Part>, Common) {
        let mut common = Common::default();
        if let Some(token) = &delta.token {
            common.token_ids = self.plan.return_token_ids.then(|| vec![token.id]);
            common.logprobs = token.logprobs.as_ref().map(|logprobs| {
                let mut list = ChatLogprobs::default();
                list.push(token.id, logprobs, self.names());
                list
            });
        }
        let mut parts = self.parsers[index].push(&delta.text);
        if let Some(finish) = delta.finish {
            parts.extend(self.parsers[index].finish());
            common.finish_reason = Some(finish.reason);
            common.stop_reason = finish.stop_reason;
        }
        self.called[index] |= parts.iter().any(|part| matches!(part, Part::Call { .. }));
        if self.called[index] && common.finish_reason == Some("stop") {
            common.finish_reason = Some("tool_calls");
        }
        parts.retain(|part| self.include_reasoning || !matches!(part, Part::Reasoning(_)));
        (parts, common)
    }

    /// What the next token adds, for an answer of one choice; `None` when it is complete.
    pub(super) async fn next(&mut self) -> Option<Result<(Vec<Part>, Common), ApiError>> {
        loop {
            match self.generation.next().await? {
                Ok((_, Output::Prompt(_))) => {}
                Ok((index, Output::Delta(delta))) => return Some(Ok(self.parts(index, delta))),
                Err(error) => return Some(Err(error)),
            }
        }
    }

    /// Token counts so far.
    pub(super) fn usage(&self) -> Usage {
        self.generation.usage()
    }

    /// An id for a call of a tool.
    pub(super) fn call_id(&self) -> String {
        self.tool_format.unwrap_or(ToolFormat::Hermes).call_id()
    }

    async fn whole(mut self) -> Result<ChatResponse<Choice>, ApiError> {
        let mut choices: Vec<(MessageBuilder, Common)> =
            (0..self.plan.n).map(|_| Default::default()).collect();
        let mut scores = None;
        while let Some(next) = self.generation.next().await {
            match next? {
                (_, Output::Prompt(logprobs)) => scores = Some(logprobs),
                (index, Output::Delta(delta)) => {
                    let (parts, common) = self.parts(index, delta);
                    let (message, before) = &mut choices[index];
                    parts.into_iter().for_each(|part| message.push(part, self.tool_format));
                    before.append(common);
                }
            }
        }
        let choices = choices.into_iter().enumerate().map(|(index, (message, common))| Choice {
            index,
            message: message.finish(),
            common,
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
        &mut self,
        index: usize,
        first: bool,
        delta: Delta,
        streaming: Streaming,
    ) -> ChatResponse<ChunkChoice> {
        let (parts, common) = self.parts(index, delta);
        let delta = MessageDelta::new(first, parts, self.tool_format);
        let usage = streaming.continuous_usage.then(|| self.generation.usage());
        let mut response = self.response(CHUNK, vec![ChunkChoice { index, delta, common }], usage);
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
}

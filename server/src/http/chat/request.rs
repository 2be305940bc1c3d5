//! A request for a chat: its fields, checked, and what the engine is asked for.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::messages::{ChatPrompt, ChatPromptFields, MessageSchema, check_messages};
use super::running::ChatAnswer;
use crate::answer::AnswerParser;
use crate::engine::GenerateRequest;
use crate::grammar::{GrammarOptions, ReasoningTokens};
use crate::http::App;
use crate::http::check::{self, require};
use crate::http::error::ApiError;
use crate::http::generation::Generation;
use crate::http::json::JsonBody;
use crate::http::request_id::RequestId;
use crate::http::sampling::{SamplingFields, SamplingPlan};
use crate::http::structured_output::{StructuredOutput, StructuredOutputFields};
use crate::http::tools::{ToolFields, ToolPlan};
use crate::http::unsupported;
use crate::http::usage::StreamFields;
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
    #[serde(default, deserialize_with = "crate::http::integer::optional")]
    #[schema(minimum = 1)]
    max_tokens: Option<usize>,
    /// Most tokens of the answer [default: what the context holds].
    #[serde(default, deserialize_with = "crate::http::integer::optional")]
    #[schema(minimum = 1)]
    max_completion_tokens: Option<usize>,
    /// Whether the answer has the log-probabilities of its tokens [default: false].
    logprobs: Option<bool>,
    /// Alternatives for each token; needs `logprobs` [default: 0].
    #[serde(default, deserialize_with = "crate::http::integer::optional")]
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
pub(in crate::http) struct ChatRequest {
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

/// A checked request.
pub(in crate::http) struct Chat {
    request_id: RequestId,
    model: Arc<ServedModel>,
    served_name: String,
    messages: Vec<Map<String, Value>>,
    prompt: ChatPromptFields,
    pub(super) plan: SamplingPlan,
    max_tokens: Option<usize>,
    logprobs: Option<usize>,
    structured: Option<StructuredOutput>,
    tools: Option<ToolPlan>,
    include_reasoning: bool,
}

impl Chat {
    /// Reads and checks the fields.
    pub(in crate::http) fn read(
        app: &App,
        request_id: &RequestId,
        body: &JsonBody,
    ) -> Result<Self, ApiError> {
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
    pub(in crate::http) fn served_name(&self) -> &str {
        &self.served_name
    }

    /// Makes the prompt and the grammar, and submits the sequences.
    pub(in crate::http) async fn start(self, app: &App, id: String) -> Result<ChatAnswer, ApiError> {
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
            created: crate::http::unix_time(),
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

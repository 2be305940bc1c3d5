//! A request for a completion: its fields, checked, and what the engine is asked for.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use crate::engine::GenerateRequest;
use crate::grammar::GrammarOptions;
use crate::http::App;
use crate::http::check::{self, require};
use crate::http::error::ApiError;
use crate::http::logprobs::TokenNames;
use crate::http::prompt::{Prompt, PromptOptions, PromptSchema, parse_prompts};
use crate::http::sampling::{SamplingFields, SamplingPlan};
use crate::http::structured_output::{StructuredOutput, StructuredOutputFields};
use crate::http::usage::{StreamFields, Streaming};
use crate::model::ServedModel;

const FIELD: &str = "prompt";

/// vLLM's and OpenAI's default.
const DEFAULT_MAX_TOKENS: usize = 16;

/// The fields that only completions have.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct CompletionFields {
    /// A name of the served model [default: its first].
    pub(super) model: Option<String>,
    /// Most tokens of the answer; 0 only with `echo` [default: 16].
    #[serde(default, deserialize_with = "crate::http::integer::optional")]
    max_tokens: Option<usize>,
    /// Whether the text begins with the prompt, and the log-probabilities with those of its tokens [default: false].
    echo: Option<bool>,
    /// Log-probabilities of the tokens, with so many alternatives.
    #[serde(default, deserialize_with = "crate::http::integer::optional")]
    #[schema(minimum = 0, maximum = 20)]
    logprobs: Option<i64>,
    /// Whether the tokenizer adds special tokens to a text [default: true].
    add_special_tokens: Option<bool>,
    /// The answer's id, as in the header `X-Request-Id`, which wins.
    pub(super) request_id: Option<String>,
}

/// The body of a completion; unknown fields are accepted.
#[derive(ToSchema)]
#[schema(example = json!({"prompt": "Once upon a time", "max_tokens": 16, "temperature": 0}))]
#[expect(dead_code, reason = "fields are read one struct at a time; this is their sum, for the document")]
pub(in crate::http) struct CompletionRequest {
    prompt: PromptSchema,
    #[serde(flatten)]
    fields: CompletionFields,
    #[serde(flatten)]
    sampling: SamplingFields,
    #[serde(flatten)]
    streaming: StreamFields,
    #[serde(flatten)]
    structured: StructuredOutputFields,
}

/// A checked request.
pub(super) struct Completion {
    pub(super) model: Arc<ServedModel>,
    pub(super) prompts: Vec<Prompt>,
    pub(super) plan: SamplingPlan,
    pub(super) max_tokens: usize,
    pub(super) echo: bool,
    pub(super) logprobs: Option<usize>,
}

impl Completion {
    pub(super) async fn prepare(
        app: &App,
        model: &Arc<ServedModel>,
        fields: &CompletionFields,
        prompt: Value,
        mut plan: SamplingPlan,
        structured: Option<StructuredOutput>,
        streaming: Option<Streaming>,
    ) -> Result<Self, ApiError> {
        let echo = fields.echo.unwrap_or(false);
        let max_tokens = fields.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS);
        require("max_tokens", max_tokens >= 1 || echo, "at least 1 (0 only with echo)")?;
        let logprobs = fields.logprobs.map(|k| check::logprobs("logprobs", k)).transpose()?;
        let whole = plan.prompt_logprobs.is_none() || streaming.is_none();
        require("prompt_logprobs", whole, "absent in a stream; echo with logprobs is there for that")?;
        let options = PromptOptions {
            add_special_tokens: fields.add_special_tokens.unwrap_or(true),
            truncate: plan.truncate_prompt,
            echo,
            field: FIELD,
        };
        let preparing = Arc::clone(model);
        let ignore_eos = plan.ignore_eos;
        let prompts;
        (prompts, plan.sampling.grammar) = app
            .off_the_reactor(move || {
                let given = parse_prompts(prompt, FIELD, preparing.longest_prompt(options.truncate))?;
                let prompts: Result<Vec<_>, _> =
                    given.into_iter().map(|prompt| prompt.prepare(&preparing, options)).collect();
                let grammar = GrammarOptions { ignore_eos, reasoning: None };
                let grammar = structured.map(|asked| asked.compile(&preparing, grammar)).transpose()?;
                Ok((prompts?, grammar))
            })
            .await?;
        Ok(Self { model: Arc::clone(model), prompts, plan, max_tokens, echo, logprobs })
    }

    /// A request per sequence: `n` for the first prompt, then `n` for the second, …
    pub(super) fn requests(&self, id: &str) -> Result<Vec<GenerateRequest>, ApiError> {
        let n = self.plan.n;
        self.model.require_capacity(FIELD, self.prompts.len(), n)?;
        let max_model_len = self.model.max_model_len();
        let prompt_logprobs = self.plan.prompt_logprobs.max(self.logprobs.filter(|_| self.echo));
        let mut requests = Vec::with_capacity(self.prompts.len() * n);
        for prompt in &self.prompts {
            let stop =
                self.plan.stop_for("prompt", prompt.ids.len(), Some(self.max_tokens), max_model_len)?;
            let first = requests.len();
            requests.extend((0..n).map(|index| GenerateRequest {
                id: format!("{id}-{}", first + index),
                prompt: prompt.ids.clone(),
                sampling: self.plan.sampling_of(index),
                stop: stop.clone(),
                scheduling: self.plan.scheduling.clone(),
                logprobs: self.logprobs,
                prompt_logprobs,
                pooling: None,
            }));
        }
        Ok(requests)
    }

    pub(super) fn prompt_tokens(&self) -> usize {
        self.prompts.iter().map(|prompt| prompt.ids.len()).sum()
    }

    pub(super) fn prompt(&self, index: usize) -> &Prompt {
        &self.prompts[index / self.plan.n]
    }

    pub(super) fn names(&self) -> TokenNames<'_> {
        TokenNames::new(self.model.tokenizer.as_deref(), self.plan.tokens_as_ids)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::http::json::JsonBody;

    #[test]
    fn fields_of_the_wrong_type_are_named() {
        for (field, value) in [("max_tokens", json!(-1)), ("echo", json!("yes")), ("logprobs", json!(true))] {
            let mut body = json!({"prompt": "a"});
            body[field] = value;
            let body = JsonBody::from_bytes(body.to_string().as_bytes()).unwrap();
            let error = body.read::<CompletionFields>().unwrap_err();
            assert!(matches!(&error, ApiError::BadRequest { param: Some(p), .. } if p == field), "{error:?}");
        }
    }
}

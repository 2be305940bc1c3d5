//! `POST /v1/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures::stream;
use kernels::TokenLogprobs;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::App;
use super::check::{self, require};
use super::error::ApiError;
use super::generation::{Delta, FinishReasonName, Generation, Output, StopReason};
use super::json::JsonBody;
use super::logprobs::{CompletionLogprobs, PromptLogprobs, RankedToken, TokenNames, prompt_logprobs};
use super::openapi::GenerationErrors;
use super::prompt::{Prompt, PromptOptions, PromptSchema, parse_prompts};
use super::request_id::RequestId;
use super::sampling::{SamplingFields, SamplingPlan};
use super::structured_output::{StructuredOutput, StructuredOutputFields};
use super::unsupported;
use super::usage::{StreamFields, Streaming, Usage};
use crate::engine::GenerateRequest;
use crate::grammar::GrammarOptions;
use crate::model::ServedModel;

const FIELD: &str = "prompt";

/// vLLM's and OpenAI's default.
const DEFAULT_MAX_TOKENS: usize = 16;

/// The fields that only completions have.
#[derive(Debug, Deserialize, ToSchema)]
struct CompletionFields {
    /// A name of the served model [default: its first].
    model: Option<String>,
    /// Most tokens of the answer; 0 only with `echo` [default: 16].
    #[serde(default, deserialize_with = "super::integer::optional")]
    max_tokens: Option<usize>,
    /// Whether the text begins with the prompt, and the log-probabilities with those of its tokens [default: false].
    echo: Option<bool>,
    /// Log-probabilities of the tokens, with so many alternatives.
    #[serde(default, deserialize_with = "super::integer::optional")]
    #[schema(minimum = 0, maximum = 20)]
    logprobs: Option<i64>,
    /// Whether the tokenizer adds special tokens to a text [default: true].
    add_special_tokens: Option<bool>,
    /// The answer's id, as in the header `X-Request-Id`, which wins.
    request_id: Option<String>,
}

/// The body of a completion; unknown fields are accepted.
#[derive(ToSchema)]
#[schema(example = json!({"prompt": "Once upon a time", "max_tokens": 16, "temperature": 0}))]
#[expect(dead_code, reason = "fields are read one struct at a time; this is their sum, for the document")]
pub(super) struct CompletionRequest {
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

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct CompletionResponse {
    id: String,
    #[schema(example = "text_completion")]
    object: &'static str,
    /// Seconds since 1970.
    created: u64,
    model: String,
    choices: Vec<Choice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
}

/// One sequence's answer, or a part of it: a stream sends the parts that an answer is put together from.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
#[schema(as = CompletionChoice)]
struct Choice {
    index: usize,
    text: String,
    logprobs: Option<CompletionLogprobs>,
    #[schema(value_type = Option<FinishReasonName>)]
    finish_reason: Option<&'static str>,
    /// The stop string or token that ended the answer.
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Option<HashMap<String, RankedToken>>>>)]
    prompt_logprobs: Option<PromptLogprobs>,
}

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
            content((CompletionResponse = "application/json"), (String = "text/event-stream"))
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
    let fields: CompletionFields = body.read()?;
    request_id.adopt(fields.request_id.as_deref());
    unsupported::check_completion(&body)?;
    let served_name = model.resolve_name(fields.model.as_deref())?.to_owned();
    let plan = body.read::<SamplingFields>()?.plan(model.facts())?;
    let streaming = body.read::<StreamFields>()?.plan()?;
    let prompt = body.take("prompt");
    let structured = StructuredOutput::read(&body)?;
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

/// A checked request.
struct Completion {
    model: Arc<ServedModel>,
    prompts: Vec<Prompt>,
    plan: SamplingPlan,
    max_tokens: usize,
    echo: bool,
    logprobs: Option<usize>,
}

impl Completion {
    async fn prepare(
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
    fn requests(&self, id: &str) -> Result<Vec<GenerateRequest>, ApiError> {
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

    fn prompt_tokens(&self) -> usize {
        self.prompts.iter().map(|prompt| prompt.ids.len()).sum()
    }

    fn prompt(&self, index: usize) -> &Prompt {
        &self.prompts[index / self.plan.n]
    }

    fn names(&self) -> TokenNames<'_> {
        TokenNames::new(self.model.tokenizer.as_deref(), self.plan.tokens_as_ids)
    }

    /// What a sequence's answer begins with: the echoed prompt and what was asked about it.
    fn beginning(&self, index: usize, scores: Option<&[TokenLogprobs]>) -> Choice {
        let prompt = self.prompt(index);
        let mut choice = Choice { index, ..Choice::default() };
        if self.echo {
            choice.text.clone_from(&prompt.text);
        }
        if self.plan.return_token_ids {
            choice.prompt_token_ids = Some(prompt.ids.clone());
        }
        let Some(scores) = scores else { return choice };
        if let Some(k) = self.plan.prompt_logprobs {
            choice.prompt_logprobs = Some(prompt_logprobs(&prompt.ids, scores, k, self.names()));
        }
        if let Some(k) = self.logprobs.filter(|_| self.echo) {
            let mut list = CompletionLogprobs::default();
            // Nothing precedes the first token.
            let scores = std::iter::once(None).chain(scores.iter().map(Some));
            for ((&id, &offset), score) in prompt.ids.iter().zip(&prompt.offsets).zip(scores) {
                list.push(id, offset, score, k, self.names());
            }
            choice.logprobs = Some(list);
        }
        choice
    }

    /// What a token adds to a sequence's answer.
    fn part(&self, index: usize, delta: Delta) -> Choice {
        let mut choice = Choice { index, text: delta.text, ..Choice::default() };
        if let Some(token) = &delta.token {
            choice.token_ids = self.plan.return_token_ids.then(|| vec![token.id]);
            if let Some(logprobs) = &token.logprobs {
                let echoed = if self.echo { self.prompt(index).text.chars().count() } else { 0 };
                let mut list = CompletionLogprobs::default();
                let k = self.logprobs.unwrap_or(0);
                list.push(token.id, echoed + token.text_offset, Some(logprobs), k, self.names());
                choice.logprobs = Some(list);
            }
        }
        if let Some(finish) = delta.finish {
            choice.finish_reason = Some(finish.reason);
            choice.stop_reason = finish.stop_reason;
        }
        choice
    }
}

impl Choice {
    /// Adds the part that follows.
    fn append(&mut self, part: Self) {
        self.text.push_str(&part.text);
        match (&mut self.logprobs, part.logprobs) {
            (Some(list), Some(next)) => list.append(next),
            (list @ None, next) => *list = next,
            (Some(_), None) => {}
        }
        self.token_ids = match (self.token_ids.take(), part.token_ids) {
            (Some(ids), Some(next)) => Some([ids, next].concat()),
            (ids, next) => ids.or(next),
        };
        self.prompt_token_ids = self.prompt_token_ids.take().or(part.prompt_token_ids);
        self.prompt_logprobs = self.prompt_logprobs.take().or(part.prompt_logprobs);
        self.finish_reason = part.finish_reason;
        self.stop_reason = part.stop_reason;
    }
}

/// A running completion.
struct Answer {
    id: String,
    created: u64,
    model: String,
    completion: Completion,
    generation: Generation,
}

impl Answer {
    /// The next part of any choice; `begun` says which choices have begun.
    async fn next_part(&mut self, begun: &mut [bool]) -> Option<Result<Choice, ApiError>> {
        let (index, output) = match self.generation.next().await? {
            Ok(next) => next,
            Err(error) => return Some(Err(error)),
        };
        let first = !std::mem::replace(&mut begun[index], true);
        Some(Ok(match output {
            Output::Prompt(scores) => self.completion.beginning(index, Some(&scores)),
            Output::Delta(delta) if first => {
                let mut choice = self.completion.beginning(index, None);
                choice.append(self.completion.part(index, delta));
                choice
            }
            Output::Delta(delta) => self.completion.part(index, delta),
        }))
    }

    fn not_begun(&self) -> Vec<bool> {
        vec![false; self.completion.prompts.len() * self.completion.plan.n]
    }

    async fn whole(mut self) -> Result<CompletionResponse, ApiError> {
        let mut begun = self.not_begun();
        let new = |index| Choice { index, ..Choice::default() };
        let mut choices: Vec<Choice> = (0..begun.len()).map(new).collect();
        while let Some(part) = self.next_part(&mut begun).await {
            let part = part?;
            choices[part.index].append(part);
        }
        let usage = Some(self.generation.usage());
        Ok(self.response(choices, usage))
    }

    fn stream(self, streaming: Streaming) -> Response {
        let begun = self.not_begun();
        let state = Some((self, begun));
        super::sse::respond(stream::unfold(state, move |state| async move {
            let (mut answer, mut begun) = state?;
            match answer.next_part(&mut begun).await {
                Some(Ok(part)) => {
                    let usage = streaming.continuous_usage.then(|| answer.generation.usage());
                    Some((Ok(answer.response(vec![part], usage)), Some((answer, begun))))
                }
                Some(Err(error)) => Some((Err(error), None)),
                None if streaming.include_usage => {
                    let usage = Some(answer.generation.usage());
                    Some((Ok(answer.response(Vec::new(), usage)), None))
                }
                None => None,
            }
        }))
    }

    fn response(&self, choices: Vec<Choice>, usage: Option<Usage>) -> CompletionResponse {
        CompletionResponse {
            id: self.id.clone(),
            object: "text_completion",
            created: self.created,
            model: self.model.clone(),
            choices,
            usage,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

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

    #[test]
    fn parts_add_up() {
        let part =
            |text: &str, id| Choice { text: text.to_owned(), token_ids: Some(vec![id]), ..Choice::default() };
        let mut whole = Choice { index: 1, ..Choice::default() };
        whole.append(Choice { prompt_token_ids: Some(vec![9]), text: "p".to_owned(), ..Choice::default() });
        whole.append(part("a", 1));
        whole.append(Choice { finish_reason: Some("length"), ..part("b", 2) });
        let expected = json!({"index": 1, "text": "pab", "logprobs": null, "finish_reason": "length",
            "stop_reason": null, "token_ids": [1, 2], "prompt_token_ids": [9]});
        assert_eq!(serde_json::to_value(whole).unwrap(), expected);
    }
}

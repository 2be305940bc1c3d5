//! A running chat, and its answer: whole, or as a stream.

use std::sync::Arc;

use axum::response::Response;
use futures::stream;

use super::answer::{ChatResponse, Choice, ChunkChoice, Common, MessageBuilder, MessageDelta};
use crate::answer::{AnswerParser, Part, ToolFormat};
use crate::http::error::ApiError;
use crate::http::generation::{Delta, Generation, Output};
use crate::http::logprobs::{ChatLogprobs, TokenNames, prompt_logprobs};
use crate::http::sampling::SamplingPlan;
use crate::http::sse;
use crate::http::usage::{Streaming, Usage};
use crate::model::ServedModel;

const CHUNK: &str = "chat.completion.chunk";

/// A running chat.
pub(in crate::http) struct ChatAnswer {
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) served_name: String,
    pub(super) model: Arc<ServedModel>,
    pub(super) plan: SamplingPlan,
    pub(super) prompt: Vec<u32>,
    pub(super) generation: Generation,
    /// Of each choice.
    pub(super) parsers: Vec<AnswerParser>,
    /// Whether each choice has called a tool.
    pub(super) called: Vec<bool>,
    pub(super) tool_format: Option<ToolFormat>,
    pub(super) include_reasoning: bool,
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
    pub(in crate::http) async fn next(&mut self) -> Option<Result<(Vec<Part>, Common), ApiError>> {
        loop {
            match self.generation.next().await? {
                Ok((_, Output::Prompt(_))) => {}
                Ok((index, Output::Delta(delta))) => return Some(Ok(self.parts(index, delta))),
                Err(error) => return Some(Err(error)),
            }
        }
    }

    /// Token counts so far.
    pub(in crate::http) fn usage(&self) -> Usage {
        self.generation.usage()
    }

    /// An id for a call of a tool.
    pub(in crate::http) fn call_id(&self) -> String {
        self.tool_format.unwrap_or(ToolFormat::Hermes).call_id()
    }

    pub(super) async fn whole(mut self) -> Result<ChatResponse<Choice>, ApiError> {
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

    pub(super) fn stream(self, streaming: Streaming) -> Response {
        let begun = vec![false; self.plan.n];
        sse::respond(stream::unfold(Some((self, begun)), move |state| async move {
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

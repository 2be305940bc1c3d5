//! The answer to a completion: whole, or in the parts that a stream sends.

use axum::response::Response;
use futures::stream;
use kernels::TokenLogprobs;
use serde::Serialize;
use utoipa::ToSchema;

use super::request::Completion;
use crate::http::error::ApiError;
use crate::http::generation::{Delta, FinishReasonName, Generation, Output, StopReason};
use crate::http::logprobs::{CompletionLogprobs, PromptLogprobs, RankedToken, prompt_logprobs};
use crate::http::sse;
use crate::http::usage::{Streaming, Usage};

#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct CompletionResponse {
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
pub(super) struct Choice {
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

impl Completion {
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
pub(super) struct Answer {
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) completion: Completion,
    pub(super) generation: Generation,
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

    pub(super) async fn whole(mut self) -> Result<CompletionResponse, ApiError> {
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

    pub(super) fn stream(self, streaming: Streaming) -> Response {
        let begun = self.not_begun();
        let state = Some((self, begun));
        sse::respond(stream::unfold(state, move |state| async move {
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

//! From the engine's tokens to text: the running sequences of one request.

mod sequence;

use std::sync::Arc;

use futures::stream::{self, BoxStream, SelectAll, StreamExt};
use kernels::TokenLogprobs;
use serde::Serialize;
use utoipa::ToSchema;

use super::error::ApiError;
use super::request_id::RequestId;
use super::sampling::SamplingPlan;
use super::usage::Usage;
use crate::engine::GenerateRequest;
use crate::model::ServedModel;
use crate::telemetry::{Recorder, Telemetry};
use sequence::{Begun, RunningSequence};

/// One thing that a sequence brings forth.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Output {
    /// Log-probabilities of the prompt's tokens 1.., before everything else, if asked for.
    Prompt(Vec<TokenLogprobs>),
    /// Text, a token, the end: at least one of them.
    Delta(Delta),
}

/// What came with one token.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Delta {
    /// Text that is certain now. Characters and possible stop strings are held back until they are complete.
    pub(super) text: String,
    /// The token; absent where only held text is left to say.
    pub(super) token: Option<GeneratedToken>,
    /// The end.
    pub(super) finish: Option<Finish>,
}

/// A generated token.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct GeneratedToken {
    /// Its id.
    pub(super) id: u32,
    /// Characters of generated text before it.
    pub(super) text_offset: usize,
    /// If asked for.
    pub(super) logprobs: Option<TokenLogprobs>,
}

/// Why a sequence ended.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Finish {
    /// `stop` or `length`.
    pub(super) reason: &'static str,
    /// The stop string or token that was found; `None` for an end-of-sequence token.
    pub(super) stop_reason: Option<StopReason>,
    /// Prompt tokens found in the cache.
    cached_tokens: usize,
}

/// Why an answer ended: by itself or a stop string, at its longest, or to call tools. `null` until then.
#[derive(ToSchema)]
#[schema(as = FinishReason)]
#[serde(rename_all = "snake_case")]
#[expect(dead_code, reason = "the names on the wire, for the document")]
pub(super) enum FinishReasonName {
    Stop,
    Length,
    ToolCalls,
}

/// `stop_reason` of an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(untagged)]
pub(super) enum StopReason {
    /// One of `stop`.
    Text(String),
    /// One of `stop_token_ids`.
    Token(u32),
}

/// The sequences of a request, running. Dropping it cancels them.
pub(super) struct Generation {
    outputs: SelectAll<BoxStream<'static, (usize, Result<Output, ApiError>)>>,
    usage: Usage,
    /// Sequences per prompt.
    n: usize,
    recorder: Recorder,
}

impl Generation {
    /// Submits `requests`, all or none. `prompt_tokens`: the sum over the request's prompts.
    pub(super) fn start(
        model: &Arc<ServedModel>,
        telemetry: &Arc<Telemetry>,
        plan: &SamplingPlan,
        requests: Vec<GenerateRequest>,
        prompt_tokens: usize,
    ) -> Result<Self, ApiError> {
        let begun: Vec<_> = requests
            .iter()
            .map(|request| Begun {
                id: request.id.clone(),
                prompt: request.prompt.clone(),
                min_tokens: request.stop.min_tokens,
            })
            .collect();
        let recorder = Recorder::new(&model.names[0], &requests, prompt_tokens);
        let channels = model.submit(telemetry, requests)?;
        let sequence = |(begun, events)| {
            RunningSequence::new(Arc::clone(model), Arc::clone(telemetry), plan, begun, events)
        };
        let streams = begun.into_iter().zip(channels).map(sequence).enumerate().map(|(index, sequence)| {
            stream::unfold(sequence, |mut sequence| async { Some((sequence.next().await?, sequence)) })
                .map(move |output| (index, output))
                .boxed()
        });
        Ok(Self {
            outputs: stream::select_all(streams),
            usage: Usage::new(prompt_tokens),
            n: plan.n,
            recorder,
        })
    }

    /// Notes what was generated in the request's record when it has ended.
    pub(super) fn recorded(mut self, request_id: &RequestId) -> Self {
        self.recorder.write_to(request_id.record());
        self
    }

    /// The next output of any sequence, with the sequence's index; `None` when all have ended.
    pub(super) async fn next(&mut self) -> Option<Result<(usize, Output), ApiError>> {
        let (index, output) = self.outputs.next().await?;
        if let Ok(Output::Delta(delta)) = &output {
            if delta.token.is_some() {
                self.usage.add_token();
                self.recorder.token();
            }
            if let Some(finish) = &delta.finish {
                self.recorder.finished(finish.reason);
            }
            // The sequences of a prompt share it; what the first of them found counts.
            if let Some(finish) = delta.finish.as_ref().filter(|_| index.is_multiple_of(self.n)) {
                self.usage.add_cached(finish.cached_tokens);
                self.recorder.cached(finish.cached_tokens);
            }
        }
        Some(output.map(|output| (index, output)))
    }

    /// Token counts so far.
    pub(super) fn usage(&self) -> Usage {
        self.usage
    }
}

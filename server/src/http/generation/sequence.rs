//! One sequence of a request: tokens in, text out.

use std::sync::Arc;

use kernels::TokenLogprobs;
use tokio::sync::mpsc::UnboundedReceiver;

use super::{Delta, Finish, GeneratedToken, Output, StopReason};
use crate::engine::{FinishReason, TokenEvent};
use crate::http::error::ApiError;
use crate::http::sampling::SamplingPlan;
use crate::model::ServedModel;
use crate::telemetry::{Outcome, Telemetry};
use crate::tokenizer::{Detokenizer, StopMatcher};

/// A sequence as it was submitted.
pub(super) struct Begun {
    /// For logs: the request's id and the sequence's index.
    pub(super) id: String,
    /// Token ids.
    pub(super) prompt: Vec<u32>,
    /// Stop strings are looked for behind this many tokens.
    pub(super) min_tokens: usize,
}

/// A sequence, as long as the engine has it. Dropping it cancels it.
pub(super) struct RunningSequence {
    /// For logs: the request's id and the sequence's index.
    id: String,
    model: Arc<ServedModel>,
    telemetry: Arc<Telemetry>,
    events: UnboundedReceiver<TokenEvent>,
    /// `None`: the model has no tokenizer, and the text is empty.
    detokenizer: Option<Detokenizer>,
    matcher: StopMatcher,
    include_stop: bool,
    /// Stop strings are looked for behind this many tokens.
    min_tokens: usize,
    /// Prompt tokens found in the cache, once the prompt is computed.
    cached_tokens: usize,
    /// Tokens so far.
    generated: usize,
    /// Characters of detokenized text so far, held ones included.
    characters: usize,
    ended: bool,
}

impl RunningSequence {
    /// What the engine sends through `events` about a sequence.
    pub(super) fn new(
        model: Arc<ServedModel>,
        telemetry: Arc<Telemetry>,
        plan: &SamplingPlan,
        begun: Begun,
        events: UnboundedReceiver<TokenEvent>,
    ) -> Self {
        let tokenizer = model.tokenizer.as_ref();
        Self {
            id: begun.id,
            detokenizer: tokenizer.map(|t| Detokenizer::after(&begun.prompt, t, plan.skip_special_tokens)),
            model,
            telemetry,
            events,
            matcher: StopMatcher::new(plan.stop_strings.clone(), plan.include_stop),
            include_stop: plan.include_stop,
            min_tokens: begun.min_tokens,
            cached_tokens: 0,
            generated: 0,
            characters: 0,
            ended: false,
        }
    }

    /// The next output; `None` after the end.
    pub(super) async fn next(&mut self) -> Option<Result<Output, ApiError>> {
        if self.ended {
            return None;
        }
        let output = match self.next_event().await {
            Some(TokenEvent::Prompt { logprobs, .. }) => {
                let logprobs = logprobs.unwrap_or_default();
                self.require_numbers(&logprobs).map(|()| Output::Prompt(logprobs))
            }
            Some(TokenEvent::Token { id, logprobs, last }) => {
                self.token(id, logprobs, last).await.map(Output::Delta)
            }
            Some(TokenEvent::Finished { reason, .. }) => {
                self.finish(reason, Delta::default()).map(Output::Delta)
            }
            Some(TokenEvent::Embedding(_)) => {
                Err(ApiError::Internal("the engine sent an embedding".to_owned()))
            }
            None => Err(ApiError::EngineDied),
        };
        if output.is_err() {
            self.end(Outcome::Error);
        }
        Some(output)
    }

    /// The next event that says something; takes note of what the prompt's says beside log-probabilities.
    async fn next_event(&mut self) -> Option<TokenEvent> {
        loop {
            let event = self.events.recv().await?;
            let TokenEvent::Prompt { cached_tokens, logprobs } = &event else { return Some(event) };
            self.cached_tokens = *cached_tokens;
            if logprobs.is_some() {
                return Some(event);
            }
        }
    }

    /// `last`: why the sequence ends with this token, if it does. The engine alone decides that.
    async fn token(
        &mut self,
        id: u32,
        logprobs: Option<TokenLogprobs>,
        last: Option<FinishReason>,
    ) -> Result<Delta, ApiError> {
        self.require_numbers(logprobs.as_slice())?;
        self.generated += 1;
        let text_offset = self.characters;
        let stops = match last {
            Some(FinishReason::Eos | FinishReason::StopToken(_)) => true,
            // With `ignore_eos`, a grammar's end may be an end-of-sequence token that does not count as one.
            Some(FinishReason::GrammarEnd) => self.model.defaults.eos_token_ids.contains(&id),
            _ => false,
        };
        // The token that ends a text is not part of it.
        let piece = match (&mut self.detokenizer, &self.model.tokenizer) {
            (Some(detokenizer), Some(tokenizer)) if !stops || self.include_stop => {
                detokenizer.push(tokenizer, id)
            }
            _ => String::new(),
        };
        self.characters += piece.chars().count();
        let mut delta =
            Delta { token: Some(GeneratedToken { id, text_offset, logprobs }), ..Delta::default() };
        if self.generated <= self.min_tokens {
            delta.text = self.matcher.pass(&piece);
        } else if let Some(finish) = self.push_text(&piece, &mut delta.text) {
            self.end(Outcome::Stop);
            delta.finish = Some(finish);
            return Ok(delta);
        }
        if last.is_none() {
            return Ok(delta);
        }
        // The engine tells of the end together with the last token; so do we.
        match self.events.recv().await {
            Some(TokenEvent::Finished { reason, .. }) => self.finish(reason, delta),
            Some(other) => {
                tracing::error!(
                    request = self.id,
                    ?other,
                    "the engine went on after a sequence's last token"
                );
                Err(ApiError::Internal("the engine went on after the last token".to_owned()))
            }
            None => Err(ApiError::EngineDied),
        }
    }

    /// Adds what may be shown of `piece` to `text`; the end, if a stop string was found.
    fn push_text(&mut self, piece: &str, text: &mut String) -> Option<Finish> {
        let (shown, hit) = self.matcher.push(piece);
        text.push_str(&shown);
        let stop = self.matcher.stop(&hit?).to_owned();
        // Nothing more is read: the engine notices and drops the sequence.
        self.events.close();
        let stop_reason = Some(StopReason::Text(stop));
        Some(Finish { reason: "stop", stop_reason, cached_tokens: self.cached_tokens })
    }

    fn finish(&mut self, reason: FinishReason, mut delta: Delta) -> Result<Delta, ApiError> {
        let rest = match (&mut self.detokenizer, &self.model.tokenizer) {
            (Some(detokenizer), Some(tokenizer)) => detokenizer.finish(tokenizer),
            _ => String::new(),
        };
        if let Some(finish) = self.push_text(&rest, &mut delta.text) {
            self.end(Outcome::Stop);
            delta.finish = Some(finish);
            return Ok(delta);
        }
        delta.text.push_str(&self.matcher.finish());
        let (outcome, reason, stop_reason) = match reason {
            FinishReason::Length => (Outcome::Length, "length", None),
            FinishReason::Eos | FinishReason::GrammarEnd => (Outcome::Stop, "stop", None),
            FinishReason::StopToken(id) => (Outcome::Stop, "stop", Some(StopReason::Token(id))),
            FinishReason::GrammarLost => return Err(ApiError::GrammarLost),
            FinishReason::Aborted => return Err(ApiError::ShuttingDown),
        };
        self.end(outcome);
        delta.finish = Some(Finish { reason, stop_reason, cached_tokens: self.cached_tokens });
        Ok(delta)
    }

    /// Refuses what is no number, which JSON cannot say and no client could use: the model computed NaN.
    fn require_numbers(&self, logprobs: &[TokenLogprobs]) -> Result<(), ApiError> {
        if !logprobs.iter().any(has_nan) {
            return Ok(());
        }
        tracing::error!(request = self.id, "the model's logits are NaN: the answer is given up");
        Err(ApiError::Internal("the model's logits are not numbers (NaN)".to_owned()))
    }

    fn end(&mut self, outcome: Outcome) {
        self.ended = true;
        self.telemetry.finished(outcome);
    }
}

fn has_nan(logprobs: &TokenLogprobs) -> bool {
    logprobs.logprob.is_nan() || logprobs.top.iter().any(|(_, logprob)| logprob.is_nan())
}

/// A sequence that is dropped before its end: the client went away.
impl Drop for RunningSequence {
    fn drop(&mut self) {
        if !self.ended {
            self.telemetry.finished(Outcome::Abort);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nan_is_told_from_minus_infinity() {
        let logprobs = |logprob, top: &[(u32, f32)]| TokenLogprobs { logprob, rank: 1, top: top.to_vec() };
        assert!(!has_nan(&logprobs(f32::NEG_INFINITY, &[(1, -0.5)])));
        assert!(has_nan(&logprobs(f32::NAN, &[])));
        assert!(has_nan(&logprobs(-0.5, &[(1, -0.5), (2, f32::NAN)])));
    }
}

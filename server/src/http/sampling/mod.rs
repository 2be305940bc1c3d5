//! What completions and chats share: how tokens are chosen, and when to stop.

mod fields;
#[cfg(test)]
mod tests;

use models::GenerationConfig;

use super::check::require;
use super::error::ApiError;
use crate::engine::{Sampling, Scheduling, StopConditions};
use crate::tokenizer::Tokenizer;
pub(super) use fields::SamplingFields;

/// What a model brings to the checks and defaults.
#[derive(Debug, Clone, Copy)]
pub(super) struct ModelFacts<'a> {
    /// Token ids are below this.
    pub(super) vocab_size: usize,
    /// Most tokens of a sequence.
    pub(super) max_model_len: usize,
    /// Whether requests have a priority.
    pub(super) has_priorities: bool,
    /// `None`: there is no text to look for stop strings in.
    pub(super) tokenizer: Option<&'a Tokenizer>,
    /// Defaults of the sampling parameters, and the end-of-sequence tokens.
    pub(super) defaults: &'a GenerationConfig,
}

impl ModelFacts<'_> {
    /// Checks `priority` and `cache_salt`.
    pub(super) fn scheduling(
        self,
        priority: Option<i64>,
        cache_salt: Option<String>,
    ) -> Result<Scheduling, ApiError> {
        let priority = priority.unwrap_or(0);
        require(
            "priority",
            priority == 0 || self.has_priorities,
            "0: this server serves in order of arrival (--scheduling-policy priority changes that)",
        )?;
        require("cache_salt", cache_salt.as_deref() != Some(""), "a string that is not empty")?;
        Ok(Scheduling { priority, cache_salt })
    }
}

/// What the fields mean.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct SamplingPlan {
    /// Sequences per prompt.
    pub(super) n: usize,
    /// For the first sequence of a prompt; the others have a seed of their own.
    pub(super) sampling: Sampling,
    /// Without `max_tokens`, which depends on the prompt.
    pub(super) stop: StopConditions,
    /// When it runs, and whose cache it may use.
    pub(super) scheduling: Scheduling,
    /// Strings that end the text.
    pub(super) stop_strings: Vec<String>,
    /// Whether end-of-sequence tokens are like any other.
    pub(super) ignore_eos: bool,
    /// Whether the stop string or token belongs to the text.
    pub(super) include_stop: bool,
    /// Whether special tokens are left out of the text.
    pub(super) skip_special_tokens: bool,
    /// Alternatives reported for each prompt token.
    pub(super) prompt_logprobs: Option<usize>,
    /// Whether token ids are reported.
    pub(super) return_token_ids: bool,
    /// Whether log-probabilities name tokens `token_id:N`.
    pub(super) tokens_as_ids: bool,
    /// Keep only this many of the prompt's last tokens.
    pub(super) truncate_prompt: Option<usize>,
}

impl SamplingPlan {
    /// The sampling of sequence `index` of a prompt.
    pub(super) fn sampling_of(&self, index: usize) -> Sampling {
        Sampling { seed: self.sampling.seed.wrapping_add(index as u64), ..self.sampling.clone() }
    }

    /// The stop conditions of a prompt of `prompt_len` tokens: `max_tokens` is cut to what the context holds.
    /// `field` is to blame for a prompt that is too long.
    pub(super) fn stop_for(
        &self,
        field: &'static str,
        prompt_len: usize,
        max_tokens: Option<usize>,
        max_model_len: usize,
    ) -> Result<StopConditions, ApiError> {
        let room = max_model_len.saturating_sub(prompt_len);
        if room < max_tokens.unwrap_or(1).min(1) || prompt_len > max_model_len {
            let message = format!(
                "the prompt has {prompt_len} tokens; this model's context holds {max_model_len}, prompt and answer together"
            );
            return Err(ApiError::field(field, message));
        }
        let max_tokens = max_tokens.unwrap_or(room).min(room);
        require(
            "min_tokens",
            self.stop.min_tokens <= max_tokens,
            &format!("at most max_tokens, {max_tokens} here"),
        )?;
        Ok(StopConditions { max_tokens, ..self.stop.clone() })
    }
}

//! Token counts of a request.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::ApiError;

/// How many tokens a request had and made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
pub(super) struct Usage {
    prompt_tokens: usize,
    total_tokens: usize,
    completion_tokens: usize,
    prompt_tokens_details: PromptDetails,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
struct PromptDetails {
    /// Tokens whose keys and values were found in the cache.
    cached_tokens: usize,
}

impl Usage {
    /// Each prompt counts once, however many sequences continue it.
    pub(super) fn new(prompt_tokens: usize) -> Self {
        Self { prompt_tokens, total_tokens: prompt_tokens, ..Self::default() }
    }

    /// A token was generated.
    pub(super) fn add_token(&mut self) {
        self.completion_tokens += 1;
        self.total_tokens += 1;
    }

    /// Tokens of the prompts.
    pub(super) fn prompt_tokens(&self) -> usize {
        self.prompt_tokens
    }

    /// Tokens generated so far.
    pub(super) fn completion_tokens(&self) -> usize {
        self.completion_tokens
    }

    /// Prompt tokens that were found in the cache.
    pub(super) fn cached_tokens(&self) -> usize {
        self.prompt_tokens_details.cached_tokens
    }

    /// Prompt tokens that were found in the cache.
    pub(super) fn add_cached(&mut self, tokens: usize) {
        self.prompt_tokens_details.cached_tokens += tokens;
    }
}

/// Whether and how the answer is streamed.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub(super) struct StreamFields {
    /// Whether the answer comes as server-sent events, token by token [default: false].
    stream: Option<bool>,
    /// Only with `stream: true`.
    stream_options: Option<StreamOptions>,
}

#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
struct StreamOptions {
    /// Whether a last event has the usage [default: false].
    include_usage: Option<bool>,
    /// Whether every event has the usage so far; only with `include_usage` [default: false].
    continuous_usage_stats: Option<bool>,
}

/// How an answer is streamed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Streaming {
    /// A last chunk with the usage.
    pub(super) include_usage: bool,
    /// The usage so far in every chunk.
    pub(super) continuous_usage: bool,
}

impl StreamFields {
    /// `None`: not streamed.
    pub(super) fn plan(self) -> Result<Option<Streaming>, ApiError> {
        match (self.stream.unwrap_or(false), self.stream_options) {
            (false, Some(_)) => Err(ApiError::field("stream_options", "stream_options needs stream: true")),
            (false, None) => Ok(None),
            (true, options) => {
                let options = options.unwrap_or_default();
                let include_usage = options.include_usage.unwrap_or(false);
                let continuous_usage = include_usage && options.continuous_usage_stats.unwrap_or(false);
                Ok(Some(Streaming { include_usage, continuous_usage }))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn plan(json: serde_json::Value) -> Result<Option<Streaming>, ApiError> {
        serde_json::from_value::<StreamFields>(json).unwrap().plan()
    }

    #[test]
    fn stream_options() {
        assert_eq!(plan(json!({"stream": null})), Ok(None));
        let expected = Streaming { include_usage: true, continuous_usage: false };
        assert_eq!(
            plan(json!({"stream": true, "stream_options": {"include_usage": true}})),
            Ok(Some(expected))
        );
        let expected = Streaming { include_usage: true, continuous_usage: true };
        let options = json!({"include_usage": true, "continuous_usage_stats": true});
        assert_eq!(plan(json!({"stream": true, "stream_options": options})), Ok(Some(expected)));
        assert!(plan(json!({"stream_options": {"include_usage": true}})).is_err());
    }

    #[test]
    fn sums() {
        let mut usage = Usage::new(5);
        usage.add_token();
        usage.add_cached(3);
        let expected = json!({"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6,
            "prompt_tokens_details": {"cached_tokens": 3}});
        assert_eq!(serde_json::to_value(usage).unwrap(), expected);
    }
}

//! The fields as sent, and their checks.

use std::collections::BTreeMap;

use serde::Deserialize;
use utoipa::ToSchema;

use super::{ModelFacts, SamplingPlan};
use crate::engine::{Sampling, StopConditions};
use crate::http::check::{logprobs, out_of_range, require, require_in_vocabulary};
use crate::http::error::ApiError;
use crate::tokenizer::Tokenizer;

/// Below this a temperature means greedy, as in vLLM: dividing by it would overflow.
const GREEDY_BELOW: f32 = 1e-5;

/// Every token's text is searched for each of them.
const MAX_STOPS: usize = 1024;
const MAX_STOP_BYTES: usize = 4096;

/// Every step looks at each of them.
const MAX_BAD_WORDS: usize = 1024;
const MAX_BAD_WORD_BYTES: usize = 256;

/// How tokens are chosen, and when to stop. All are optional, and `null` is the same as absent.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub(in crate::http) struct SamplingFields {
    /// Answers to each prompt [default: 1].
    #[serde(default, deserialize_with = "crate::http::integer::optional")]
    #[schema(minimum = 1)]
    n: Option<usize>,
    /// The same as `n`: no answer is left out.
    #[serde(default, deserialize_with = "crate::http::integer::optional")]
    #[schema(minimum = 1)]
    best_of: Option<usize>,
    /// 0: always the most likely token [default: the model's, else 1].
    #[schema(minimum = 0, example = 0.7)]
    temperature: Option<f32>,
    /// Only the most likely tokens that have this probability together [default: the model's, else 1].
    #[schema(exclusive_minimum = 0, maximum = 1)]
    top_p: Option<f32>,
    /// Only so many of the most likely tokens; 0 or -1: all [default: the model's, else all].
    #[serde(default, deserialize_with = "crate::http::integer::optional")]
    #[schema(minimum = -1)]
    top_k: Option<i64>,
    /// Only tokens with at least this share of the most likely one's probability [default: the model's, else 0].
    #[schema(minimum = 0, maximum = 1)]
    min_p: Option<f32>,
    /// The same seed gives the same answer, whatever else the server does [default: a random one].
    #[serde(default, deserialize_with = "crate::http::integer::optional")]
    #[schema(example = 1)]
    seed: Option<i64>,
    /// Taken off the logit of each token that the answer has.
    #[schema(minimum = -2, maximum = 2)]
    presence_penalty: Option<f32>,
    /// Taken off the logit of a token for each time that the answer has it.
    #[schema(minimum = -2, maximum = 2)]
    frequency_penalty: Option<f32>,
    /// Divides positive logits, and multiplies negative ones, of tokens that prompt or answer have.
    #[schema(exclusive_minimum = 0)]
    repetition_penalty: Option<f32>,
    /// Added to the logits of tokens: an object from token ids to numbers from -100 to 100.
    #[schema(example = json!({"42": -100}))]
    logit_bias: Option<BTreeMap<String, f32>>,
    /// No other tokens.
    #[schema(min_items = 1)]
    allowed_token_ids: Option<Vec<u32>>,
    /// Words of 1 to 256 bytes that the answer must not have.
    #[schema(max_items = 1024)]
    bad_words: Option<Vec<String>>,
    stop: Option<StopField>,
    /// Tokens that end the answer.
    stop_token_ids: Option<Vec<u32>>,
    /// Whether the text has the stop string or token that ended it [default: false].
    include_stop_str_in_output: Option<bool>,
    /// Whether to go on after an end-of-sequence token [default: false].
    ignore_eos: Option<bool>,
    /// Tokens before the answer may end.
    #[serde(default, deserialize_with = "crate::http::integer::optional")]
    min_tokens: Option<usize>,
    /// Whether the text is without special tokens [default: true].
    skip_special_tokens: Option<bool>,
    /// Log-probabilities of the prompt's tokens, with so many alternatives; not in a stream.
    #[serde(default, deserialize_with = "crate::http::integer::optional")]
    #[schema(minimum = 0, maximum = 20)]
    prompt_logprobs: Option<i64>,
    /// Whether the answer has `token_ids` and `prompt_token_ids`.
    return_token_ids: Option<bool>,
    /// Whether log-probabilities name tokens `token_id:N`.
    return_tokens_as_token_ids: Option<bool>,
    /// Keep only this many of the prompt's last tokens; -1: as many as the context holds.
    #[serde(default, deserialize_with = "crate::http::integer::optional")]
    #[schema(minimum = -1)]
    truncate_prompt_tokens: Option<i64>,
    /// Lower runs first, where the server has `--scheduling-policy priority`; else 0.
    #[serde(default, deserialize_with = "crate::http::integer::optional")]
    priority: Option<i64>,
    /// Cached prefixes are shared among requests with the same salt only.
    #[schema(min_length = 1)]
    cache_salt: Option<String>,
}

/// Strings that end the answer: one, or several, of 1 to 4096 bytes.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged, expecting = "must be a string or a list of strings")]
enum StopField {
    One(String),
    Many(Vec<String>),
}

impl SamplingFields {
    /// Checks the fields and fills in the model's defaults.
    pub(in crate::http) fn plan(self, model: ModelFacts<'_>) -> Result<SamplingPlan, ApiError> {
        let n = self.n.unwrap_or(1);
        require("n", n >= 1, "at least 1")?;
        require(
            "best_of",
            self.best_of.is_none_or(|best_of| best_of == n),
            "equal to n: nothing is left out",
        )?;
        let sampling = self.sampling(model)?;
        let mut stop_token_ids = self.stop_token_ids.unwrap_or_default();
        stop_token_ids.sort_unstable();
        stop_token_ids.dedup();
        require_in_vocabulary("stop_token_ids", &stop_token_ids, model.vocab_size)?;
        let stop = StopConditions {
            max_tokens: 0,
            min_tokens: self.min_tokens.unwrap_or(0),
            eos_token_ids: match self.ignore_eos {
                Some(true) => Vec::new(),
                _ => model.defaults.eos_token_ids.clone(),
            },
            stop_token_ids,
        };
        let stop_strings = match self.stop {
            None => Vec::new(),
            Some(StopField::One(stop)) => vec![stop],
            Some(StopField::Many(stops)) => stops,
        };
        require(
            "stop",
            stop_strings.len() <= MAX_STOPS
                && stop_strings.iter().all(|stop| (1..=MAX_STOP_BYTES).contains(&stop.len())),
            &format!("at most {MAX_STOPS} strings of 1 to {MAX_STOP_BYTES} bytes"),
        )?;
        require(
            "stop",
            stop_strings.is_empty() || model.tokenizer.is_some(),
            "absent: this model has no tokenizer, so there is no text to look in; use stop_token_ids",
        )?;
        let scheduling = model.scheduling(self.priority, self.cache_salt.clone())?;
        Ok(SamplingPlan {
            n,
            sampling,
            stop,
            scheduling,
            stop_strings,
            ignore_eos: self.ignore_eos.unwrap_or(false),
            include_stop: self.include_stop_str_in_output.unwrap_or(false),
            skip_special_tokens: self.skip_special_tokens.unwrap_or(true),
            prompt_logprobs: self.prompt_logprobs.map(|k| logprobs("prompt_logprobs", k)).transpose()?,
            return_token_ids: self.return_token_ids.unwrap_or(false),
            tokens_as_ids: self.return_tokens_as_token_ids.unwrap_or(false),
            truncate_prompt: match self.truncate_prompt_tokens {
                None => None,
                Some(-1) => Some(model.max_model_len.saturating_sub(1)),
                Some(k) => {
                    let k = usize::try_from(k).ok().filter(|k| (1..=model.max_model_len).contains(k));
                    let range =
                        || out_of_range("truncate_prompt_tokens", "-1, or from 1 to the context's length");
                    Some(k.ok_or_else(range)?)
                }
            },
        })
    }

    fn sampling(&self, model: ModelFacts<'_>) -> Result<Sampling, ApiError> {
        let defaults = model.defaults;
        let neutral = Sampling::default();
        let temperature = self.temperature.or(defaults.temperature).unwrap_or(neutral.temperature);
        require("temperature", temperature.is_finite() && temperature >= 0.0, "0 or more")?;
        let top_p = self.top_p.or(defaults.top_p).unwrap_or(neutral.top_p);
        require("top_p", top_p > 0.0 && top_p <= 1.0, "above 0 and at most 1")?;
        let min_p = self.min_p.or(defaults.min_p).unwrap_or(neutral.min_p);
        require("min_p", (0.0..=1.0).contains(&min_p), "from 0 to 1")?;
        let top_k = match self.top_k {
            None => defaults.top_k,
            Some(-1 | 0) => None,
            Some(k) if k > 0 => Some(u32::try_from(k).unwrap_or(u32::MAX)),
            Some(_) => return Err(out_of_range("top_k", "at least 1, or -1 or 0 for no limit")),
        };
        let presence_penalty = self.presence_penalty.unwrap_or(0.0);
        require("presence_penalty", (-2.0..=2.0).contains(&presence_penalty), "from -2 to 2")?;
        let frequency_penalty = self.frequency_penalty.unwrap_or(0.0);
        require("frequency_penalty", (-2.0..=2.0).contains(&frequency_penalty), "from -2 to 2")?;
        let repetition_penalty = self.repetition_penalty.or(defaults.repetition_penalty).unwrap_or(1.0);
        require("repetition_penalty", repetition_penalty.is_finite() && repetition_penalty > 0.0, "above 0")?;
        if let Some(allowed) = &self.allowed_token_ids {
            require("allowed_token_ids", !allowed.is_empty(), "a list that is not empty")?;
            require_in_vocabulary("allowed_token_ids", allowed, model.vocab_size)?;
        }
        Ok(Sampling {
            temperature: if temperature < GREEDY_BELOW { 0.0 } else { temperature },
            top_k,
            top_p,
            min_p,
            // Any integer is a seed; only that equal ones are equal matters.
            seed: self.seed.map_or_else(|| fastrand::u64(..), i64::cast_unsigned),
            presence_penalty,
            frequency_penalty,
            repetition_penalty,
            logit_bias: self.logit_bias(model.vocab_size)?,
            allowed_token_ids: self.allowed_token_ids.clone(),
            bad_words: self.bad_words(model.tokenizer)?,
            grammar: None,
        })
    }

    /// The tokens of each bad word, at the beginning of a text and behind a space.
    fn bad_words(&self, tokenizer: Option<&Tokenizer>) -> Result<Vec<Vec<u32>>, ApiError> {
        const FIELD: &str = "bad_words";
        let words = self.bad_words.as_deref().unwrap_or_default();
        let fine = |word: &String| !word.trim().is_empty() && word.len() <= MAX_BAD_WORD_BYTES;
        require(
            FIELD,
            words.len() <= MAX_BAD_WORDS && words.iter().all(fine),
            &format!("at most {MAX_BAD_WORDS} words of 1 to {MAX_BAD_WORD_BYTES} bytes"),
        )?;
        if words.is_empty() {
            return Ok(Vec::new());
        }
        let tokenizer =
            tokenizer.ok_or_else(|| out_of_range(FIELD, "absent: this model has no tokenizer"))?;
        let mut bad = Vec::new();
        for word in words {
            let word = word.trim_start();
            for spelling in [word.to_owned(), format!(" {word}")] {
                let encoded = tokenizer
                    .encode(&spelling, false)
                    .map_err(|error| ApiError::field(FIELD, format!("{FIELD}: {error}")))?;
                bad.push(encoded.ids);
            }
        }
        bad.dedup();
        Ok(bad)
    }

    fn logit_bias(&self, vocab_size: usize) -> Result<Vec<(u32, f32)>, ApiError> {
        let given = self.logit_bias.iter().flatten();
        given
            .map(|(key, &bias)| {
                let id = key.parse::<u32>().ok().filter(|&id| (id as usize) < vocab_size);
                let id = id.ok_or_else(|| {
                    let message =
                        format!("logit_bias: '{key}' is no token id of this model (0 to {})", vocab_size - 1);
                    ApiError::field("logit_bias", message)
                })?;
                require("logit_bias", (-100.0..=100.0).contains(&bias), "from -100 to 100 for each token")?;
                Ok((id, bias))
            })
            .collect()
    }
}

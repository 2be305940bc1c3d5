//! What the HTTP side asks of the engine, and what it hears back: token ids only, no text and no JSON.
//!
//! Times and token counts for metrics do not travel with the events: the engine reports them to the
//! [`EngineObserver`](super::EngineObserver) it was started with, also for sequences whose client went away.

use kernels::TokenLogprobs;

use super::constraint::SharedGrammar;

/// One sequence to generate: a tokenized prompt and how to continue it.
#[derive(Debug, Clone)]
pub struct GenerateRequest {
    /// For logs: the HTTP request id, with an index where it holds several sequences.
    pub id: String,
    /// Prompt token ids; not empty, all inside the vocabulary, shorter than the context.
    pub prompt: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// When to stop.
    pub stop: StopConditions,
    /// When it runs, and whose cache it may use.
    pub scheduling: Scheduling,
    /// Report each generated token's log-probability and this many of the best alternatives.
    pub logprobs: Option<usize>,
    /// Report the prompt tokens' log-probabilities and this many of the best alternatives.
    pub prompt_logprobs: Option<usize>,
    /// Report the prompt's final hidden states as one vector.
    pub pooling: Option<Pooling>,
}

/// How the final hidden states of a prompt's tokens, after the last norm, become one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// That of the last token.
    Last,
}

/// How the next token is chosen. Penalties and bias act on the logits first.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the k most likely tokens.
    pub top_k: Option<u32>,
    /// Keep the most likely tokens up to this probability.
    pub top_p: f32,
    /// Drop tokens less likely than this times the most likely.
    pub min_p: f32,
    /// Determines the draws, whatever else is in the batch.
    pub seed: u64,
    /// Subtracted once from every token that was generated before.
    pub presence_penalty: f32,
    /// Subtracted per occurrence among the generated tokens.
    pub frequency_penalty: f32,
    /// Divides (positive) or multiplies (negative) the logits of tokens in the prompt or the output; 1 is off.
    pub repetition_penalty: f32,
    /// Added to these tokens' logits.
    pub logit_bias: Vec<(u32, f32)>,
    /// Only these tokens may be generated.
    pub allowed_token_ids: Option<Vec<u32>>,
    /// The last token of each of these is not generated after the others, unless nothing else is possible.
    pub bad_words: Vec<Vec<u32>>,
    /// What the output must follow, to the end of the sequence. It goes before everything else: where no token is left
    /// that all fields allow, only the grammar counts.
    pub grammar: Option<SharedGrammar>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            allowed_token_ids: None,
            bad_words: Vec::new(),
            grammar: None,
        }
    }
}

/// When a sequence ends. Stop strings are the HTTP side's: it drops the receiver.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StopConditions {
    /// At most this many generated tokens (0: only the prompt is computed).
    pub max_tokens: usize,
    /// No stop token is generated before this many tokens.
    pub min_tokens: usize,
    /// End-of-sequence tokens of the model; empty with `ignore_eos`.
    pub eos_token_ids: Vec<u32>,
    /// Further tokens that end the sequence.
    pub stop_token_ids: Vec<u32>,
}

/// What distinguishes a request from others that wait or run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scheduling {
    /// Lower runs first; equal ones in order of arrival. Other than 0 only where the engine schedules by priority.
    pub priority: i64,
    /// Only requests with the same salt find each other's prompts in the cache. How fast an answer comes tells whether
    /// a prompt was there, which those who do not trust each other should not learn.
    pub cache_salt: Option<String>,
}

/// What the engine reports on a request's channel, in order: `Prompt`, `Token`s, one `Finished`.
/// A channel that closes without `Finished` means that the engine died.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenEvent {
    /// The prompt is computed.
    Prompt {
        /// How many of its tokens were found in the cache.
        cached_tokens: usize,
        /// Log-probabilities of its tokens 1.. given those before them (`prompt.len() - 1` entries), if asked for.
        logprobs: Option<Vec<TokenLogprobs>>,
    },
    /// The pooled hidden states of the prompt, `[hidden_size]`, if asked for.
    Embedding(Vec<f32>),
    /// A generated token; a token that ended the sequence is reported too.
    Token {
        /// Its id.
        id: u32,
        /// Its log-probability, if asked for.
        logprobs: Option<TokenLogprobs>,
        /// Why the sequence ends with this token; `Finished` follows with the same reason.
        last: Option<FinishReason>,
    },
    /// The end.
    Finished {
        /// Why.
        reason: FinishReason,
        /// What it took.
        usage: Usage,
    },
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// `max_tokens` or the context was reached.
    Length,
    /// An end-of-sequence token.
    Eos,
    /// One of `stop_token_ids`.
    StopToken(u32),
    /// The output is complete by its grammar: nothing may follow, whatever `min_tokens` says.
    GrammarEnd,
    /// The grammar became too complex to be followed any further.
    GrammarLost,
    /// The server is shutting down.
    Aborted,
}

/// Tokens of one sequence.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Prompt tokens.
    pub prompt_tokens: usize,
    /// Prompt tokens whose keys and values were found in the cache.
    pub cached_tokens: usize,
    /// Generated tokens.
    pub completion_tokens: usize,
}

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The queue is full; try again later.
    #[error("the server is overloaded: {queued} requests are waiting")]
    Overloaded {
        /// Requests waiting.
        queued: usize,
    },
    /// The prompt leaves no room for a token (or, with `max_tokens` 0, does not fit itself). A `max_tokens` beyond
    /// the context is no error: generation ends there with [`FinishReason::Length`].
    #[error("the sequence needs {needed} tokens of context; this server holds {capacity}")]
    TooLong {
        /// Tokens that the sequence needs at least.
        needed: usize,
        /// Tokens that a sequence may have, prompt and output together.
        capacity: usize,
    },
    /// The request breaks the contract of [`GenerateRequest`]: a mistake of the caller, not of its user.
    #[error("{0}")]
    Invalid(String),
    /// The server is draining, or the engine has died.
    #[error("the server is shutting down")]
    ShuttingDown,
}

//! One sequence: its tokens, how far the cache has them, and when it ends.

use std::collections::BTreeMap;

use kernels::TokenLogprobs;

use super::block_manager::BlockTable;
use super::request::{FinishReason, GenerateRequest, Sampling, StopConditions, Usage};

/// Number of a sequence, in order of arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct SequenceId(pub(super) u64);

/// A sequence between its submission and its end. It survives preemption: only `computed` and the blocks are lost.
#[derive(Debug)]
pub(super) struct Sequence {
    id: SequenceId,
    /// The prompt, then what was generated.
    tokens: Vec<u32>,
    prompt_len: usize,
    /// Tokens at which it ends: the prompt and `max_tokens`, or the whole context.
    max_len: usize,
    /// Tokens whose keys and values are in the cache.
    computed: usize,
    /// Blocks that hold them.
    pub(super) block_table: BlockTable,
    sampling: Sampling,
    stop: StopConditions,
    logprobs: Option<usize>,
    prompt_logprobs: Option<PromptLogprobs>,
    /// Whether the whole prompt was ever computed.
    prompt_done: bool,
    counts: Option<TokenCounts>,
    finish: Option<FinishReason>,
}

/// The prompt's log-probabilities, as far as they are known. They are kept over a preemption and reported once.
#[derive(Debug)]
struct PromptLogprobs {
    top: usize,
    scored: Vec<TokenLogprobs>,
}

/// How often each token occurs, for the penalties. Ordered, so that nothing depends on a hasher's seed.
#[derive(Debug, Default)]
pub(super) struct TokenCounts(BTreeMap<u32, usize>);

impl TokenCounts {
    /// Every token of the prompt or the output, and how often it was generated.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, usize)> {
        self.0.iter().map(|(&token, &generated)| (token, generated))
    }
}

impl Sequence {
    /// A sequence that has not been scheduled yet; it ends when it has `max_model_len` tokens.
    pub(super) fn new(id: SequenceId, request: GenerateRequest, max_model_len: usize) -> Self {
        let GenerateRequest { id: _, prompt, sampling, stop, logprobs, prompt_logprobs } = request;
        let penalized = sampling.presence_penalty != 0.0
            || sampling.frequency_penalty != 0.0
            || sampling.repetition_penalty != 1.0;
        Self {
            id,
            prompt_len: prompt.len(),
            max_len: prompt.len().saturating_add(stop.max_tokens).min(max_model_len),
            computed: 0,
            block_table: BlockTable::default(),
            counts: penalized.then(|| TokenCounts(prompt.iter().map(|&token| (token, 0)).collect())),
            tokens: prompt,
            sampling,
            stop,
            logprobs,
            prompt_logprobs: prompt_logprobs.map(|top| PromptLogprobs { top, scored: Vec::new() }),
            prompt_done: false,
            finish: None,
        }
    }

    /// Its number.
    pub(super) fn id(&self) -> SequenceId {
        self.id
    }

    /// The prompt, then what was generated.
    pub(super) fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens of the prompt.
    pub(super) fn prompt_len(&self) -> usize {
        self.prompt_len
    }

    /// Tokens generated so far; also the index of the next draw, which makes sampling independent of preemptions.
    pub(super) fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Most tokens that it can have, prompt and output.
    pub(super) fn max_len(&self) -> usize {
        self.max_len
    }

    /// Tokens whose keys and values are in the cache.
    pub(super) fn computed(&self) -> usize {
        self.computed
    }

    /// Tokens that are known and not in the cache: 1 while decoding.
    pub(super) fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Whether a token follows once everything known is computed. `max_tokens` 0 only asks for the prompt.
    pub(super) fn generates(&self) -> bool {
        self.max_len > self.prompt_len
    }

    /// How tokens are chosen.
    pub(super) fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// When it stops.
    pub(super) fn stop(&self) -> &StopConditions {
        &self.stop
    }

    /// Alternatives to report with each generated token.
    pub(super) fn logprobs(&self) -> Option<usize> {
        self.logprobs
    }

    /// Occurrences of tokens; `None` without penalties.
    pub(super) fn counts(&self) -> Option<&TokenCounts> {
        self.counts.as_ref()
    }

    /// Alternatives to report with each prompt token, and the first position whose successor has not been scored.
    /// `None` when nothing (more) is wanted.
    pub(super) fn unscored_prompt(&self) -> Option<(usize, usize)> {
        let wanted = self.prompt_logprobs.as_ref()?;
        Some((wanted.top, wanted.scored.len()))
    }

    /// Why it ended; `None` while it has not.
    pub(super) fn finish(&self) -> Option<FinishReason> {
        self.finish
    }

    /// Tokens so far.
    pub(super) fn usage(&self) -> Usage {
        Usage { prompt_tokens: self.prompt_len, cached_tokens: 0, completion_tokens: self.generated() }
    }

    /// Adds the log-probabilities of the first prompt token that has none.
    pub(super) fn score_prompt(&mut self, logprobs: TokenLogprobs) {
        if let Some(wanted) = &mut self.prompt_logprobs {
            wanted.scored.push(logprobs);
        }
    }

    /// The next `tokens` tokens are in the cache. Returns what that completes: the prompt, once in a sequence's life.
    pub(super) fn advance(&mut self, tokens: usize) -> Option<PromptDone> {
        self.computed += tokens;
        if self.prompt_done || self.computed < self.prompt_len {
            return None;
        }
        self.prompt_done = true;
        Some(PromptDone {
            tokens: self.prompt_len,
            logprobs: self.prompt_logprobs.take().map(|wanted| wanted.scored),
        })
    }

    /// Appends a sampled token, which may end the sequence.
    pub(super) fn push(&mut self, token: u32) {
        self.tokens.push(token);
        if let Some(counts) = &mut self.counts {
            *counts.0.entry(token).or_default() += 1;
        }
        self.finish = self.finish_after(token);
    }

    /// Ends a sequence that generates nothing.
    pub(super) fn finish_without_token(&mut self) {
        self.finish = Some(FinishReason::Length);
    }

    /// Forgets what the cache holds: it is computed again, and sampling goes on where it was.
    pub(super) fn restart(&mut self) {
        self.computed = 0;
    }

    fn finish_after(&self, token: u32) -> Option<FinishReason> {
        let may_stop = self.generated() > self.stop.min_tokens;
        if may_stop && self.stop.eos_token_ids.contains(&token) {
            Some(FinishReason::Eos)
        } else if may_stop && self.stop.stop_token_ids.contains(&token) {
            Some(FinishReason::StopToken(token))
        } else if self.tokens.len() >= self.max_len {
            Some(FinishReason::Length)
        } else {
            None
        }
    }
}

/// A prompt was computed for the first time.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PromptDone {
    /// Its length.
    pub(super) tokens: usize,
    /// Log-probabilities of its tokens 1.., if asked for.
    pub(super) logprobs: Option<Vec<TokenLogprobs>>,
}

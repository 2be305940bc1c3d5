//! One sequence: its tokens, how far the cache has them, and when it ends.

use kernels::{KV_BLOCK_TOKENS, TokenLogprobs};

use super::block_manager::{BlockManager, BlockTable, Hit};
use super::ngram::{self, NgramLookup};
use super::pooling::PoolingState;
use super::prefix_cache::HashChain;
use super::request::{FinishReason, GenerateRequest, Sampling, Scheduling, StopConditions, Usage};
use super::token_counts::TokenCounts;

/// Number of a sequence, in order of arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct SequenceId(pub(super) u64);

/// Whose turn it is: lower comes first, and among equals who came first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    priority: i64,
    id: SequenceId,
}

/// A sequence between its submission and its end. It survives preemption: only `computed` and the blocks are lost.
#[derive(Debug)]
pub(super) struct Sequence {
    rank: Rank,
    /// The prompt, then what was generated.
    tokens: Vec<u32>,
    prompt_len: usize,
    /// Tokens at which it ends: the prompt and `max_tokens`, or the whole context.
    max_len: usize,
    /// Tokens whose keys and values are in the cache.
    computed: usize,
    /// Blocks that hold them.
    pub(super) block_table: BlockTable,
    /// Names of its blocks' contents, as far as they were needed.
    chain: HashChain,
    /// Blocks at the table's beginning whose contents the cache knows by name.
    named_blocks: usize,
    /// Prompt tokens that the cache had when the sequence first ran; `None` before.
    cached_tokens: Option<usize>,
    /// The last token and what is drafted to follow it; empty without a draft.
    drafted: Vec<u32>,
    sampling: Sampling,
    stop: StopConditions,
    logprobs: Option<usize>,
    prompt_logprobs: Option<PromptLogprobs>,
    pooled: Option<PoolingState>,
    /// Whether the whole prompt was ever computed.
    prompt_done: bool,
    counts: Option<TokenCounts>,
    /// Why the next token will be the last, whatever it is.
    ends_next: Option<FinishReason>,
    finish: Option<FinishReason>,
}

/// The prompt's log-probabilities, as far as they are known. They are kept over a preemption and reported once.
#[derive(Debug)]
struct PromptLogprobs {
    top: usize,
    scored: Vec<TokenLogprobs>,
}

impl Sequence {
    /// A sequence that has not been scheduled yet; it ends when it has `max_model_len` tokens.
    pub(super) fn new(id: SequenceId, request: GenerateRequest, max_model_len: usize) -> Self {
        let GenerateRequest { id: _, prompt, sampling, stop, scheduling, logprobs, prompt_logprobs, pooling } =
            request;
        let Scheduling { priority, cache_salt } = scheduling;
        let penalized = sampling.presence_penalty != 0.0
            || sampling.frequency_penalty != 0.0
            || sampling.repetition_penalty != 1.0;
        Self {
            rank: Rank { priority, id },
            prompt_len: prompt.len(),
            max_len: prompt.len().saturating_add(stop.max_tokens).min(max_model_len),
            computed: 0,
            block_table: BlockTable::default(),
            chain: HashChain::new(cache_salt.as_deref()),
            named_blocks: 0,
            cached_tokens: None,
            drafted: Vec::new(),
            counts: penalized.then(|| TokenCounts::of_prompt(&prompt)),
            tokens: prompt,
            sampling,
            stop,
            logprobs,
            prompt_logprobs: prompt_logprobs.map(|top| PromptLogprobs { top, scored: Vec::new() }),
            pooled: pooling.map(PoolingState::new),
            prompt_done: false,
            ends_next: None,
            finish: None,
        }
    }

    /// Its number.
    pub(super) fn id(&self) -> SequenceId {
        self.rank.id
    }

    /// Its place among others.
    pub(super) fn rank(&self) -> Rank {
        self.rank
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

    /// The prompt's hidden states, while they are added up.
    pub(super) fn pooled(&self) -> Option<&PoolingState> {
        self.pooled.as_ref()
    }

    /// As [`pooled`](Self::pooled), to add some.
    pub(super) fn pooled_mut(&mut self) -> Option<&mut PoolingState> {
        self.pooled.as_mut()
    }

    /// Why it ended; `None` while it has not.
    pub(super) fn finish(&self) -> Option<FinishReason> {
        self.finish
    }

    /// Tokens so far.
    pub(super) fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt_len,
            cached_tokens: self.cached_tokens.unwrap_or(0),
            completion_tokens: self.generated(),
        }
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
            cached_tokens: self.cached_tokens.unwrap_or(0),
            logprobs: self.prompt_logprobs.take().map(|wanted| wanted.scored),
            embedding: self.pooled.take().map(PoolingState::finish),
        })
    }

    /// Appends a sampled token, which may end the sequence.
    pub(super) fn push(&mut self, token: u32) {
        self.tokens.push(token);
        if let Some(counts) = &mut self.counts {
            counts.generated(token);
        }
        self.finish = self.finish_after(token);
    }

    /// The next token to be appended will be the last, for this reason if there is no other.
    pub(super) fn end_with_next(&mut self, reason: FinishReason) {
        self.ends_next = Some(reason);
    }

    /// Ends a sequence that generates nothing.
    pub(super) fn finish_without_token(&mut self) {
        self.finish = Some(FinishReason::Length);
    }

    /// How much of its beginning is in `blocks` and need not be computed. The last token always is, for the logits that
    /// follow it, and so is each prompt token whose successor is to be scored, and all of a prompt that is pooled.
    pub(super) fn cached_beginning(&mut self, blocks: &BlockManager) -> Hit {
        self.chain.extend(&self.tokens);
        let before_last = if self.pooled.is_some() { 0 } else { self.tokens.len() - 1 };
        let useful = self.unscored_prompt().map_or(before_last, |(_, unscored)| unscored.min(before_last));
        blocks.find(&self.chain.blocks()[..useful / KV_BLOCK_TOKENS])
    }

    /// Begins with the blocks of `hit`, as [`cached_beginning`](Self::cached_beginning) found them.
    pub(super) fn begin_with(&mut self, hit: Hit, blocks: &mut BlockManager) {
        blocks.share(&mut self.block_table, &self.chain.blocks()[..hit.blocks]);
        self.named_blocks = hit.blocks;
        self.computed = hit.blocks * KV_BLOCK_TOKENS;
    }

    /// It runs. The first time, this says how many of its tokens the cache had.
    pub(super) fn started(&mut self) -> Option<usize> {
        if self.cached_tokens.is_some() {
            return None;
        }
        self.cached_tokens = Some(self.computed);
        self.cached_tokens
    }

    /// Lets others find the blocks that are full.
    pub(super) fn name_full_blocks(&mut self, blocks: &mut BlockManager) {
        let full = self.computed / KV_BLOCK_TOKENS;
        if full == self.named_blocks {
            return;
        }
        self.chain.extend(&self.tokens[..full * KV_BLOCK_TOKENS]);
        let new = self.named_blocks..full;
        for (&block, &name) in self.block_table.blocks()[new.clone()].iter().zip(&self.chain.blocks()[new]) {
            blocks.name(block, name);
        }
        self.named_blocks = full;
    }

    /// The next `count` tokens to compute: known ones, or the last one and its draft.
    pub(super) fn next_tokens(&self, count: usize) -> &[u32] {
        if self.drafted.is_empty() {
            &self.tokens[self.computed..self.computed + count]
        } else {
            &self.drafted[..count]
        }
    }

    /// Drafts up to `at_most` tokens to be verified in the next step; says how many. Only where the last token is all
    /// that is to be computed, so that what is drawn at each place depends on the logits of that place alone.
    pub(super) fn draft(&mut self, lookup: NgramLookup, at_most: usize) -> usize {
        self.drafted.clear();
        // The token after the draft must fit too.
        let room = self.max_len.saturating_sub(self.tokens.len() + 1);
        let draft = ngram::draft(&self.tokens, lookup, at_most.min(room));
        if let (false, Some(&last)) = (draft.is_empty(), self.tokens.last()) {
            self.drafted.push(last);
            self.drafted.extend_from_slice(draft);
        }
        self.drafted.len().saturating_sub(1)
    }

    /// Forgets the draft; returns it.
    pub(super) fn take_draft(&mut self) -> Vec<u32> {
        let mut drafted = std::mem::take(&mut self.drafted);
        drafted.drain(..drafted.len().min(1));
        drafted
    }

    /// Gives its blocks back: it is computed again, as far as the cache forgets it, and sampling goes on where it was.
    pub(super) fn restart(&mut self, blocks: &mut BlockManager) {
        blocks.release(&mut self.block_table);
        self.computed = 0;
        if let Some(pooled) = &mut self.pooled {
            pooled.restart();
        }
        self.named_blocks = 0;
        self.drafted.clear();
    }

    fn finish_after(&self, token: u32) -> Option<FinishReason> {
        let may_stop = self.generated() > self.stop.min_tokens;
        if may_stop && self.stop.eos_token_ids.contains(&token) {
            Some(FinishReason::Eos)
        } else if may_stop && self.stop.stop_token_ids.contains(&token) {
            Some(FinishReason::StopToken(token))
        } else if self.ends_next.is_some() {
            self.ends_next
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
    /// How much of it the cache had.
    pub(super) cached_tokens: usize,
    /// Log-probabilities of its tokens 1.., if asked for.
    pub(super) logprobs: Option<Vec<TokenLogprobs>>,
    /// Its pooled hidden states, if asked for.
    pub(super) embedding: Option<Vec<f32>>,
}

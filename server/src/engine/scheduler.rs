//! Who runs in the next step, how many tokens each, in which KV blocks. Pure: no device, no tokenizer, no clock.
//!
//! First come, first served, or by priority, with continuous batching and chunked prefill. Every step gives the running
//! sequences their tokens in order of rank, a chunk of a prompt leaving one for each that follows, and admits waiting
//! ones with what is left of the budget. A sequence begins with the blocks that the prefix cache has of it, gets the
//! blocks of all its known tokens on admission and one more at a time while it decodes. When none is left, the last
//! running sequence gives its blocks back and is computed again later. Since the first always gets what it needs,
//! everything that is admitted ends.

mod batch;

use std::collections::VecDeque;

use kernels::KV_BLOCK_TOKENS;

use super::block_manager::{BlockManager, Hit, blocks_for};
use super::ngram::NgramLookup;
use super::sampler::is_processed;
use super::sequence::{Sequence, SequenceId};

pub(super) use batch::{Batch, BatchItem, NewToken, Speculated, Update};

/// Bounds of one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limits {
    /// Sequences that run at a time.
    pub(super) max_num_seqs: usize,
    /// Tokens that one step computes, over all sequences.
    pub(super) max_num_batched_tokens: usize,
}

/// What the scheduler may do beyond giving turns.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Features {
    /// Find the beginnings of sequences in the blocks of others, also of those that have ended.
    pub(super) prefix_caching: bool,
    /// Draft tokens that a step verifies, with what is left of its budget.
    pub(super) speculation: Option<NgramLookup>,
}

/// The sequences that wait and run, and their KV blocks.
#[derive(Debug)]
pub(super) struct Scheduler {
    limits: Limits,
    features: Features,
    blocks: BlockManager,
    /// In order of rank.
    waiting: VecDeque<Sequence>,
    /// In order of rank when a step is planned.
    running: Vec<Sequence>,
    speculated: Speculated,
}

impl Scheduler {
    /// An idle scheduler over a cache of `blocks` blocks. Both limits are at least 1.
    pub(super) fn new(limits: Limits, features: Features, blocks: usize) -> Self {
        assert!(
            limits.max_num_seqs > 0 && limits.max_num_batched_tokens > 0,
            "a step holds something: {limits:?}"
        );
        let blocks = BlockManager::new(blocks);
        Self {
            limits,
            features,
            blocks,
            waiting: VecDeque::new(),
            running: Vec::new(),
            speculated: Speculated::default(),
        }
    }

    /// Tokens of the longest sequence that the cache can hold.
    pub(super) fn capacity_tokens(&self) -> usize {
        self.blocks.total() * KV_BLOCK_TOKENS
    }

    /// Queues a sequence. Its id is greater than all before it, its prompt is not empty, and it ends within
    /// [`capacity_tokens`](Self::capacity_tokens): a longer one would never be admitted, nor anything behind it.
    pub(super) fn add(&mut self, sequence: Sequence) {
        debug_assert!(!sequence.tokens().is_empty() && sequence.max_len() <= self.capacity_tokens());
        debug_assert!(self.sequences().all(|other| other.id() < sequence.id()));
        self.enqueue(sequence);
    }

    /// Drops a sequence, wherever it is, and frees its blocks. Not between `schedule` and `commit`.
    pub(super) fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        if let Some(index) = self.running.iter().position(|sequence| sequence.id() == id) {
            let mut sequence = self.running.remove(index);
            self.blocks.release(&mut sequence.block_table);
            return Some(sequence);
        }
        let index = self.waiting.iter().position(|sequence| sequence.id() == id)?;
        self.waiting.remove(index)
    }

    /// Plans the next step into `batch`, which stays empty only when there is nothing to do.
    pub(super) fn schedule(&mut self, batch: &mut Batch) {
        batch.clear();
        if !self.running.is_sorted_by_key(Sequence::rank) {
            self.running.sort_unstable_by_key(Sequence::rank);
        }
        let mut budget = self.limits.max_num_batched_tokens;
        let mut index = 0;
        while index < self.running.len() && budget > 0 {
            if !self.make_room_for(index, batch) {
                break;
            }
            // A prompt does not hold up those that follow.
            let following = self.running.len() - index - 1;
            budget -= self.put(index, budget.saturating_sub(following).max(1), batch);
            index += 1;
        }
        // A preemption means that memory is short: admitting now would take it from those that were just served.
        if batch.preempted.is_empty() {
            while budget > 0 && self.admit(batch) {
                budget -= self.put(self.running.len() - 1, budget, batch);
            }
        }
    }

    /// Records that the step ran and drew `sampled`: for each item that samples, in order, a token after its last known
    /// one and after each of its draft. Appends what happened to `updates`, one for each token that a sequence gets: the
    /// first that was drawn, and the next as long as the draft said the one before. Sequences that ended are gone, and
    /// their blocks free.
    pub(super) fn commit(&mut self, batch: &Batch, sampled: &[u32], updates: &mut Vec<Update>) {
        debug_assert_eq!(sampled.len(), batch.items.iter().map(BatchItem::draws).sum::<usize>());
        let mut first_draw = 0;
        for item in &batch.items {
            let sequence = &mut self.running[item.index];
            let id = sequence.id();
            let mut prompt = sequence.advance(item.tokens - item.drafts);
            let draft = sequence.take_draft();
            let draws = first_draw..first_draw + item.draws();
            first_draw = draws.end;
            let mut accepted = 0;
            for draw in draws {
                let token = sampled[draw];
                sequence.push(token);
                let finished = sequence.finish().map(|reason| (reason, sequence.usage()));
                let token_update = Some(NewToken { id: token, draw });
                updates.push(Update { id, prompt: prompt.take(), token: token_update, finished });
                if draft.get(accepted) != Some(&token) {
                    break;
                }
                accepted += 1;
                // Its keys and values are those of the draft; of the rest of a draft, they are written over.
                let _ = sequence.advance(1);
                if finished.is_some() {
                    break;
                }
            }
            if item.drafts > 0 {
                self.speculated.drafts += 1;
                self.speculated.tokens += item.drafts as u64;
                self.speculated.accepted += accepted as u64;
            }
            if prompt.is_some() {
                if !sequence.generates() {
                    sequence.finish_without_token();
                }
                let finished = sequence.finish().map(|reason| (reason, sequence.usage()));
                updates.push(Update { id, prompt, token: None, finished });
            }
            if self.features.prefix_caching {
                sequence.name_full_blocks(&mut self.blocks);
            }
        }
        self.running.retain_mut(|sequence| {
            if sequence.finish().is_some() {
                self.blocks.release(&mut sequence.block_table);
            }
            sequence.finish().is_none()
        });
    }

    /// What came of drafts since the start.
    pub(super) fn speculated(&self) -> Speculated {
        self.speculated
    }

    /// The running sequences.
    pub(super) fn running(&self) -> &[Sequence] {
        &self.running
    }

    /// As [`running`](Self::running), to add prompt log-probabilities.
    pub(super) fn running_mut(&mut self) -> &mut [Sequence] {
        &mut self.running
    }

    /// Whether no sequence is left.
    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Every sequence, the running ones first.
    pub(super) fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        self.running.iter().chain(&self.waiting)
    }

    /// The KV blocks.
    pub(super) fn blocks(&self) -> &BlockManager {
        &self.blocks
    }

    /// Puts a sequence in its place among the waiting ones.
    fn enqueue(&mut self, sequence: Sequence) {
        let rank = sequence.rank();
        // Most come last; those that were preempted, first.
        let place = match self.waiting.back() {
            Some(last) if last.rank() > rank => self.waiting.partition_point(|other| other.rank() < rank),
            _ => self.waiting.len(),
        };
        self.waiting.insert(place, sequence);
    }

    /// Gives `running[index]` the blocks of all its tokens, from those after it if there is no other way. `false`
    /// if it was the last itself, and is preempted.
    fn make_room_for(&mut self, index: usize, batch: &mut Batch) -> bool {
        loop {
            let sequence = &mut self.running[index];
            let tokens = sequence.tokens().len();
            if self.blocks.grow(&mut sequence.block_table, tokens) {
                return true;
            }
            // Those after `index` have no tokens in this batch yet.
            let mut last = self.running.pop().expect("running holds at least `index`");
            last.restart(&mut self.blocks);
            batch.preempted.push(last.id());
            self.enqueue(last);
            if self.running.len() == index {
                return false;
            }
        }
    }

    /// Moves the first waiting sequence to the running ones, with blocks for all its tokens, if there is room.
    fn admit(&mut self, batch: &mut Batch) -> bool {
        if self.running.len() == self.limits.max_num_seqs {
            return false;
        }
        let Some(first) = self.waiting.front_mut() else { return false };
        let tokens = first.tokens().len();
        let hit =
            if self.features.prefix_caching { first.cached_beginning(&self.blocks) } else { Hit::default() };
        // A block for each of the others to grow into, lest they soon take these back.
        let reserve = self.running.len();
        let from_free = blocks_for(tokens) - (hit.blocks - hit.idle);
        if self.blocks.free() < from_free + reserve {
            return false;
        }
        first.begin_with(hit, &mut self.blocks);
        let grown = self.blocks.grow(&mut first.block_table, tokens);
        assert!(grown, "free blocks were counted");
        // Who wants every prompt token scored does not look for any.
        let looks = self.features.prefix_caching && first.unscored_prompt().is_none();
        if let Some(cached) = first.started().filter(|_| looks) {
            batch.prefix_queries += tokens;
            batch.prefix_hits += cached;
        }
        batch.admitted.push(first.id());
        self.running.extend(self.waiting.pop_front());
        true
    }

    /// Puts as many tokens of `running[index]` into the batch as `budget` allows; returns how many.
    fn put(&mut self, index: usize, budget: usize, batch: &mut Batch) -> usize {
        let sequence = &self.running[index];
        let known = sequence.remaining().min(budget);
        let samples = known == sequence.remaining() && sequence.generates();
        let drafts = if samples && known == 1 { self.draft(index, budget - 1) } else { 0 };
        batch.items.push(BatchItem { index, tokens: known + drafts, drafts, samples });
        known + drafts
    }

    /// Drafts up to `at_most` tokens for `running[index]`, and gives it blocks for them as far as nobody else soon needs
    /// these; says how many. None where what is drawn depends on what was drawn before.
    fn draft(&mut self, index: usize, at_most: usize) -> usize {
        let reserve = self.running.len();
        let sequence = &mut self.running[index];
        let Some(lookup) = self.features.speculation.filter(|_| !is_processed(sequence)) else { return 0 };
        let known = sequence.tokens().len();
        let held = sequence.block_table.blocks().len();
        let spare = self.blocks.free().saturating_sub(reserve);
        let room = (held + spare) * KV_BLOCK_TOKENS - known;
        let drafts = sequence.draft(lookup, at_most.min(room));
        let grown = self.blocks.grow(&mut sequence.block_table, known + drafts);
        assert!(grown, "free blocks were counted");
        drafts
    }
}

#[cfg(test)]
mod tests;

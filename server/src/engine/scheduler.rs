//! Who runs in the next step, how many tokens each, in which KV blocks. Pure: no device, no tokenizer, no clock.
//!
//! First come, first served, with continuous batching and chunked prefill. Every step gives the running sequences
//! their tokens in order of arrival, so that decodes come before the chunk of a prompt, and admits waiting ones with
//! what is left of the budget. A sequence gets the blocks of all its known tokens on admission and one more at a time
//! while it decodes. When none is left, the youngest running sequence gives its blocks back and is computed again
//! later. Since the oldest always gets what it needs, everything that is admitted ends.

use std::collections::VecDeque;

use kernels::KV_BLOCK_TOKENS;

use super::block_manager::{BlockManager, blocks_for};
use super::request::{FinishReason, Usage};
use super::sequence::{PromptDone, Sequence, SequenceId};

/// Bounds of one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limits {
    /// Sequences that run at a time.
    pub(super) max_num_seqs: usize,
    /// Tokens that one step computes, over all sequences.
    pub(super) max_num_batched_tokens: usize,
}

/// One step's work. Made by [`Scheduler::schedule`], ended by [`Scheduler::commit`]; kept between steps for its memory.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// Which sequences run, in order of arrival.
    pub(super) items: Vec<BatchItem>,
    /// Sequences that begin, or begin again, to run.
    pub(super) admitted: Vec<SequenceId>,
    /// Sequences that gave their blocks back.
    pub(super) preempted: Vec<SequenceId>,
}

impl Batch {
    /// Tokens that the step computes.
    pub(super) fn tokens(&self) -> usize {
        self.items.iter().map(|item| item.tokens).sum()
    }

    fn clear(&mut self) {
        self.items.clear();
        self.admitted.clear();
        self.preempted.clear();
    }
}

/// One sequence's part of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BatchItem {
    /// Its index in [`Scheduler::running`].
    pub(super) index: usize,
    /// Tokens to compute, following those that are.
    pub(super) tokens: usize,
    /// Whether the last of them is the last known one, so that the next token is drawn.
    pub(super) samples: bool,
}

/// What a step did to a sequence that its client should hear of.
#[derive(Debug, PartialEq)]
pub(super) struct Update {
    /// The sequence.
    pub(super) id: SequenceId,
    /// The prompt is complete; said once, however often it is computed.
    pub(super) prompt: Option<PromptDone>,
    /// The token that was drawn.
    pub(super) token: Option<u32>,
    /// The sequence ended: why, and with how many tokens.
    pub(super) finished: Option<(FinishReason, Usage)>,
}

/// The sequences that wait and run, and their KV blocks.
#[derive(Debug)]
pub(super) struct Scheduler {
    limits: Limits,
    blocks: BlockManager,
    /// In order of arrival, all younger than the running ones.
    waiting: VecDeque<Sequence>,
    /// In order of arrival. Only the last can have more than one token to compute after a step.
    running: Vec<Sequence>,
}

impl Scheduler {
    /// An idle scheduler over a cache of `blocks` blocks. Both limits are at least 1.
    pub(super) fn new(limits: Limits, blocks: usize) -> Self {
        assert!(
            limits.max_num_seqs > 0 && limits.max_num_batched_tokens > 0,
            "a step holds something: {limits:?}"
        );
        Self { limits, blocks: BlockManager::new(blocks), waiting: VecDeque::new(), running: Vec::new() }
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
        self.waiting.push_back(sequence);
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
        let mut budget = self.limits.max_num_batched_tokens;
        let mut index = 0;
        while index < self.running.len() && budget > 0 {
            if !self.make_room_for(index, batch) {
                break;
            }
            budget -= self.put(index, budget, batch);
            index += 1;
        }
        // A preemption means that memory is short: admitting now would take it from those that were just served.
        if batch.preempted.is_empty() {
            while budget > 0 && self.admit(batch) {
                budget -= self.put(self.running.len() - 1, budget, batch);
            }
        }
    }

    /// Records that the step ran and drew `sampled`, one token for each item that samples, in order. Appends what
    /// happened to `updates`; sequences that ended are gone, and their blocks free.
    pub(super) fn commit(&mut self, batch: &Batch, sampled: &[u32], updates: &mut Vec<Update>) {
        debug_assert_eq!(sampled.len(), batch.items.iter().filter(|item| item.samples).count());
        let mut sampled = sampled.iter();
        for item in &batch.items {
            let sequence = &mut self.running[item.index];
            let prompt = sequence.advance(item.tokens);
            let token = if item.samples { sampled.next().copied() } else { None };
            if let Some(token) = token {
                sequence.push(token);
            } else if prompt.is_some() && !sequence.generates() {
                sequence.finish_without_token();
            }
            if prompt.is_some() || token.is_some() {
                let finished = sequence.finish().map(|reason| (reason, sequence.usage()));
                updates.push(Update { id: sequence.id(), prompt, token, finished });
            }
        }
        self.running.retain_mut(|sequence| {
            if sequence.finish().is_some() {
                self.blocks.release(&mut sequence.block_table);
            }
            sequence.finish().is_none()
        });
    }

    /// The running sequences, in order of arrival.
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

    /// Every sequence, in order of arrival.
    pub(super) fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        self.running.iter().chain(&self.waiting)
    }

    /// The KV blocks.
    pub(super) fn blocks(&self) -> &BlockManager {
        &self.blocks
    }

    /// Gives `running[index]` the blocks of all its tokens, from younger sequences if there is no other way. `false`
    /// if it was the youngest itself, and is preempted.
    fn make_room_for(&mut self, index: usize, batch: &mut Batch) -> bool {
        loop {
            let sequence = &mut self.running[index];
            let tokens = sequence.tokens().len();
            if self.blocks.grow(&mut sequence.block_table, tokens) {
                return true;
            }
            // Those after `index` have no tokens in this batch yet.
            let mut youngest = self.running.pop().expect("running holds at least `index`");
            self.blocks.release(&mut youngest.block_table);
            youngest.restart();
            batch.preempted.push(youngest.id());
            self.waiting.push_front(youngest);
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
        // A block for each of the others to grow into, lest they soon take these back.
        let reserve = self.running.len();
        if self.blocks.free() < blocks_for(tokens) + reserve
            || !self.blocks.grow(&mut first.block_table, tokens)
        {
            return false;
        }
        batch.admitted.push(first.id());
        self.running.extend(self.waiting.pop_front());
        true
    }

    /// Puts as many tokens of `running[index]` into the batch as `budget` allows; returns how many.
    fn put(&self, index: usize, budget: usize, batch: &mut Batch) -> usize {
        let sequence = &self.running[index];
        let tokens = sequence.remaining().min(budget);
        let samples = tokens == sequence.remaining() && sequence.generates();
        batch.items.push(BatchItem { index, tokens, samples });
        tokens
    }
}

#[cfg(test)]
mod tests;

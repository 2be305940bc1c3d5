//! One step's work, and what came of it.

use super::super::request::{FinishReason, Usage};
use super::super::sequence::{PromptDone, SequenceId};

/// One step's work. Made by [`Scheduler::schedule`](super::Scheduler::schedule), ended by
/// [`Scheduler::commit`](super::Scheduler::commit); kept between steps for its memory.
#[derive(Debug, Default)]
pub(in crate::engine) struct Batch {
    /// Which sequences run, in order of rank but for those that were just admitted.
    pub(in crate::engine) items: Vec<BatchItem>,
    /// Sequences that begin, or begin again, to run.
    pub(in crate::engine) admitted: Vec<SequenceId>,
    /// Sequences that gave their blocks back.
    pub(in crate::engine) preempted: Vec<SequenceId>,
    /// Prompt tokens that were looked for in the prefix cache.
    pub(in crate::engine) prefix_queries: usize,
    /// Those that were found there.
    pub(in crate::engine) prefix_hits: usize,
}

impl Batch {
    /// Tokens that the step computes.
    pub(in crate::engine) fn tokens(&self) -> usize {
        self.items.iter().map(|item| item.tokens).sum()
    }

    /// Empties it, for the next plan.
    pub(super) fn clear(&mut self) {
        self.items.clear();
        self.admitted.clear();
        self.preempted.clear();
        self.prefix_queries = 0;
        self.prefix_hits = 0;
    }
}

/// One sequence's part of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) struct BatchItem {
    /// Its index in [`Scheduler::running`](super::Scheduler::running).
    pub(in crate::engine) index: usize,
    /// Tokens to compute, following those that are.
    pub(in crate::engine) tokens: usize,
    /// How many of them are a draft, behind the last known token.
    pub(in crate::engine) drafts: usize,
    /// Whether the last known token is among them, so that the next one is drawn, and one after each of the draft.
    pub(in crate::engine) samples: bool,
}

impl BatchItem {
    /// Tokens that are drawn, one for each of its last rows.
    pub(in crate::engine) fn draws(&self) -> usize {
        if self.samples { 1 + self.drafts } else { 0 }
    }
}

/// What a step did to a sequence that its client should hear of.
#[derive(Debug, PartialEq)]
pub(in crate::engine) struct Update {
    /// The sequence.
    pub(in crate::engine) id: SequenceId,
    /// The prompt is complete; said once, however often it is computed.
    pub(in crate::engine) prompt: Option<PromptDone>,
    /// A token that was drawn.
    pub(in crate::engine) token: Option<NewToken>,
    /// The sequence ended: why, and with how many tokens.
    pub(in crate::engine) finished: Option<(FinishReason, Usage)>,
}

/// A token that a sequence got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) struct NewToken {
    /// Its id.
    pub(in crate::engine) id: u32,
    /// Which of the step's draws it is.
    pub(in crate::engine) draw: usize,
}

/// What came of drafts since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::engine) struct Speculated {
    /// Drafts that were verified.
    pub(in crate::engine) drafts: u64,
    /// Their tokens.
    pub(in crate::engine) tokens: u64,
    /// Those that were what was drawn.
    pub(in crate::engine) accepted: u64,
}

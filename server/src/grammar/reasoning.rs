//! A grammar for the answer of a model that thinks aloud before it: what it thinks is free.

use crate::engine::{Canceller, Constraint, ConstraintError, Grammar, Progress, SharedGrammar, TokenMask};

/// The tokens that a part of reasoning is between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReasoningTokens {
    /// `<think>`.
    pub begin: u32,
    /// `</think>`.
    pub end: u32,
    /// Whether the prompt has begun the reasoning.
    pub begun: bool,
}

/// A grammar that begins behind the reasoning. A model that does not begin to reason at once begins with the grammar.
pub(super) struct AfterReasoning {
    answer: SharedGrammar,
    tokens: ReasoningTokens,
    free: TokenMask,
}

impl AfterReasoning {
    /// `answer` behind `tokens`, between which anything of `free` may be said.
    pub(super) fn new(answer: SharedGrammar, tokens: ReasoningTokens, free: TokenMask) -> Self {
        Self { answer, tokens, free }
    }
}

impl Grammar for AfterReasoning {
    fn begin(&self) -> Box<dyn Constraint> {
        let phase = if self.tokens.begun { Phase::Reasoning } else { Phase::Start };
        Box::new(Place { answer: self.answer.0.begin(), tokens: self.tokens, free: self.free.clone(), phase })
    }
}

struct Place {
    answer: Box<dyn Constraint>,
    tokens: ReasoningTokens,
    free: TokenMask,
    phase: Phase,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Nothing was said.
    Start,
    Reasoning,
    Answer,
}

impl Constraint for Place {
    fn allowed(&mut self) -> Result<TokenMask, ConstraintError> {
        match self.phase {
            Phase::Start => {
                let mut mask = self.answer.allowed()?;
                mask.insert(self.tokens.begin);
                Ok(mask)
            }
            Phase::Reasoning => Ok(self.free.clone()),
            Phase::Answer => self.answer.allowed(),
        }
    }

    fn accept(&mut self, token: u32) -> Result<Progress, ConstraintError> {
        match self.phase {
            Phase::Start if token == self.tokens.begin => self.phase = Phase::Reasoning,
            Phase::Reasoning if token == self.tokens.end => self.phase = Phase::Answer,
            Phase::Reasoning => {}
            Phase::Start | Phase::Answer => {
                self.phase = Phase::Answer;
                return self.answer.accept(token);
            }
        }
        Ok(Progress::Open)
    }

    fn canceller(&self) -> Option<Canceller> {
        self.answer.canceller()
    }
}

//! `<think>…</think>` before an answer, as DeepSeek-R1, Qwen3 and their kin write it.

use super::marker::{Found, find};

pub(super) const BEGIN: &str = "<think>";
pub(super) const END: &str = "</think>";

/// Tells reasoning from what follows it. White space around both is dropped.
#[derive(Debug)]
pub(super) struct ReasoningParser {
    state: State,
    /// Text that was pushed and not handed out.
    held: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing but white space was said.
    Start,
    /// The next thing to be said is reasoning.
    ReasoningStart,
    Reasoning,
    /// The next thing to be said is the answer.
    AnswerStart,
    Answer,
}

impl ReasoningParser {
    /// A parser at the start of an answer; `begun`: the prompt has begun the reasoning.
    pub(super) fn new(begun: bool) -> Self {
        Self { state: if begun { State::ReasoningStart } else { State::Start }, held: String::new() }
    }

    /// Adds text; returns what is certain now: reasoning and answer.
    pub(super) fn push(&mut self, text: &str) -> (String, String) {
        self.held.push_str(text);
        let (mut thought, mut said) = (String::new(), String::new());
        while self.step(&mut thought, &mut said) {}
        (thought, said)
    }

    /// What was held back, when no more text follows.
    pub(super) fn finish(&mut self) -> (String, String) {
        let rest = std::mem::take(&mut self.held);
        match self.state {
            State::ReasoningStart | State::Reasoning => (rest.trim_end().to_owned(), String::new()),
            State::Start | State::AnswerStart | State::Answer => (String::new(), rest),
        }
    }

    /// Does what can be done with the held text; `false` when more must come first.
    fn step(&mut self, thought: &mut String, said: &mut String) -> bool {
        match self.state {
            State::Start => {
                let begun = self.held.trim_start();
                if let Some(rest) = begun.strip_prefix(BEGIN) {
                    self.held = rest.to_owned();
                    self.state = State::ReasoningStart;
                } else if BEGIN.starts_with(begun) {
                    return false;
                } else {
                    self.state = State::Answer;
                }
                true
            }
            State::ReasoningStart | State::AnswerStart => {
                self.held = self.held.trim_start().to_owned();
                if self.held.is_empty() {
                    return false;
                }
                self.state = if self.state == State::AnswerStart { State::Answer } else { State::Reasoning };
                true
            }
            State::Reasoning => match find(&self.held, END) {
                Found::At(at) => {
                    thought.push_str(self.held[..at].trim_end());
                    self.held = self.held[at + END.len()..].to_owned();
                    self.state = State::AnswerStart;
                    true
                }
                Found::Maybe(at) => {
                    // White space may be the last before the end.
                    let certain = self.held[..at].trim_end().len();
                    thought.push_str(&self.held[..certain]);
                    self.held.drain(..certain);
                    false
                }
            },
            State::Answer => {
                said.push_str(&std::mem::take(&mut self.held));
                false
            }
        }
    }
}

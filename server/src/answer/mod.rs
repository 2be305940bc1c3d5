//! What a chat model's text is made of: reasoning, content, calls of tools. Works on text that arrives in pieces, so that
//! a stream and a whole answer say the same.

mod call_scanner;
mod marker;
mod reasoning;
mod tool_calls;
mod tool_format;

pub use tool_calls::ToolCallParser;
pub use tool_format::{Tool, ToolFormat};

use reasoning::ReasoningParser;

/// A part of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// What the model thought before it answered.
    Reasoning(String),
    /// What it says.
    Content(String),
    /// It calls a tool; its arguments follow.
    Call {
        /// Number of the call in this answer, from 0.
        index: usize,
        /// The tool's name.
        name: String,
    },
    /// More of a call's arguments: the JSON text of an object, as the model wrote it.
    Arguments {
        /// Number of the call.
        index: usize,
        /// The text.
        text: String,
    },
}

/// Takes an answer apart.
#[derive(Debug, Default)]
pub struct AnswerParser {
    reasoning: Option<ReasoningParser>,
    tools: Option<ToolCallParser>,
}

impl AnswerParser {
    /// A parser of an answer that is all content.
    pub fn new() -> Self {
        Self::default()
    }

    /// Looks for reasoning; `begun`: the prompt has begun it.
    #[must_use]
    pub fn with_reasoning(mut self, begun: bool) -> Self {
        self.reasoning = Some(ReasoningParser::new(begun));
        self
    }

    /// Looks for calls of tools.
    #[must_use]
    pub fn with_tools(mut self, tools: ToolCallParser) -> Self {
        self.tools = Some(tools);
        self
    }

    /// Adds text; returns what is certain now.
    pub fn push(&mut self, text: &str) -> Vec<Part> {
        let mut parts = Vec::new();
        match &mut self.reasoning {
            Some(reasoning) => {
                let (thought, said) = reasoning.push(text);
                push_text(&mut parts, Part::Reasoning(thought));
                self.push_said(&said, &mut parts);
            }
            None => self.push_said(text, &mut parts),
        }
        parts
    }

    /// What was held back, when no more text follows.
    pub fn finish(&mut self) -> Vec<Part> {
        let mut parts = Vec::new();
        if let Some(reasoning) = &mut self.reasoning {
            let (thought, said) = reasoning.finish();
            push_text(&mut parts, Part::Reasoning(thought));
            self.push_said(&said, &mut parts);
        }
        if let Some(tools) = &mut self.tools {
            tools.finish(&mut parts);
        }
        parts
    }

    fn push_said(&mut self, text: &str, parts: &mut Vec<Part>) {
        match &mut self.tools {
            Some(tools) => tools.push(text, parts),
            None => push_text(parts, Part::Content(text.to_owned())),
        }
    }
}

/// Adds a part of text, to the one before it where it goes on.
fn push_text(parts: &mut Vec<Part>, part: Part) {
    match (parts.last_mut(), &part) {
        (_, Part::Reasoning(text) | Part::Content(text) | Part::Arguments { text, .. })
            if text.is_empty() => {}
        (Some(Part::Reasoning(before)), Part::Reasoning(text))
        | (Some(Part::Content(before)), Part::Content(text)) => before.push_str(text),
        (Some(Part::Arguments { index: before, text: said }), Part::Arguments { index, text })
            if before == index =>
        {
            said.push_str(text);
        }
        _ => parts.push(part),
    }
}

#[cfg(test)]
mod tests;

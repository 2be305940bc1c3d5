//! The answer to a chat: whole, or in the parts that a stream sends.

use serde::Serialize;
use utoipa::ToSchema;

use crate::answer::{Part, ToolFormat};
use crate::http::generation::{FinishReasonName, StopReason};
use crate::http::logprobs::{ChatLogprobs, PromptLogprobs, RankedToken};
use crate::http::usage::Usage;

pub(in crate::http) const ROLE: &str = "assistant";

/// An answer, or an event of a stream.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ChatResponse<C> {
    pub(in crate::http) id: String,
    /// `chat.completion`, or `chat.completion.chunk`.
    pub(in crate::http) object: &'static str,
    /// Seconds since 1970.
    pub(in crate::http) created: u64,
    pub(in crate::http) model: String,
    pub(in crate::http) choices: Vec<C>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) usage: Option<Usage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Option<HashMap<String, RankedToken>>>>)]
    pub(in crate::http) prompt_logprobs: Option<PromptLogprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) prompt_token_ids: Option<Vec<u32>>,
}

/// A whole answer.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ChatChoice)]
pub(in crate::http) struct Choice {
    pub(in crate::http) index: usize,
    pub(in crate::http) message: Message,
    #[serde(flatten)]
    pub(in crate::http) common: Common,
}

/// What the model says. Content is `null` where it only calls tools.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct Message {
    role: &'static str,
    content: Option<String>,
    refusal: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCall>,
}

/// A part of an answer, as a stream sends it.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ChunkChoice {
    pub(in crate::http) index: usize,
    pub(in crate::http) delta: MessageDelta,
    #[serde(flatten)]
    pub(in crate::http) common: Common,
}

/// What is added to a message.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(in crate::http) struct MessageDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCall>,
}

/// A call of a tool; in a stream, its id, type and name come first, its arguments piece by piece.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub(in crate::http) struct ToolCall {
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    r#type: Option<&'static str>,
    function: FunctionCall,
}

#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
struct FunctionCall {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    arguments: String,
}

/// What a whole answer and a part of one have in common.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(in crate::http) struct Common {
    pub(in crate::http) logprobs: Option<ChatLogprobs>,
    #[schema(value_type = Option<FinishReasonName>)]
    pub(in crate::http) finish_reason: Option<&'static str>,
    /// The stop string or token that ended the answer.
    pub(in crate::http) stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(in crate::http) token_ids: Option<Vec<u32>>,
}

impl Common {
    /// Adds what follows.
    pub(in crate::http) fn append(&mut self, next: Self) {
        match (&mut self.logprobs, next.logprobs) {
            (Some(list), Some(next)) => list.append(next),
            (list @ None, next) => *list = next,
            (Some(_), None) => {}
        }
        self.token_ids = match (self.token_ids.take(), next.token_ids) {
            (Some(ids), Some(next)) => Some([ids, next].concat()),
            (ids, next) => ids.or(next),
        };
        self.finish_reason = next.finish_reason;
        self.stop_reason = next.stop_reason;
    }
}

/// A message that is being put together.
#[derive(Debug, Default)]
pub(in crate::http) struct MessageBuilder {
    content: String,
    reasoning: String,
    calls: Vec<ToolCall>,
}

impl MessageBuilder {
    /// Adds a part.
    pub(in crate::http) fn push(&mut self, part: Part, format: Option<ToolFormat>) {
        match part {
            Part::Content(text) => self.content.push_str(&text),
            Part::Reasoning(text) => self.reasoning.push_str(&text),
            Part::Call { name, .. } => self.calls.push(ToolCall::begin(None, name, format)),
            Part::Arguments { index, text } => {
                if let Some(call) = self.calls.get_mut(index) {
                    call.function.arguments.push_str(&text);
                }
            }
        }
    }

    /// The message.
    pub(in crate::http) fn finish(self) -> Message {
        let content = (self.calls.is_empty() || !self.content.is_empty()).then_some(self.content);
        let reasoning_content = (!self.reasoning.is_empty()).then_some(self.reasoning);
        Message { role: ROLE, content, refusal: None, reasoning_content, tool_calls: self.calls }
    }
}

impl MessageDelta {
    /// What these parts add; the first delta of a message has the role.
    pub(in crate::http) fn new(first: bool, parts: Vec<Part>, format: Option<ToolFormat>) -> Self {
        let mut delta = Self { role: first.then_some(ROLE), ..Self::default() };
        for part in parts {
            match part {
                Part::Content(text) => delta.content.get_or_insert_default().push_str(&text),
                Part::Reasoning(text) => delta.reasoning_content.get_or_insert_default().push_str(&text),
                Part::Call { index, name } => {
                    delta.tool_calls.push(ToolCall::begin(Some(index), name, format));
                }
                Part::Arguments { index, text } => delta.add_arguments(index, &text),
            }
        }
        if delta.reasoning_content.is_none() && delta.tool_calls.is_empty() {
            // Clients add contents up without a look.
            delta.content.get_or_insert_default();
        }
        delta
    }

    fn add_arguments(&mut self, index: usize, text: &str) {
        match self.tool_calls.last_mut().filter(|call| call.index == Some(index)) {
            Some(call) => call.function.arguments.push_str(text),
            None => self.tool_calls.push(ToolCall {
                index: Some(index),
                id: None,
                r#type: None,
                function: FunctionCall { name: None, arguments: text.to_owned() },
            }),
        }
    }
}

impl ToolCall {
    fn begin(index: Option<usize>, name: String, format: Option<ToolFormat>) -> Self {
        Self {
            index,
            id: format.map(ToolFormat::call_id),
            r#type: Some("function"),
            function: FunctionCall { name: Some(name), arguments: String::new() },
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_chunk_has_a_delta_and_an_answer_a_message() {
        let common = Common { finish_reason: Some("stop"), ..Common::default() };
        let delta = MessageDelta::new(false, vec![Part::Content("a".into())], None);
        let chunk = ChunkChoice { index: 0, delta, common };
        let expected = json!({"index": 0, "delta": {"content": "a"}, "logprobs": null, "finish_reason": "stop",
            "stop_reason": null});
        assert_eq!(serde_json::to_value(chunk).unwrap(), expected);
        let empty = MessageDelta::new(true, Vec::new(), None);
        assert_eq!(serde_json::to_value(empty).unwrap(), json!({"role": "assistant", "content": ""}));
    }

    #[test]
    fn parts_add_up() {
        let mut whole = Common::default();
        whole.append(Common { token_ids: Some(vec![1]), ..Common::default() });
        whole.append(Common { token_ids: Some(vec![2]), finish_reason: Some("length"), ..Common::default() });
        assert_eq!((whole.finish_reason, whole.token_ids), (Some("length"), Some(vec![1, 2])));
    }

    #[test]
    fn calls_on_the_wire() {
        let parts = || {
            let arguments = |text: &str| Part::Arguments { index: 0, text: text.into() };
            vec![Part::Call { index: 0, name: "f".into() }, arguments("{\"a\""), arguments(": 1}")]
        };
        let format = Some(ToolFormat::Hermes);
        let delta = serde_json::to_value(MessageDelta::new(false, parts(), format)).unwrap();
        let call = &delta["tool_calls"][0];
        assert_eq!((&call["index"], &call["type"]), (&json!(0), &json!("function")));
        assert_eq!(call["function"], json!({"name": "f", "arguments": "{\"a\": 1}"}));
        assert!(delta.get("content").is_none() && call["id"].as_str().unwrap().starts_with("call_"));
        let more = MessageDelta::new(false, vec![Part::Arguments { index: 0, text: "x".into() }], format);
        let expected = json!({"tool_calls": [{"index": 0, "function": {"arguments": "x"}}]});
        assert_eq!(serde_json::to_value(more).unwrap(), expected);
        let mut message = MessageBuilder::default();
        parts().into_iter().for_each(|part| message.push(part, format));
        message.push(Part::Reasoning("hm".into()), format);
        let message = serde_json::to_value(message.finish()).unwrap();
        assert_eq!((&message["content"], &message["reasoning_content"]), (&json!(null), &json!("hm")));
        assert_eq!(message["tool_calls"][0]["function"]["arguments"], "{\"a\": 1}");
    }
}

//! The items of a response's output, put together from the parts of an answer, with the events of a stream on the way.

use serde_json::{Value, json};

use crate::answer::Part;
use crate::http::logprobs::ChatLogprobs;

/// An event of a stream: its type, and its fields but for `type` and `sequence_number`.
pub(super) type Event = (&'static str, Value);

/// Puts the output together.
#[derive(Debug, Default)]
pub(super) struct Output {
    /// Complete items.
    items: Vec<Value>,
    open: Option<Open>,
}

/// The item that is being written.
#[derive(Debug)]
struct Open {
    kind: Kind,
    id: String,
    /// Its text or arguments.
    text: String,
    logprobs: Vec<Value>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Reasoning,
    Message,
    Call { call_id: String, name: String },
}

impl Open {
    fn new(kind: Kind) -> Self {
        let prefix = match kind {
            Kind::Reasoning => "rs",
            Kind::Message => "msg",
            Kind::Call { .. } => "fc",
        };
        Self { kind, id: new_id(prefix), text: String::new(), logprobs: Vec::new() }
    }

    /// The one part of its content; calls have none.
    fn part(&self) -> Option<Value> {
        match self.kind {
            Kind::Reasoning => Some(json!({"type": "reasoning_text", "text": self.text})),
            Kind::Message => Some(
                json!({"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs}),
            ),
            Kind::Call { .. } => None,
        }
    }

    fn item(&self, status: &str) -> Value {
        // Content comes in parts: an item that has just begun has none yet.
        let content: Vec<Value> = self.part().filter(|_| status != IN_PROGRESS).into_iter().collect();
        match &self.kind {
            Kind::Reasoning => {
                json!({"id": self.id, "type": "reasoning", "summary": [], "content": content, "status": status})
            }
            Kind::Message => {
                json!({"id": self.id, "type": "message", "role": "assistant", "status": status, "content": content})
            }
            Kind::Call { call_id, name } => {
                json!({"id": self.id, "type": "function_call", "call_id": call_id,
                "name": name, "arguments": self.text, "status": status})
            }
        }
    }
}

const IN_PROGRESS: &str = "in_progress";
const COMPLETED: &str = "completed";

/// A random id with a prefix: `msg_…`.
pub(super) fn new_id(prefix: &str) -> String {
    format!("{prefix}_{:032x}", fastrand::u128(..))
}

impl Output {
    /// Adds a part. `call_id` makes the id of a call; `logprobs` are those of the token that the part came with.
    pub(super) fn push(
        &mut self,
        part: Part,
        call_id: impl FnOnce() -> String,
        logprobs: Option<&ChatLogprobs>,
        events: &mut Vec<Event>,
    ) {
        let (kind, text) = match part {
            Part::Reasoning(text) => (Kind::Reasoning, text),
            Part::Content(text) => (Kind::Message, text),
            Part::Call { name, .. } => (Kind::Call { call_id: call_id(), name }, String::new()),
            Part::Arguments { text, .. } => return self.arguments(&text, events),
        };
        let goes_on = self.open.as_ref().is_some_and(|open| open.kind == kind);
        if !goes_on {
            self.close(COMPLETED, events);
            self.begin(kind, events);
        }
        let index = self.items.len();
        let Some(open) = self.open.as_mut().filter(|_| !text.is_empty()) else { return };
        open.text.push_str(&text);
        let entries: Vec<Value> = logprobs.map(ChatLogprobs::entries).unwrap_or_default();
        match open.kind {
            Kind::Reasoning => events.push((
                "response.reasoning_text.delta",
                json!({"item_id": open.id, "output_index": index, "content_index": 0, "delta": text}),
            )),
            _ => {
                events.push((
                    "response.output_text.delta",
                    json!({"item_id": open.id, "output_index": index, "content_index": 0, "delta": text, "logprobs": entries}),
                ));
                open.logprobs.extend(entries);
            }
        }
    }

    fn begin(&mut self, kind: Kind, events: &mut Vec<Event>) {
        let (open, index) = (Open::new(kind), self.items.len());
        events.push((
            "response.output_item.added",
            json!({"output_index": index, "item": open.item(IN_PROGRESS)}),
        ));
        if let Some(part) = open.part() {
            events.push((
                "response.content_part.added",
                json!({"item_id": open.id, "output_index": index, "content_index": 0, "part": part}),
            ));
        }
        self.open = Some(open);
    }

    fn arguments(&mut self, text: &str, events: &mut Vec<Event>) {
        let index = self.items.len();
        if let Some(open) = &mut self.open {
            open.text.push_str(text);
            events.push((
                "response.function_call_arguments.delta",
                json!({"item_id": open.id, "output_index": index, "delta": text}),
            ));
        }
    }

    fn close(&mut self, status: &str, events: &mut Vec<Event>) {
        let index = self.items.len();
        let Some(open) = self.open.take() else { return };
        let place = |mut fields: Value| {
            fields["item_id"] = Value::from(open.id.as_str());
            fields["output_index"] = Value::from(index);
            fields
        };
        match &open.kind {
            Kind::Reasoning => events.push((
                "response.reasoning_text.done",
                place(json!({"content_index": 0, "text": open.text})),
            )),
            Kind::Message => events.push((
                "response.output_text.done",
                place(json!({"content_index": 0, "text": open.text, "logprobs": open.logprobs})),
            )),
            Kind::Call { name, .. } => events.push((
                "response.function_call_arguments.done",
                place(json!({"name": name, "arguments": open.text})),
            )),
        }
        if let Some(part) = open.part() {
            events.push(("response.content_part.done", place(json!({"content_index": 0, "part": part}))));
        }
        let item = open.item(status);
        events.push(("response.output_item.done", json!({"output_index": index, "item": item})));
        self.items.push(item);
    }

    /// No more follows; `complete`: the answer was not cut short.
    pub(super) fn finish(&mut self, complete: bool, events: &mut Vec<Event>) {
        if self.items.is_empty() && self.open.is_none() {
            // An answer without a word is an empty message, not none.
            self.begin(Kind::Message, events);
        }
        self.close(if complete { COMPLETED } else { "incomplete" }, events);
    }

    /// The complete items.
    pub(super) fn items(&self) -> &[Value] {
        &self.items
    }

    /// What was said, as a chat's message, for who goes on from here.
    pub(super) fn message(&self) -> Value {
        let of_type = |kind: &'static str| self.items.iter().filter(move |item| item["type"] == kind);
        let content: String =
            of_type("message").filter_map(|item| item["content"][0]["text"].as_str()).collect();
        let calls: Vec<Value> = of_type("function_call")
            .map(|item| {
                let function = json!({"name": item["name"], "arguments": item["arguments"]});
                json!({"id": item["call_id"], "type": "function", "function": function})
            })
            .collect();
        let mut message = json!({"role": "assistant", "content": content});
        if !calls.is_empty() {
            message["tool_calls"] = Value::from(calls);
        }
        message
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_and_their_events() {
        let (mut output, mut events) = (Output::default(), Vec::new());
        let parts = [
            Part::Reasoning("Hm".into()),
            Part::Reasoning(".".into()),
            Part::Content("Hi".into()),
            Part::Call { index: 0, name: "f".into() },
            Part::Arguments { index: 0, text: "{}".into() },
        ];
        for part in parts {
            output.push(part, || "call_1".to_owned(), None, &mut events);
        }
        output.finish(true, &mut events);
        let names: Vec<&str> =
            events.iter().map(|(name, _)| name.strip_prefix("response.").unwrap()).collect();
        let expected = [
            "output_item.added",
            "content_part.added",
            "reasoning_text.delta",
            "reasoning_text.delta",
            "reasoning_text.done",
            "content_part.done",
            "output_item.done",
            "output_item.added",
            "content_part.added",
            "output_text.delta",
            "output_text.done",
            "content_part.done",
            "output_item.done",
            "output_item.added",
            "function_call_arguments.delta",
            "function_call_arguments.done",
            "output_item.done",
        ];
        assert_eq!(names, expected);
        let kinds: Vec<&Value> = output.items().iter().map(|item| &item["type"]).collect();
        assert_eq!(kinds, ["reasoning", "message", "function_call"]);
        assert_eq!(output.items()[0]["content"][0]["text"], "Hm.");
        assert!(
            events
                .iter()
                .filter(|(name, _)| name.ends_with("item.done"))
                .zip(0..)
                .all(|((_, fields), index)| fields["output_index"] == index)
        );
        let message = output.message();
        assert_eq!((&message["content"], &message["tool_calls"][0]["id"]), (&json!("Hi"), &json!("call_1")));
    }

    #[test]
    fn an_empty_answer_is_an_empty_message() {
        let (mut output, mut events) = (Output::default(), Vec::new());
        output.finish(false, &mut events);
        assert_eq!((output.items().len(), &output.items()[0]["status"]), (1, &json!("incomplete")));
        assert_eq!(output.items()[0]["content"][0]["text"], "");
    }
}

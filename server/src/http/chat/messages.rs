//! The prompt of a chat: messages through the model's template, then the tokenizer.

use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::earlier_calls::parse_earlier_calls;
use crate::http::error::ApiError;
use crate::http::tools::ToolField;
use crate::model::ServedModel;
use crate::tokenizer::RenderOptions;

/// The fields that make a prompt of messages; `/tokenize` has them too.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub(in crate::http) struct ChatPromptFields {
    /// Whether the prompt ends with the beginning of an answer [default: true].
    add_generation_prompt: Option<bool>,
    /// Whether the answer goes on with the last message; excludes `add_generation_prompt` [default: false].
    continue_final_message: Option<bool>,
    /// Whether the tokenizer adds special tokens to those of the template [default: false].
    add_special_tokens: Option<bool>,
    /// Variables of the chat template.
    #[schema(value_type = Option<Object>)]
    chat_template_kwargs: Option<Map<String, Value>>,
    /// A variable of some chat templates.
    reasoning_effort: Option<Value>,
    /// The tools that the prompt tells the model of.
    #[schema(value_type = Option<Vec<ToolField>>)]
    tools: Option<Vec<Value>>,
}

/// A message. Templates may know other fields, and are given them.
#[derive(ToSchema)]
#[schema(as = ChatMessage, example = json!({"role": "user", "content": "Hi"}))]
#[expect(dead_code, reason = "messages are checked as JSON, for templates; this is for the document")]
pub(in crate::http) struct MessageSchema {
    /// Templates say which there are: `system`, `user`, `assistant`, `tool`.
    #[schema(min_length = 1)]
    role: String,
    content: Option<ContentSchema>,
    /// Earlier calls of an assistant.
    tool_calls: Option<Vec<CallSchema>>,
    /// Which call a tool's message answers.
    tool_call_id: Option<String>,
}

/// Text, or its parts.
#[derive(ToSchema)]
#[schema(as = ChatMessageContent)]
#[serde(untagged)]
#[expect(dead_code, reason = "as MessageSchema")]
enum ContentSchema {
    Text(String),
    Parts(Vec<PartSchema>),
}

/// A part of a message: this server takes texts only.
#[derive(ToSchema)]
#[schema(as = ChatMessagePart)]
#[serde(tag = "type", rename_all = "lowercase")]
#[expect(dead_code, reason = "as MessageSchema")]
enum PartSchema {
    Text { text: String },
}

/// A call that the assistant made.
#[derive(ToSchema)]
#[schema(as = EarlierCall)]
#[expect(dead_code, reason = "as MessageSchema")]
struct CallSchema {
    id: Option<String>,
    function: EarlierFunction,
}

#[derive(ToSchema)]
#[expect(dead_code, reason = "as MessageSchema")]
struct EarlierFunction {
    name: String,
    /// The text of a JSON object.
    arguments: Option<String>,
}

/// A chat's prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::http) struct ChatPrompt {
    /// Token ids; not empty.
    pub(in crate::http) ids: Vec<u32>,
    /// Whether the prompt ends where the model is to think.
    pub(in crate::http) begins_reasoning: bool,
}

impl ChatPromptFields {
    /// The rendered messages. With `limited`, a text that cannot fit into the context is refused before
    /// it is tokenized, and that field is blamed.
    pub(in crate::http) fn prompt(
        self,
        model: &ServedModel,
        mut messages: Vec<Map<String, Value>>,
        limited: Option<&'static str>,
    ) -> Result<ChatPrompt, ApiError> {
        parse_earlier_calls(&mut messages)?;
        let continue_final_message = self.continue_final_message.unwrap_or(false);
        if continue_final_message && self.add_generation_prompt == Some(true) {
            let message = "continue_final_message and add_generation_prompt exclude each other";
            return Err(ApiError::field("continue_final_message", message));
        }
        let mut kwargs = self.chat_template_kwargs.unwrap_or_default();
        // A variable of some templates; others do not know it.
        let tools = self.tools.filter(|tools| !tools.is_empty());
        kwargs.extend(tools.map(|tools| ("tools".to_owned(), Value::Array(tools))));
        kwargs.extend(self.reasoning_effort.map(|effort| ("reasoning_effort".to_owned(), effort)));
        let options = RenderOptions {
            add_generation_prompt: self.add_generation_prompt.unwrap_or(!continue_final_message),
            continue_final_message,
            kwargs,
        };
        let template = model.chat_template()?;
        let text = template
            .render(&messages, &options)
            .map_err(|error| ApiError::field("messages", error.to_string()))?;
        if let Some(field) = limited {
            model.require_possible(field, &text)?;
        }
        // The template has put the special tokens there as text.
        let ids = model.encode("messages", &text, self.add_special_tokens.unwrap_or(false))?.ids;
        if ids.is_empty() {
            return Err(ApiError::field("messages", "messages must not be empty: they have no tokens"));
        }
        Ok(ChatPrompt { ids, begins_reasoning: text.trim_end().ends_with("<think>") })
    }
}

/// Refuses messages that no template could show as they are meant.
pub(in crate::http) fn check_messages(messages: &[Map<String, Value>]) -> Result<(), ApiError> {
    if messages.is_empty() {
        return Err(ApiError::field("messages", "messages must not be empty"));
    }
    messages.iter().enumerate().try_for_each(|(index, message)| check_message(index, message))
}

fn check_message(index: usize, message: &Map<String, Value>) -> Result<(), ApiError> {
    let wrong = |field: &str, expected: &str| {
        let path = format!("messages[{index}].{field}");
        Err(ApiError::field(path.as_str(), format!("{path} must be {expected}")))
    };
    match message.get("role") {
        Some(Value::String(role)) if !role.is_empty() => {}
        _ => return wrong("role", "a string"),
    }
    match message.get("content") {
        None | Some(Value::Null | Value::String(_)) => Ok(()),
        Some(Value::Array(parts)) => {
            let is_text = |part: &Value| part["type"] == "text" && part["text"].is_string();
            if let Some(at) = parts.iter().position(|part| !is_text(part)) {
                return wrong(&format!("content[{at}]"), "a part of type 'text': this server takes no other");
            }
            Ok(())
        }
        Some(_) => wrong("content", "a string or a list of parts"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(messages: Value) -> Result<(), ApiError> {
        check_messages(&serde_json::from_value::<Vec<_>>(messages).unwrap())
    }

    #[test]
    fn messages_that_are_fine() {
        check(json!([
            {"role": "system", "content": "S"},
            {"role": "user", "content": [{"type": "text", "text": "a"}], "name": "x"},
            {"role": "assistant", "content": null},
        ]))
        .unwrap();
    }

    #[test]
    fn messages_that_are_not() {
        let cases = [
            ("messages", json!([])),
            ("messages[0].role", json!([{"content": "a"}])),
            ("messages[0].role", json!([{"role": 1, "content": "a"}])),
            ("messages[1].content", json!([{"role": "user"}, {"role": "user", "content": 1}])),
            (
                "messages[0].content[1]",
                json!([{"role": "user", "content": [
                {"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "u"}}]}]),
            ),
        ];
        for (param, messages) in cases {
            let error = check(messages).unwrap_err();
            assert!(matches!(&error, ApiError::BadRequest { param: Some(p), .. } if p == param), "{error:?}");
        }
    }
}

//! A request of the Responses API as the chat that it is.

use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::document::{Include, ResponseInput, ResponseTool, TextFormat, Truncation};
use super::input::{add_item, wrapped_tool};
use crate::http::check;
use crate::http::error::ApiError;
use crate::http::json::JsonBody;
use crate::http::tools::ToolChoice;

/// The fields that chats do not have.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub(super) struct ResponseFields {
    #[serde(default)]
    #[schema(value_type = ResponseInput, required = true)]
    input: Value,
    /// A message of the system, before the input.
    pub(super) instructions: Option<String>,
    /// Most tokens of the answer [default: what the context holds].
    #[serde(default, deserialize_with = "crate::http::integer::optional")]
    #[schema(minimum = 1)]
    pub(super) max_output_tokens: Option<usize>,
    /// A response that is kept, to go on from.
    pub(super) previous_response_id: Option<String>,
    /// Whether to answer at once, and go on; excludes `stream` [default: false].
    pub(super) background: Option<bool>,
    /// Whether the response is kept, to be asked for later [default: true].
    pub(super) store: Option<bool>,
    /// Whether the answer comes as server-sent events [default: false].
    pub(super) stream: Option<bool>,
    /// Given back with the response.
    #[schema(value_type = Option<Object>)]
    pub(super) metadata: Option<Map<String, Value>>,
    #[schema(value_type = Option<Vec<ResponseTool>>)]
    pub(super) tools: Option<Vec<Value>>,
    #[schema(value_type = Option<ToolChoice>)]
    pub(super) tool_choice: Option<Value>,
    /// Whether there may be several calls [default: true].
    pub(super) parallel_tool_calls: Option<bool>,
    /// As for a chat.
    #[schema(minimum = 0)]
    pub(super) temperature: Option<f32>,
    /// As for a chat.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    pub(super) top_p: Option<f32>,
    pub(super) text: Option<TextField>,
    reasoning: Option<ReasoningField>,
    #[schema(value_type = Option<Vec<Include>>)]
    include: Option<Vec<String>>,
    /// Alternatives for each token of the text.
    #[serde(default, deserialize_with = "crate::http::integer::optional")]
    #[schema(minimum = 0, maximum = 20)]
    top_logprobs: Option<i64>,
    #[schema(value_type = Option<Truncation>)]
    truncation: Option<String>,
}

/// What the text is like.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub(super) struct TextField {
    #[schema(value_type = Option<TextFormat>)]
    pub(super) format: Option<Value>,
}

/// How the model thinks.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
struct ReasoningField {
    /// A variable of some chat templates.
    effort: Option<String>,
}

/// Fields of this API, and those that a chat would understand otherwise: the rest (sampling, model, user) is the same.
const OWN: &[&str] = &[
    "input",
    "instructions",
    "max_output_tokens",
    "previous_response_id",
    "background",
    "store",
    "stream",
    "stream_options",
    "metadata",
    "tools",
    "text",
    "reasoning",
    "include",
    "top_logprobs",
    "truncation",
    "messages",
];

const LOGPROBS: &str = "message.output_text.logprobs";

impl ResponseFields {
    /// How much the model is to think.
    pub(super) fn effort(&self) -> Option<&str> {
        self.reasoning.as_ref()?.effort.as_deref()
    }

    /// The messages of the input; of the earlier conversation there is nothing.
    pub(super) fn messages(&self) -> Result<Vec<Value>, ApiError> {
        match &self.input {
            Value::String(text) => Ok(vec![json!({"role": "user", "content": text})]),
            Value::Array(items) => {
                let mut messages = Vec::with_capacity(items.len());
                for (index, item) in items.iter().enumerate() {
                    add_item(index, item, &mut messages)?;
                }
                Ok(messages)
            }
            Value::Null => Err(ApiError::field("input", "input is needed")),
            _ => Err(ApiError::field("input", "input must be a string or a list of items")),
        }
    }

    /// The body of a chat of these messages; `body` is the whole request.
    pub(super) fn chat(&self, body: &JsonBody, mut messages: Vec<Value>) -> Result<JsonBody, ApiError> {
        if let Some(instructions) = &self.instructions {
            messages.insert(0, json!({"role": "system", "content": instructions}));
        }
        let unsupported = |field: &str, what: &str| {
            Err(ApiError::field(field, format!("{field}: {what} is not supported by this server")))
        };
        if self.truncation.as_deref().is_some_and(|truncation| truncation != "disabled") {
            return unsupported("truncation", "anything but 'disabled'");
        }
        if self.background == Some(true) && self.stream == Some(true) {
            return unsupported("background", "a stream of a background response");
        }
        let top_logprobs = check::logprobs("top_logprobs", self.top_logprobs.unwrap_or(0))?;
        let include = self.include.as_deref().unwrap_or_default();
        if let Some(other) =
            include.iter().find(|other| *other != LOGPROBS && *other != "reasoning.encrypted_content")
        {
            return unsupported("include", other);
        }
        let mut chat = body.object().clone();
        OWN.iter().for_each(|field| {
            chat.remove(*field);
        });
        chat.insert("messages".to_owned(), Value::from(messages));
        if let Some(max) = self.max_output_tokens {
            chat.insert("max_completion_tokens".to_owned(), Value::from(max));
        }
        if let Some(effort) = self.effort() {
            chat.insert("reasoning_effort".to_owned(), Value::from(effort));
        }
        if let Some(tools) = &self.tools {
            let tools = tools.iter().enumerate().map(|(index, tool)| wrapped_tool(index, tool));
            chat.insert("tools".to_owned(), tools.collect::<Result<_, _>>()?);
        }
        if include.iter().any(|item| item == LOGPROBS) || top_logprobs > 0 {
            chat.insert("logprobs".to_owned(), Value::from(true));
            chat.insert("top_logprobs".to_owned(), Value::from(top_logprobs));
        }
        if let Some(format) = self.text.as_ref().and_then(|text| text.format.as_ref()) {
            let mut wrapped = json!({"type": format.get("type").cloned().unwrap_or_default()});
            if format.get("schema").is_some() {
                wrapped["json_schema"] = format.clone();
            }
            chat.insert("response_format".to_owned(), wrapped);
        }
        if chat.get("n").is_some_and(|n| !n.is_null() && *n != 1) {
            return unsupported("n", "more than one answer");
        }
        Ok(JsonBody::from_object(chat, body.bytes()))
    }
}

/// An error of the chat in the words of this API.
pub(super) fn blamed(error: ApiError) -> ApiError {
    let ApiError::BadRequest { message, param: Some(param) } = error else { return error };
    let renamed = [
        ("messages", "input"),
        ("max_completion_tokens", "max_output_tokens"),
        ("max_tokens", "max_output_tokens"),
        ("response_format", "text.format"),
    ];
    let own = renamed.iter().find_map(|(chat, own)| {
        let rest = param.strip_prefix(chat)?;
        // A message's number is not that of the item it was made of.
        (rest.is_empty() || rest.starts_with(['[', '.'])).then_some(*own)
    });
    ApiError::BadRequest { message, param: Some(own.map_or(param, str::to_owned)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &Value) -> (ResponseFields, JsonBody) {
        let body = JsonBody::from_bytes(body.to_string().as_bytes()).unwrap();
        (body.read().unwrap(), body)
    }

    fn chat(body: &Value) -> Result<Value, ApiError> {
        let (fields, body) = read(body);
        let messages = fields.messages()?;
        Ok(Value::Object(fields.chat(&body, messages)?.object().clone()))
    }

    #[test]
    fn a_conversation_becomes_messages() {
        let body = json!({"instructions": "Be brief.", "input": [
            {"role": "developer", "content": "D"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
            {"type": "reasoning", "summary": []},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "o"}]});
        let call = |id: &str, name: &str| json!({"id": id, "type": "function", "function": {"name": name, "arguments": "{}"}});
        let expected = json!([
            {"role": "system", "content": "Be brief."}, {"role": "system", "content": "D"}, {"role": "user", "content": "a\nb"},
            {"role": "assistant", "content": null, "tool_calls": [call("1", "f"), call("2", "g")]},
            {"role": "tool", "tool_call_id": "1", "content": "o"}]);
        assert_eq!(chat(&body).unwrap()["messages"], expected);
    }

    #[test]
    fn fields_are_the_chats() {
        let body = json!({"input": "hi", "model": "m", "max_output_tokens": 5, "temperature": 0.5, "store": false, "stream": true,
            "tools": [{"type": "function", "name": "f", "parameters": {}}], "tool_choice": "auto",
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
            "include": ["message.output_text.logprobs"], "top_logprobs": 2, "metadata": {"a": "b"}});
        let expected = json!({"model": "m", "temperature": 0.5, "tool_choice": "auto", "max_completion_tokens": 5,
            "messages": [{"role": "user", "content": "hi"}], "logprobs": true, "top_logprobs": 2,
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            "response_format": {"type": "json_schema",
                "json_schema": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}}});
        assert_eq!(chat(&body).unwrap(), expected);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let cases = [
            (json!({}), "input"),
            (json!({"input": 5}), "input"),
            (json!({"input": [5]}), "input[0]"),
            (json!({"input": [{"content": "a"}]}), "input[0].role"),
            (json!({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}), "input[0].content"),
            (json!({"input": [{"type": "item_reference", "id": "x"}]}), "input[0].type"),
            (json!({"input": [{"type": "function_call", "name": "f"}]}), "input[0]"),
            (json!({"input": "a", "tools": [{"type": "web_search"}]}), "tools[0].type"),
            (json!({"input": "a", "truncation": "auto"}), "truncation"),
            (json!({"input": "a", "include": ["file_search_call.results"]}), "include"),
            (json!({"input": "a", "background": true, "stream": true}), "background"),
            (json!({"input": "a", "n": 2}), "n"),
        ];
        for (body, field) in cases {
            let error = chat(&body).unwrap_err();
            assert!(
                matches!(&error, ApiError::BadRequest { param: Some(p), .. } if p == field),
                "{body}: {error:?}"
            );
        }
        let renamed = |param: &str| match blamed(ApiError::field(param, "x")) {
            ApiError::BadRequest { param, .. } => param.unwrap(),
            other => panic!("{other:?}"),
        };
        assert_eq!(
            ["messages", "messages[3].content", "max_tokens", "response_format.type", "seed"].map(renamed),
            ["input", "input", "max_output_tokens", "text.format", "seed"]
        );
    }
}

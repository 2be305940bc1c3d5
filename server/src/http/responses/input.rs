//! Items and tools of the Responses API as those of a chat.

use serde_json::{Value, json};

use crate::http::error::ApiError;

/// A tool of this API has its function's fields beside its type.
pub(super) fn wrapped_tool(index: usize, tool: &Value) -> Result<Value, ApiError> {
    match tool.as_object() {
        Some(fields) if fields.get("type").is_some_and(|kind| kind == "function") => {
            if fields.contains_key("function") {
                return Ok(tool.clone());
            }
            let mut function = fields.clone();
            function.remove("type");
            Ok(json!({"type": "function", "function": function}))
        }
        _ => {
            let path = format!("tools[{index}].type");
            Err(ApiError::field(
                path.as_str(),
                format!("{path} must be 'function': this server has no tools of its own"),
            ))
        }
    }
}

/// Adds what an item of the input says to the messages.
pub(super) fn add_item(index: usize, item: &Value, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    let wrong = |field: &str, expected: &str| {
        let path = format!("input[{index}]{field}");
        Err(ApiError::field(path.as_str(), format!("{path} must be {expected}")))
    };
    let Some(fields) = item.as_object() else { return wrong("", "an object") };
    let text = |field: &str| fields.get(field).and_then(Value::as_str);
    match text("type").unwrap_or("message") {
        "message" => {
            let Some(role) = text("role") else { return wrong(".role", "a string") };
            // Templates know no developers.
            let role = if role == "developer" { "system" } else { role };
            let content = match fields.get("content") {
                Some(Value::String(text)) => text.clone(),
                Some(Value::Array(parts)) => {
                    let texts: Option<Vec<&str>> = parts.iter().map(text_of_part).collect();
                    let Some(texts) = texts else {
                        return wrong(
                            ".content",
                            "parts of type input_text or output_text: this server takes no other",
                        );
                    };
                    texts.join("\n")
                }
                _ => return wrong(".content", "a string or a list of parts"),
            };
            messages.push(json!({"role": role, "content": content}));
        }
        "function_call" => {
            let (Some(id), Some(name), Some(arguments)) = (text("call_id"), text("name"), text("arguments"))
            else {
                return wrong("", "a call with call_id, name and arguments");
            };
            let call =
                json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
            // Calls that follow each other were made in one turn.
            match messages.last_mut().filter(|last| last["role"] == "assistant") {
                Some(last) => match last["tool_calls"].as_array_mut() {
                    Some(calls) => calls.push(call),
                    None => last["tool_calls"] = json!([call]),
                },
                None => messages.push(json!({"role": "assistant", "content": null, "tool_calls": [call]})),
            }
        }
        "function_call_output" => {
            let Some(id) = text("call_id") else { return wrong(".call_id", "a string") };
            let output = match fields.get("output") {
                Some(Value::String(text)) => text.clone(),
                Some(other) if !other.is_null() => other.to_string(),
                _ => return wrong(".output", "a text"),
            };
            messages.push(json!({"role": "tool", "tool_call_id": id, "content": output}));
        }
        // What a model thought before is not shown to it again.
        "reasoning" => {}
        _ => return wrong(".type", "message, function_call, function_call_output or reasoning"),
    }
    Ok(())
}

fn text_of_part(part: &Value) -> Option<&str> {
    let is_text = ["input_text", "output_text", "text"].iter().any(|kind| part["type"] == *kind);
    part["text"].as_str().filter(|_| is_text)
}

//! Calls that a conversation had before.

use serde_json::{Map, Value};

use crate::http::error::ApiError;

/// Makes the arguments of earlier calls, which the API has as JSON text, the objects that templates expect.
pub(super) fn parse_earlier_calls(messages: &mut [Map<String, Value>]) -> Result<(), ApiError> {
    for (index, message) in messages.iter_mut().enumerate() {
        let wrong = |path: String, expected: &str| {
            let path = format!("messages[{index}].tool_calls{path}");
            Err(ApiError::field(path.as_str(), format!("{path} must be {expected}")))
        };
        let calls = match message.get_mut("tool_calls") {
            None | Some(Value::Null) => continue,
            Some(Value::Array(calls)) => calls,
            Some(_) => return wrong(String::new(), "a list of calls"),
        };
        if calls.is_empty() {
            // Templates ask whether there is a list, not what is in it.
            message.remove("tool_calls");
            continue;
        }
        for (at, call) in calls.iter_mut().enumerate() {
            let Some(function) = call.get_mut("function").and_then(Value::as_object_mut) else {
                return wrong(format!("[{at}].function"), "an object");
            };
            if !function.get("name").is_some_and(Value::is_string) {
                return wrong(format!("[{at}].function.name"), "a string");
            }
            let arguments = function.entry("arguments").or_insert(Value::Null);
            let object = match &*arguments {
                Value::Object(_) => continue,
                Value::Null => Some(Value::Object(Map::new())),
                Value::String(text) if text.trim().is_empty() => Some(Value::Object(Map::new())),
                Value::String(text) => serde_json::from_str(text).ok().filter(Value::is_object),
                _ => None,
            };
            match object {
                Some(object) => *arguments = object,
                None => return wrong(format!("[{at}].function.arguments"), "the text of a JSON object"),
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn arguments_of_earlier_calls_become_objects() {
        let parsed = |arguments: Value| {
            let mut messages: Vec<Map<String, Value>> = serde_json::from_value(json!([{"role": "user"}, {"role": "assistant",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]}]))
            .unwrap();
            parse_earlier_calls(&mut messages)
                .map(|()| messages[1]["tool_calls"][0]["function"]["arguments"].clone())
        };
        assert_eq!(parsed(json!("{\"a\": 1}")).unwrap(), json!({"a": 1}));
        assert_eq!(parsed(json!({"a": 1})).unwrap(), json!({"a": 1}));
        assert_eq!(parsed(json!("")).unwrap(), json!({}));
        for bad in [json!("{"), json!("[1]"), json!(5)] {
            let error = parsed(bad).unwrap_err();
            let path = "messages[1].tool_calls[0].function.arguments";
            assert!(matches!(&error, ApiError::BadRequest { param: Some(p), .. } if p == path), "{error:?}");
        }
    }
}

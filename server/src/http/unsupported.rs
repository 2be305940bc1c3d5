//! Fields that this server understands and cannot honour: refused by name, never ignored.

use serde_json::Value;

use super::error::ApiError;
use super::json::JsonBody;

/// A field, and the values (as JSON) with which it asks for nothing. `null` always does.
type Row = (&'static str, &'static [&'static str]);

const EVERYWHERE: &[Row] = &[
    ("guided_whitespace_pattern", &[]),
    ("logits_processors", &["[]"]),
    ("use_beam_search", &["false"]),
    ("length_penalty", &["1"]),
    ("kv_transfer_params", &[]),
    ("spaces_between_special_tokens", &["true"]),
];

const COMPLETIONS: &[Row] = &[("suffix", &[r#""""#]), ("prompt_embeds", &[])];

/// What changes the prompt that messages make.
const CHAT_PROMPT: &[Row] = &[("chat_template", &[]), ("documents", &["[]"])];

const CHAT: &[Row] = &[
    ("functions", &["[]"]),
    ("function_call", &[r#""none""#]),
    ("echo", &["false"]),
    ("modalities", &[r#"["text"]"#]),
    ("audio", &[]),
    ("prediction", &[]),
    ("web_search_options", &[]),
    ("mm_processor_kwargs", &["{}"]),
];

/// Refuses a completion that asks for what is not there.
pub(super) fn check_completion(body: &JsonBody) -> Result<(), ApiError> {
    check(body, EVERYWHERE.iter().chain(COMPLETIONS))
}

/// As [`check_completion`], for a chat.
pub(super) fn check_chat(body: &JsonBody) -> Result<(), ApiError> {
    check(body, EVERYWHERE.iter().chain(CHAT_PROMPT).chain(CHAT))
}

/// As [`check_completion`], for `/tokenize`.
pub(super) fn check_tokenize(body: &JsonBody) -> Result<(), ApiError> {
    check(body, CHAT_PROMPT.iter())
}

fn check<'a>(body: &JsonBody, rows: impl Iterator<Item = &'a Row>) -> Result<(), ApiError> {
    for (field, neutral) in rows {
        if let Some(value) = body.get(field)
            && !value.is_null()
            && !neutral.iter().any(|json| same(value, json))
        {
            return Err(ApiError::field(*field, format!("{field} is not supported by this server")));
        }
    }
    Ok(())
}

/// Whether `value` is what `json` says; 1 and 1.0 are the same.
fn same(value: &Value, json: &str) -> bool {
    serde_json::from_str(json).is_ok_and(|other: Value| match (value.as_f64(), other.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => *value == other,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(json: &str) -> JsonBody {
        JsonBody::from_bytes(json.as_bytes()).unwrap()
    }

    #[test]
    fn what_asks_for_nothing_is_accepted() {
        let json = r#"{"response_format": {"type": "text"}, "length_penalty": 1.0,
            "suffix": null, "tools": [], "use_beam_search": false, "tool_choice": "none", "anything": 1}"#;
        check_completion(&body(json)).unwrap();
        check_chat(&body(json)).unwrap();
    }

    #[test]
    fn what_asks_for_something_is_named() {
        let cases =
            [("chat_template", r#""x""#), ("echo", "true"), ("spaces_between_special_tokens", "false")];
        for (field, value) in cases {
            let error = check_chat(&body(&format!("{{\"{field}\": {value}}}"))).unwrap_err();
            assert!(
                matches!(&error, ApiError::BadRequest { param: Some(param), .. } if param == field),
                "{error:?}"
            );
        }
        assert!(check_completion(&body(r#"{"suffix": "x"}"#)).is_err());
        assert!(check_tokenize(&body(r#"{"chat_template": "x"}"#)).is_err());
        check_tokenize(&body(r#"{"documents": [], "chat_template": null}"#)).unwrap();
    }

    #[test]
    fn the_rows_are_json() {
        for (field, neutral) in EVERYWHERE.iter().chain(COMPLETIONS).chain(CHAT_PROMPT).chain(CHAT) {
            for json in *neutral {
                serde_json::from_str::<Value>(json).unwrap_or_else(|e| panic!("{field}: {e}"));
            }
        }
    }
}

//! The prompt of a completion: text or token ids, one or several.

use serde_json::Value;
use utoipa::ToSchema;

use super::check::require_in_vocabulary;
use super::error::ApiError;
use crate::model::ServedModel;
use crate::tokenizer::{Detokenizer, Encoded};

/// One prompt as sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum PromptField {
    /// Text, to be tokenized.
    Text(String),
    /// Token ids.
    Ids(Vec<u32>),
}

/// A text, texts, token ids, or lists of token ids; no list is empty.
#[derive(ToSchema)]
#[schema(as = Prompt)]
#[serde(untagged)]
#[expect(
    dead_code,
    reason = "prompts are parsed by hand, for errors that say what is wrong; this is for the document"
)]
pub(super) enum PromptSchema {
    Text(String),
    Texts(Vec<String>),
    Ids(Vec<u32>),
    Lists(Vec<Vec<u32>>),
}

/// One prompt, ready to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Prompt {
    /// Token ids; not empty, inside the vocabulary.
    pub(super) ids: Vec<u32>,
    /// What `echo` shows.
    pub(super) text: String,
    /// For each token, the characters of `text` before it; empty unless asked for.
    pub(super) offsets: Vec<usize>,
}

/// `add_special_tokens`, `truncate_prompt_tokens`, and whether `echo` will need text and offsets.
#[derive(Debug, Clone, Copy)]
pub(super) struct PromptOptions {
    /// Put a beginning-of-sequence token and the like around text.
    pub(super) add_special_tokens: bool,
    /// Keep only this many of the last tokens.
    pub(super) truncate: Option<usize>,
    /// The field to blame.
    pub(super) field: &'static str,
    /// Fill in [`Prompt::offsets`], and the text of token ids.
    pub(super) echo: bool,
}

/// All four forms: a string, strings, token ids, lists of token ids. More than `most` ids are refused unread.
pub(super) fn parse_prompts(
    value: Value,
    field: &'static str,
    most: usize,
) -> Result<Vec<PromptField>, ApiError> {
    let wrong = || {
        let message = format!(
            "{field} must be a string, a list of strings, a list of token ids, or a list of such lists"
        );
        ApiError::field(field, message)
    };
    match value {
        Value::Null => Err(ApiError::field(field, format!("{field} is needed"))),
        Value::String(text) => Ok(vec![PromptField::Text(text)]),
        Value::Array(items) if items.is_empty() => {
            Err(ApiError::field(field, format!("{field} must not be empty")))
        }
        Value::Array(items) if items[0].is_number() => {
            Ok(vec![PromptField::Ids(token_ids(&items, field, field, most)?)])
        }
        Value::Array(items) => {
            let (texts, lists) = (items[0].is_string(), items[0].is_array());
            let prompt = |(index, item)| match item {
                Value::String(text) if texts => Ok(PromptField::Text(text)),
                Value::Array(ids) if lists => {
                    token_ids(&ids, field, &format!("{field}[{index}]"), most).map(PromptField::Ids)
                }
                _ => Err(wrong()),
            };
            items.into_iter().enumerate().map(prompt).collect()
        }
        _ => Err(wrong()),
    }
}

fn token_ids(items: &[Value], field: &'static str, path: &str, most: usize) -> Result<Vec<u32>, ApiError> {
    if items.len() > most {
        let message = format!("{path} has {} tokens; this model's context holds {most}", items.len());
        return Err(ApiError::field(field, message));
    }
    let id = |(index, item): (usize, &Value)| {
        item.as_u64()
            .and_then(|id| u32::try_from(id).ok())
            .ok_or_else(|| ApiError::field(field, format!("{path}[{index}]: {item} is no token id")))
    };
    items.iter().enumerate().map(id).collect()
}

impl PromptField {
    /// Tokenizes and checks.
    pub(super) fn prepare(self, model: &ServedModel, options: PromptOptions) -> Result<Prompt, ApiError> {
        let field = options.field;
        let (mut encoded, text) = match self {
            Self::Text(text) => {
                if options.truncate.is_none() {
                    model.require_possible(field, &text)?;
                }
                (model.encode(field, &text, options.add_special_tokens)?, Some(text))
            }
            Self::Ids(ids) => {
                require_in_vocabulary(field, &ids, model.vocab_size())?;
                (Encoded { added: vec![false; ids.len()], ids }, None)
            }
        };
        let dropped = options.truncate.map_or(0, |keep| encoded.ids.len().saturating_sub(keep));
        encoded.ids.drain(..dropped);
        encoded.added.drain(..dropped);
        if encoded.ids.is_empty() {
            return Err(ApiError::field(field, format!("{field} must not be empty: it has no tokens")));
        }
        let mut prompt = Prompt { ids: encoded.ids, text: String::new(), offsets: Vec::new() };
        if options.echo {
            (prompt.text, prompt.offsets) = spell(model, &prompt.ids, &encoded.added);
            if let Some(text) = text.filter(|_| dropped == 0) {
                prompt.text = text;
            }
        }
        Ok(prompt)
    }
}

/// The text of a prompt, and where in it each token begins. Tokens that the tokenizer added have no text.
fn spell(model: &ServedModel, ids: &[u32], added: &[bool]) -> (String, Vec<usize>) {
    let Some(tokenizer) = &model.tokenizer else { return (String::new(), vec![0; ids.len()]) };
    let mut detokenizer = Detokenizer::new(false);
    let mut text = String::new();
    let mut characters = 0;
    let mut offsets = Vec::with_capacity(ids.len());
    for (&id, &added) in ids.iter().zip(added) {
        offsets.push(characters);
        if !added {
            let piece = detokenizer.push(tokenizer, id);
            characters += piece.chars().count();
            text.push_str(&piece);
        }
    }
    text.push_str(&detokenizer.finish(tokenizer));
    (text, offsets)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(value: Value) -> Result<Vec<PromptField>, ApiError> {
        parse_prompts(value, "prompt", 2)
    }

    #[test]
    fn all_four_forms() {
        let text = |s: &str| PromptField::Text(s.to_owned());
        assert_eq!(parse(json!("a")).unwrap(), [text("a")]);
        assert_eq!(parse(json!(["a", "b"])).unwrap(), [text("a"), text("b")]);
        assert_eq!(parse(json!([1, 2])).unwrap(), [PromptField::Ids(vec![1, 2])]);
        let lists = parse(json!([[1, 2], [3]])).unwrap();
        assert_eq!(lists, [PromptField::Ids(vec![1, 2]), PromptField::Ids(vec![3])]);
    }

    #[test]
    fn anything_else_is_refused() {
        let cases = [
            json!(1),
            json!(null),
            json!({}),
            json!([]),
            json!([1, "a"]),
            json!(["a", 1]),
            json!([[1], "a"]),
            json!([[1, "a"]]),
            json!([-1]),
            json!([1.5]),
            json!([4294967296u64]),
            json!([null]),
            json!([1, 2, 3]),
            json!([[1], [1, 2, 3]]),
        ];
        for value in cases {
            let error = parse(value.clone()).unwrap_err();
            assert!(
                matches!(&error, ApiError::BadRequest { param: Some(p), .. } if p == "prompt"),
                "{value}: {error:?}"
            );
        }
    }
}

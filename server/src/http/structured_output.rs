//! `response_format` and `structured_outputs`: what the answer's text must follow.

use serde::Deserialize;
use serde_json::Value;

use super::error::ApiError;
use super::json::JsonBody;
use crate::engine::SharedGrammar;
use crate::grammar::{GrammarCompiler, GrammarOptions, GrammarSource};
use crate::model::ServedModel;

/// OpenAI's field, vLLM's, and the names that vLLM's had before.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Fields {
    response_format: Option<ResponseFormat>,
    structured_outputs: Option<StructuredOutputs>,
    guided_json: Option<Value>,
    guided_regex: Option<String>,
    guided_choice: Option<Vec<String>>,
    guided_grammar: Option<String>,
}

/// `response_format`.
#[derive(Debug, Clone, Deserialize)]
struct ResponseFormat {
    r#type: String,
    json_schema: Option<NamedSchema>,
}

/// A schema and its name, which only people read.
#[derive(Debug, Clone, Deserialize)]
struct NamedSchema {
    #[serde(alias = "json_schema")]
    schema: Option<Value>,
}

/// `structured_outputs`: one of them.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct StructuredOutputs {
    json: Option<Value>,
    json_object: Option<bool>,
    regex: Option<String>,
    choice: Option<Vec<String>>,
    grammar: Option<String>,
    structural_tag: Option<Value>,
    whitespace_pattern: Option<String>,
}

/// A grammar that was asked for, and the field that did.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct StructuredOutput {
    /// The path of the field.
    pub(super) field: &'static str,
    /// What it asks for.
    pub(super) source: GrammarSource,
}

impl StructuredOutput {
    /// What the request's fields ask for; `None`: any text.
    pub(super) fn read(body: &JsonBody) -> Result<Option<Self>, ApiError> {
        let fields: Fields = body.read()?;
        let mut asked: Vec<Self> = Vec::new();
        let mut ask = |field, source: Option<GrammarSource>| {
            asked.extend(source.map(|source| Self { field, source }));
        };
        let StructuredOutputs {
            json,
            json_object,
            regex,
            choice,
            grammar,
            structural_tag,
            whitespace_pattern,
        } = fields.structured_outputs.unwrap_or_default();
        let unsupported = [
            ("structured_outputs.structural_tag", structural_tag.is_some()),
            ("structured_outputs.whitespace_pattern", whitespace_pattern.is_some()),
        ];
        if let Some((field, _)) = unsupported.iter().find(|(_, asked)| *asked) {
            return Err(ApiError::field(*field, format!("{field} is not supported by this server")));
        }
        ask("response_format", fields.response_format.map(ResponseFormat::source).transpose()?.flatten());
        let field = "structured_outputs.json";
        ask(field, json.map(|schema| schema_of(field, schema)).transpose()?);
        let object = json_object.unwrap_or(false).then_some(GrammarSource::JsonObject);
        ask("structured_outputs.json_object", object);
        ask("structured_outputs.regex", regex.map(GrammarSource::Regex));
        let field = "structured_outputs.choice";
        ask(field, choice.map(|choices| choice_of(field, choices)).transpose()?);
        ask("structured_outputs.grammar", grammar.map(GrammarSource::Lark));
        let field = "guided_json";
        ask(field, fields.guided_json.map(|schema| schema_of(field, schema)).transpose()?);
        ask("guided_regex", fields.guided_regex.map(GrammarSource::Regex));
        let field = "guided_choice";
        ask(field, fields.guided_choice.map(|choices| choice_of(field, choices)).transpose()?);
        ask("guided_grammar", fields.guided_grammar.map(GrammarSource::Lark));
        let mut asked = asked.into_iter();
        let (first, second) = (asked.next(), asked.next());
        match (first, second) {
            (Some(first), Some(second)) => {
                let message = format!("{} and {} exclude each other", first.field, second.field);
                Err(ApiError::field(second.field, message))
            }
            (first, _) => Ok(first),
        }
    }

    /// Compiles the grammar. Takes its time.
    pub(super) fn compile(
        &self,
        model: &ServedModel,
        options: GrammarOptions,
    ) -> Result<SharedGrammar, ApiError> {
        compiler(model, self.field)?
            .compile(&self.source, options)
            .map_err(|error| ApiError::field(self.field, format!("{}: {error}", self.field)))
    }
}

/// The model's compiler of grammars; `field` is to blame when it has none.
pub(super) fn compiler<'a>(
    model: &'a ServedModel,
    field: &'static str,
) -> Result<&'a GrammarCompiler, ApiError> {
    let without = || {
        ApiError::field(field, format!("{field}: this model has no tokenizer, so there is no text to shape"))
    };
    model.grammars.as_deref().ok_or_else(without)
}

impl ResponseFormat {
    fn source(self) -> Result<Option<GrammarSource>, ApiError> {
        const FIELD: &str = "response_format.json_schema";
        match self.r#type.as_str() {
            "text" => Ok(None),
            "json_object" => Ok(Some(GrammarSource::JsonObject)),
            "json_schema" => {
                let schema = self.json_schema.and_then(|named| named.schema).ok_or_else(|| {
                    ApiError::field(FIELD, format!("{FIELD}.schema is needed with type json_schema"))
                })?;
                schema_of(FIELD, schema).map(Some)
            }
            other => {
                let message =
                    format!("response_format.type must be text, json_object or json_schema, not '{other}'");
                Err(ApiError::field("response_format.type", message))
            }
        }
    }
}

/// A schema, or its text.
fn schema_of(field: &'static str, schema: Value) -> Result<GrammarSource, ApiError> {
    let schema = match schema {
        Value::String(text) => serde_json::from_str(&text)
            .map_err(|error| ApiError::field(field, format!("{field} is not valid JSON: {error}")))?,
        schema => schema,
    };
    if schema.is_object() || schema.is_boolean() {
        Ok(GrammarSource::JsonSchema(schema))
    } else {
        Err(ApiError::field(field, format!("{field} must be a JSON schema: an object, or its text")))
    }
}

fn choice_of(field: &'static str, choices: Vec<String>) -> Result<GrammarSource, ApiError> {
    if choices.is_empty() {
        return Err(ApiError::field(field, format!("{field} must not be empty")));
    }
    Ok(GrammarSource::Choice(choices))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(body: &Value) -> Result<Option<StructuredOutput>, ApiError> {
        StructuredOutput::read(&JsonBody::from_bytes(body.to_string().as_bytes()).unwrap())
    }

    #[test]
    fn each_way_to_ask() {
        let schema = json!({"type": "string"});
        let expected = GrammarSource::JsonSchema(schema.clone());
        let cases = [
            (json!({}), None),
            (json!({"response_format": {"type": "text"}, "structured_outputs": null}), None),
            (json!({"structured_outputs": {}}), None),
            (json!({"response_format": {"type": "json_object"}}), Some(GrammarSource::JsonObject)),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}),
                Some(expected.clone()),
            ),
            (json!({"structured_outputs": {"json": schema}}), Some(expected.clone())),
            (json!({"structured_outputs": {"json": schema.to_string()}}), Some(expected.clone())),
            (json!({"structured_outputs": {"json_object": true}}), Some(GrammarSource::JsonObject)),
            (json!({"guided_json": schema}), Some(expected)),
            (json!({"structured_outputs": {"regex": "a"}}), Some(GrammarSource::Regex("a".into()))),
            (json!({"guided_regex": "a"}), Some(GrammarSource::Regex("a".into()))),
            (json!({"structured_outputs": {"choice": ["a"]}}), Some(GrammarSource::Choice(vec!["a".into()]))),
            (json!({"structured_outputs": {"grammar": "g"}}), Some(GrammarSource::Lark("g".into()))),
        ];
        for (body, expected) in cases {
            assert_eq!(read(&body).unwrap().map(|asked| asked.source), expected, "{body}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let cases = [
            (json!({"response_format": {"type": "xml"}}), "response_format.type"),
            (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema"),
            (json!({"response_format": {}}), "response_format"),
            (json!({"structured_outputs": {"json": 5}}), "structured_outputs.json"),
            (json!({"structured_outputs": {"json": "{"}}), "structured_outputs.json"),
            (json!({"structured_outputs": {"choice": []}}), "structured_outputs.choice"),
            (json!({"structured_outputs": {"regex": 5}}), "structured_outputs.regex"),
            (json!({"structured_outputs": {"structural_tag": {}}}), "structured_outputs.structural_tag"),
            (json!({"structured_outputs": {"regex": "a", "choice": ["a"]}}), "structured_outputs.choice"),
            (
                json!({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}),
                "structured_outputs.regex",
            ),
        ];
        for (body, field) in cases {
            let error = read(&body).unwrap_err();
            assert!(
                matches!(&error, ApiError::BadRequest { param: Some(p), .. } if p == field),
                "{body}: {error:?}"
            );
        }
    }
}

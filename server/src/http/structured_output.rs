//! `response_format` and `structured_outputs`: what the answer's text must follow.

use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::error::ApiError;
use super::json::JsonBody;
use crate::engine::SharedGrammar;
use crate::grammar::{GrammarOptions, GrammarSource};
use crate::model::ServedModel;

/// What the answer's text must follow: at most one of these. OpenAI's field, vLLM's, and the names that vLLM's had before.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub(super) struct StructuredOutputFields {
    response_format: Option<ResponseFormat>,
    structured_outputs: Option<StructuredOutputs>,
    /// As `structured_outputs.json`.
    #[schema(value_type = Option<SchemaField>)]
    guided_json: Option<Value>,
    /// As `structured_outputs.regex`.
    guided_regex: Option<String>,
    /// As `structured_outputs.choice`.
    #[schema(min_items = 1)]
    guided_choice: Option<Vec<String>>,
    /// As `structured_outputs.grammar`.
    guided_grammar: Option<String>,
}

/// The form of the answer: any text, a JSON object, or JSON of a schema.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[schema(example = json!({"type": "json_object"}))]
struct ResponseFormat {
    r#type: ResponseFormatType,
    /// Needed with type `json_schema`.
    json_schema: Option<NamedSchema>,
}

#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum ResponseFormatType {
    Text,
    JsonObject,
    JsonSchema,
}

/// A schema and its name, which only people read.
#[derive(Debug, Clone, Deserialize, ToSchema)]
struct NamedSchema {
    #[serde(alias = "json_schema")]
    #[schema(value_type = Option<SchemaField>)]
    schema: Option<Value>,
}

/// One of these.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
#[schema(example = json!({"regex": "[0-9]{1,3}"}))]
struct StructuredOutputs {
    /// A JSON schema.
    #[schema(value_type = Option<SchemaField>)]
    json: Option<Value>,
    /// Any JSON object.
    json_object: Option<bool>,
    /// A regular expression.
    regex: Option<String>,
    /// One of these texts.
    #[schema(min_items = 1)]
    choice: Option<Vec<String>>,
    /// A grammar, in llguidance's variant of Lark.
    grammar: Option<String>,
    #[schema(ignore)]
    structural_tag: Option<Value>,
    #[schema(ignore)]
    whitespace_pattern: Option<String>,
}

/// A JSON schema, or its text.
#[derive(ToSchema)]
#[schema(as = JsonSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "schemas are given on as they are; this is for the document")]
enum SchemaField {
    Schema(Map<String, Value>),
    Any(bool),
    Text(String),
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
        let fields: StructuredOutputFields = body.read()?;
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
        let without = || {
            let message =
                format!("{}: this model has no tokenizer, so there is no text to shape", self.field);
            ApiError::field(self.field, message)
        };
        model
            .grammars
            .as_deref()
            .ok_or_else(without)?
            .compile(&self.source, options)
            .map_err(|error| ApiError::field(self.field, format!("{}: {error}", self.field)))
    }
}

impl ResponseFormat {
    fn source(self) -> Result<Option<GrammarSource>, ApiError> {
        const FIELD: &str = "response_format.json_schema";
        match self.r#type {
            ResponseFormatType::Text => Ok(None),
            ResponseFormatType::JsonObject => Ok(Some(GrammarSource::JsonObject)),
            ResponseFormatType::JsonSchema => {
                let schema = self.json_schema.and_then(|named| named.schema).ok_or_else(|| {
                    ApiError::field(FIELD, format!("{FIELD}.schema is needed with type json_schema"))
                })?;
                schema_of(FIELD, schema).map(Some)
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

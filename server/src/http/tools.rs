//! `tools`, `tool_choice`, `parallel_tool_calls`: which tools a chat has, and which it must call.

use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::error::ApiError;
use super::json::JsonBody;
use super::structured_output::StructuredOutput;
use crate::answer::{Tool, ToolCallParser, ToolFormat};
use crate::engine::SharedGrammar;
use crate::grammar::{GrammarOptions, GrammarSource};
use crate::model::ServedModel;

#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub(super) struct ToolFields {
    tools: Option<Vec<ToolField>>,
    tool_choice: Option<ToolChoice>,
    /// Whether there may be several calls [default: true].
    parallel_tool_calls: Option<bool>,
}

/// A tool that the model may call.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[schema(as = Tool, example = json!({"type": "function", "function": {"name": "add", "parameters": {"type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}}}))]
pub(super) struct ToolField {
    #[expect(dead_code, reason = "there is one")]
    r#type: ToolType,
    function: Function,
}

/// This server has no tools of its own.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum ToolType {
    Function,
}

/// A function. Templates may know other fields, such as `description`, and are given them.
#[derive(Debug, Clone, Deserialize, ToSchema)]
struct Function {
    /// Without white space.
    #[schema(min_length = 1, max_length = 256)]
    name: String,
    /// The JSON schema of its arguments [default: any object].
    #[schema(value_type = Option<Object>)]
    parameters: Option<Map<String, Value>>,
}

/// Whether a tool is called, and which [default: auto]. The Responses API has a function's name beside the type.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "must be 'none', 'auto', 'required' or {\"type\": \"function\", \"function\": {\"name\": …}}"
)]
pub(super) enum ToolChoice {
    Mode(ToolChoiceMode),
    #[expect(dead_code, reason = "there is one type")]
    Function {
        r#type: ToolType,
        function: FunctionName,
    },
    #[expect(dead_code, reason = "there is one type")]
    Name {
        r#type: ToolType,
        name: String,
    },
}

/// No call, a call if the model makes one, at least one call.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum ToolChoiceMode {
    None,
    Auto,
    Required,
}

/// One of the tools.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub(super) struct FunctionName {
    name: String,
}

/// The tools of a chat that has some.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ToolPlan {
    /// How the model writes calls.
    pub(super) format: ToolFormat,
    tools: Vec<Tool>,
    choice: Choice,
    parallel: bool,
}

/// What [`ToolChoice`] means.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Choice {
    /// No call is looked for.
    None,
    /// The model decides.
    Auto,
    /// At least one call.
    Required,
    /// A call of this tool.
    Named(String),
}

impl ToolPlan {
    /// What the request's fields ask for; `None`: there are no tools.
    pub(super) fn read(body: &JsonBody, format: Option<ToolFormat>) -> Result<Option<Self>, ApiError> {
        let fields: ToolFields = body.read()?;
        let tools = fields.tools.unwrap_or_default();
        let choice = fields.tool_choice.map(Choice::from);
        if tools.is_empty() {
            return match choice {
                None | Some(Choice::None | Choice::Auto) => Ok(None),
                Some(_) => Err(ApiError::field("tool_choice", "tool_choice needs tools")),
            };
        }
        let format = format.ok_or_else(|| {
            let message = "tools: this model's chat template does not tell it of tools, or not how to call them \
                           (--tool-call-parser says how)";
            ApiError::field("tools", message)
        })?;
        let tools = (tools.into_iter().enumerate())
            .map(|(index, tool)| tool.checked(index))
            .collect::<Result<Vec<_>, _>>()?;
        let choice = choice.unwrap_or(Choice::Auto);
        if let Choice::Named(name) = &choice
            && !tools.iter().any(|tool| tool.name == *name)
        {
            let message = format!("tool_choice: there is no tool '{name}' among tools");
            return Err(ApiError::field("tool_choice", message));
        }
        let parallel = fields.parallel_tool_calls.unwrap_or(true) && !matches!(choice, Choice::Named(_));
        Ok(Some(Self { format, tools, choice, parallel }))
    }

    /// Whether the model must call a tool.
    pub(super) fn forces_a_call(&self) -> bool {
        matches!(self.choice, Choice::Required | Choice::Named(_))
    }

    /// A parser of one answer's calls; `None`: calls are not looked for.
    pub(super) fn parser(&self) -> Option<ToolCallParser> {
        if self.choice == Choice::None {
            return None;
        }
        let names = self.tools.iter().map(|tool| tool.name.clone()).collect();
        Some(ToolCallParser::new(self.format, names, self.parallel))
    }

    /// The grammar of the calls that must be made, or of a choice between calls and a text that must follow `text`;
    /// `None`: anything may be said. Takes its time.
    pub(super) fn compile(
        &self,
        model: &ServedModel,
        text: Option<StructuredOutput>,
        options: GrammarOptions,
    ) -> Result<Option<SharedGrammar>, ApiError> {
        const FIELD: &str = "tools";
        match (&self.choice, text) {
            (Choice::None, text) => text.map(|text| text.compile(model, options)).transpose(),
            (Choice::Auto, None) => Ok(None),
            (Choice::Auto, Some(text)) => {
                let calls = self.grammar(model)?;
                let source = GrammarSource::CallsOr { calls, text: Box::new(text.source.clone()) };
                let either = StructuredOutput { field: FIELD, source }.compile(model, options);
                // Who is to blame is who does not work alone.
                either.or_else(|error| text.compile(model, options).and(Err(error))).map(Some)
            }
            (Choice::Required | Choice::Named(_), _) => {
                let source = GrammarSource::Lark(self.grammar(model)?);
                StructuredOutput { field: FIELD, source }.compile(model, options).map(Some)
            }
        }
    }

    /// A Lark grammar of the calls that may be made.
    fn grammar(&self, model: &ServedModel) -> Result<String, ApiError> {
        let wanted: Vec<&Tool> = match &self.choice {
            Choice::Named(name) => self.tools.iter().filter(|tool| tool.name == *name).take(1).collect(),
            _ => self.tools.iter().collect(),
        };
        let special = |text: &str| {
            let tokenizer = model.tokenizer.as_deref()?;
            tokenizer.token_id(text).filter(|&id| tokenizer.is_special(id))
        };
        let template = model.chat_template()?.source();
        Ok(self.format.grammar(&wanted, self.parallel, template, special))
    }
}

impl ToolField {
    fn checked(self, index: usize) -> Result<Tool, ApiError> {
        let wrong = |field: &str, expected: &str| {
            let path = format!("tools[{index}].{field}");
            Err(ApiError::field(path.as_str(), format!("{path} must be {expected}")))
        };
        let Function { name, parameters } = self.function;
        if name.is_empty() || name.len() > 256 || name.chars().any(char::is_whitespace) {
            return wrong("function.name", "a name of 1 to 256 bytes without white space");
        }
        Ok(Tool { name, parameters: parameters.map(Value::Object) })
    }
}

impl From<ToolChoice> for Choice {
    fn from(choice: ToolChoice) -> Self {
        match choice {
            ToolChoice::Mode(ToolChoiceMode::None) => Self::None,
            ToolChoice::Mode(ToolChoiceMode::Auto) => Self::Auto,
            ToolChoice::Mode(ToolChoiceMode::Required) => Self::Required,
            ToolChoice::Function { function: FunctionName { name }, .. } | ToolChoice::Name { name, .. } => {
                Self::Named(name)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(body: &Value) -> Result<Option<ToolPlan>, ApiError> {
        ToolPlan::read(&JsonBody::from_bytes(body.to_string().as_bytes()).unwrap(), Some(ToolFormat::Hermes))
    }

    fn tool(name: &str) -> Value {
        json!({"type": "function", "function": {"name": name, "description": "d", "strict": true,
            "parameters": {"type": "object"}}})
    }

    #[test]
    fn choices() {
        let choice = |value: Value| {
            read(&json!({"tools": [tool("f"), tool("g")], "tool_choice": value})).unwrap().unwrap()
        };
        assert_eq!(choice(json!(null)).choice, Choice::Auto);
        assert!(!choice(json!("auto")).forces_a_call() && choice(json!("auto")).parser().is_some());
        assert!(choice(json!("none")).parser().is_none());
        assert!(choice(json!("required")).forces_a_call() && choice(json!("required")).parallel);
        let named = choice(json!({"type": "function", "function": {"name": "g"}}));
        assert_eq!((named.choice.clone(), named.parallel), (Choice::Named("g".into()), false));
        assert_eq!(choice(json!({"type": "function", "name": "g"})), named);
        let single = read(&json!({"tools": [tool("f")], "parallel_tool_calls": false})).unwrap().unwrap();
        assert!(!single.parallel);
        for nothing in [
            json!({}),
            json!({"tools": []}),
            json!({"tools": null, "tool_choice": "none"}),
            json!({"tool_choice": "auto"}),
        ] {
            assert_eq!(read(&nothing).unwrap(), None);
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let cases = [
            (json!({"tool_choice": "required"}), "tool_choice"),
            (json!({"tools": [tool("f")], "tool_choice": "always"}), "tool_choice"),
            (json!({"tools": [tool("f")], "tool_choice": 5}), "tool_choice"),
            (
                json!({"tools": [tool("f")], "tool_choice": {"type": "function", "function": {"name": "h"}}}),
                "tool_choice",
            ),
            (json!({"tools": [{}]}), "tools[0]"),
            (json!({"tools": [tool("f"), {"type": "x", "function": {"name": "f"}}]}), "tools[1].type"),
            (json!({"tools": [tool("")]}), "tools[0].function.name"),
            (
                json!({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}),
                "tools[0].function.parameters",
            ),
        ];
        for (body, field) in cases {
            let error = read(&body).unwrap_err();
            assert!(
                matches!(&error, ApiError::BadRequest { param: Some(p), .. } if p == field),
                "{body}: {error:?}"
            );
        }
        let body = JsonBody::from_bytes(json!({"tools": [tool("f")]}).to_string().as_bytes()).unwrap();
        assert!(
            matches!(ToolPlan::read(&body, None), Err(ApiError::BadRequest { param: Some(p), .. }) if p == "tools")
        );
    }
}

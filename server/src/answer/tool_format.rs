//! How models write calls of tools, and the grammar that makes them write one.

use serde_json::{Value, json};

use crate::grammar::with_whitespace;

pub(super) const HERMES_BEGIN: &str = "<tool_call>";
pub(super) const HERMES_END: &str = "</tool_call>";
pub(super) const LLAMA_TAG: &str = "<|python_tag|>";
pub(super) const MISTRAL_BEGIN: &str = "[TOOL_CALLS]";
const MISTRAL_ARGS: &str = "[ARGS]";

/// The formats that are understood, by the names that vLLM's parsers have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolFormat {
    /// Nous Hermes, Qwen2.5, Qwen3: `<tool_call>{"name": …, "arguments": …}</tool_call>`, once for each call.
    Hermes,
    /// Llama 3.1 and later: `{"name": …, "parameters": …}` and nothing else, `; ` between calls.
    Llama3Json,
    /// Mistral: `[TOOL_CALLS][{"name": …, "arguments": …}, …]`, or `[TOOL_CALLS]name[ARGS]{…}` for each call.
    Mistral,
}

/// A tool that a request has.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// The JSON schema of its arguments; `None`: any object.
    pub parameters: Option<Value>,
}

impl ToolFormat {
    /// The format that a chat template teaches; `None` if it is none of these.
    pub fn of_template(source: &str) -> Option<Self> {
        if source.contains(MISTRAL_BEGIN) {
            Some(Self::Mistral)
        } else if source.contains(HERMES_BEGIN) {
            Some(Self::Hermes)
        } else if source.contains(LLAMA_TAG) || source.contains("Environment: ipython") {
            Some(Self::Llama3Json)
        } else {
            None
        }
    }

    /// A Lark grammar of calls of these tools: one, or with `parallel` any number. `special` is the id of a special
    /// token; `template` the source of the chat template.
    pub fn grammar(
        self,
        tools: &[&Tool],
        parallel: bool,
        template: &str,
        special: impl Fn(&str) -> Option<u32>,
    ) -> String {
        // Text that is a special token is no text to a grammar.
        let literal = |text: &str| {
            special(text).map_or_else(|| Value::from(text).to_string(), |id| format!("<[{id}]>"))
        };
        let repeated = |separator: &str| {
            if parallel { format!("call ({} call)*", Value::from(separator)) } else { "call".to_owned() }
        };
        let by_name = self == Self::Mistral && template.contains(MISTRAL_ARGS);
        let key = if self == Self::Llama3Json { "parameters" } else { "arguments" };
        let rules: Vec<String> = (tools.iter().enumerate())
            .map(|(index, tool)| {
                let any = json!({"type": "object"});
                let schema = with_whitespace(tool.parameters.as_ref().unwrap_or(&any));
                let rule = if by_name {
                    format!("{} {} arguments{index}", Value::from(tool.name.as_str()), literal(MISTRAL_ARGS))
                } else {
                    let before = format!(r#"{{"name": {}, "{key}": "#, Value::from(tool.name.as_str()));
                    format!("{} arguments{index} \"}}\"", Value::from(before))
                };
                format!("tool{index}: {rule}\narguments{index}: %json {schema}\n")
            })
            .collect();
        let any_tool = (0..tools.len()).map(|index| format!("tool{index}")).collect::<Vec<_>>().join(" | ");
        let (start, call) = match self {
            Self::Hermes => {
                let call =
                    format!("{} \"\\n\" ({any_tool}) \"\\n\" {}", literal(HERMES_BEGIN), literal(HERMES_END));
                (repeated("\n"), call)
            }
            Self::Llama3Json => (repeated("; "), format!("({any_tool})")),
            Self::Mistral if by_name => {
                let star = if parallel { "call+" } else { "call" };
                (star.to_owned(), format!("{} ({any_tool})", literal(MISTRAL_BEGIN)))
            }
            Self::Mistral => (
                format!("{} \"[\" {} \"]\"", literal(MISTRAL_BEGIN), repeated(", ")),
                format!("({any_tool})"),
            ),
        };
        format!("start: {start}\ncall: {call}\n{}", rules.concat())
    }

    /// An id for a call. Mistral's templates insist on nine letters and digits.
    pub fn call_id(self) -> String {
        match self {
            Self::Mistral => std::iter::repeat_with(fastrand::alphanumeric).take(9).collect(),
            Self::Hermes | Self::Llama3Json => format!("call_{:024x}", fastrand::u128(..) >> 32),
        }
    }
}

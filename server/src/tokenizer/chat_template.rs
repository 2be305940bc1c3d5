//! The model's own chat template: Jinja as Transformers runs it.

use std::path::{Path, PathBuf};

use minijinja::Environment;
use minijinja::value::Value;
use serde_json::Map;

use super::{Tokenizer, jinja};

const NAME: &str = "chat_template";

/// Why a chat could not be rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The template file cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The template is not valid Jinja, or uses what is not supported.
    #[error("{origin}: {message}")]
    Parse {
        /// Where the template is from.
        origin: String,
        /// The parser's words, with the line.
        message: String,
    },
    /// The template has several variants and none is the default.
    #[error("{origin}: has the chat templates {names}, but no 'default'")]
    NoDefault {
        /// Where the templates are from.
        origin: String,
        /// Their names.
        names: String,
    },
    /// The template refuses these messages, or fails on them.
    #[error("the chat template cannot render these messages: {0}")]
    Render(String),
    /// `continue_final_message` with a last message that the template does not show as it is.
    #[error("continue_final_message: the chat template does not show the last message's text as it is")]
    FinalMessageNotFound,
}

/// What a rendering is asked for, besides the messages.
#[derive(Debug, Clone, Default)]
pub struct RenderOptions {
    /// End with what introduces an answer.
    pub add_generation_prompt: bool,
    /// End right after the last message's text, so that the answer continues it.
    pub continue_final_message: bool,
    /// Further variables for the template.
    pub kwargs: Map<String, serde_json::Value>,
}

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    special_tokens: Vec<(String, String)>,
    takes_text: bool,
    takes_parts: bool,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct(NAME).field("source", &self.source).finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// The template of `file` if given, else the model's: `chat_template.jinja`, else `chat_template` of
    /// `tokenizer_config.json`. `None` when there is none.
    ///
    /// # Errors
    /// A template that cannot be read or compiled.
    pub fn load(
        folder: &Path,
        tokenizer: &Tokenizer,
        file: Option<&Path>,
    ) -> Result<Option<Self>, TemplateError> {
        let own = folder.join("chat_template.jinja");
        let path = match file {
            Some(path) => Some(path),
            None => own.exists().then_some(own.as_path()),
        };
        let (origin, source) = if let Some(path) = path {
            let source = std::fs::read_to_string(path)
                .map_err(|source| TemplateError::Read { path: path.to_owned(), source })?;
            (path.display().to_string(), source)
        } else {
            let origin = folder.join("tokenizer_config.json").display().to_string();
            match tokenizer.config().get(NAME).map(|value| default_template(&origin, value)).transpose()? {
                Some(Some(source)) => (origin, source),
                _ => return Ok(None),
            }
        };
        let special_tokens = tokenizer
            .special_tokens()
            .filter_map(|(key, text)| Some((key.to_owned(), text?.to_owned())))
            .collect();
        Self::new(&origin, source, special_tokens).map(Some)
    }

    /// Compiles `source`; `special_tokens` are variables of every rendering: `bos_token` and so on.
    ///
    /// # Errors
    /// The source is not valid Jinja. `origin` says in the message where it is from.
    pub fn new(
        origin: &str,
        source: String,
        special_tokens: Vec<(String, String)>,
    ) -> Result<Self, TemplateError> {
        let mut environment = jinja::environment();
        environment
            .add_template_owned(NAME, jinja::without_generation_marks(&source))
            .map_err(|e| TemplateError::Parse { origin: origin.to_owned(), message: jinja::describe(&e) })?;
        let mut template = Self { environment, source, special_tokens, takes_text: true, takes_parts: true };
        template.takes_text = template.shows(&serde_json::Value::from(PROBE));
        template.takes_parts = template.shows(&parts_of(PROBE));
        // A template that shows neither (it may demand several turns) gets what messages most often hold.
        template.takes_text |= !template.takes_parts;
        Ok(template)
    }

    /// The template as the model has it.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The prompt for `messages`: objects with `role` and `content`, the content a text or a list of text parts.
    ///
    /// # Errors
    /// The template refuses the messages.
    pub fn render(
        &self,
        messages: &[Map<String, serde_json::Value>],
        options: &RenderOptions,
    ) -> Result<String, TemplateError> {
        let mut messages: Vec<_> = messages.iter().map(|message| self.adapted(message)).collect();
        if !options.continue_final_message {
            return self.run(&messages, options);
        }
        let content = messages.last_mut().and_then(|message| message.get_mut("content"));
        let last = content.and_then(append_sentinel).ok_or(TemplateError::FinalMessageNotFound)?;
        let prompt = self.run(&messages, options)?;
        cut_at_sentinel(&prompt, last.trim()).ok_or(TemplateError::FinalMessageNotFound)
    }

    fn run(
        &self,
        messages: &[Map<String, serde_json::Value>],
        options: &RenderOptions,
    ) -> Result<String, TemplateError> {
        let mut variables: Vec<(&str, Value)> = self
            .special_tokens
            .iter()
            .map(|(key, text)| (key.as_str(), Value::from(text.as_str())))
            .collect();
        variables
            .extend(options.kwargs.iter().map(|(key, value)| (key.as_str(), Value::from_serialize(value))));
        variables.push(("messages", Value::from_serialize(messages)));
        variables.push(("add_generation_prompt", Value::from(options.add_generation_prompt)));
        // Transformers passes both when there are none; templates test them for truth.
        for absent in ["tools", "documents"] {
            if !options.kwargs.contains_key(absent) {
                variables.push((absent, Value::from(())));
            }
        }
        let template =
            self.environment.get_template(NAME).map_err(|e| TemplateError::Render(jinja::describe(&e)))?;
        template
            .render(variables.into_iter().collect::<Value>())
            .map_err(|e| TemplateError::Render(jinja::describe(&e)))
    }

    /// The message with its content in a form that the template shows.
    fn adapted(&self, message: &Map<String, serde_json::Value>) -> Map<String, serde_json::Value> {
        let mut message = message.clone();
        let content = message.get("content").unwrap_or(&serde_json::Value::Null);
        let adapted = match content {
            serde_json::Value::Array(_) if self.takes_parts => return message,
            serde_json::Value::Array(_) => serde_json::Value::from(text_of(Some(content))),
            _ if self.takes_text => serde_json::Value::from(text_of(Some(content))),
            _ => parts_of(&text_of(Some(content))),
        };
        message.insert("content".to_owned(), adapted);
        message
    }

    /// Whether the template shows the text of a message with this content, and shows it as text.
    fn shows(&self, content: &serde_json::Value) -> bool {
        let mut message = Map::new();
        message.insert("role".to_owned(), "user".into());
        message.insert("content".to_owned(), content.clone());
        self.run(&[message], &RenderOptions::default())
            .is_ok_and(|prompt| prompt.contains(PROBE) && !prompt.contains(PROBE_TYPE))
    }
}

/// A text that no template has, and that no template changes.
const PROBE: &str = "probe7c41";
/// Stands beside the probe in a list of parts: to be seen only when a template prints the list instead of its text.
const PROBE_TYPE: &str = "\"text\"";

/// Marks the end of the text that an answer continues, as in Transformers. Its space at the end tells whether the
/// template trims messages.
const SENTINEL: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// Marks the end of a content's text, or of its last part of text; returns the text before that. `None`: there is none.
fn append_sentinel(content: &mut serde_json::Value) -> Option<String> {
    let text = match content {
        serde_json::Value::Array(parts) => parts.iter_mut().rev().find_map(|part| part.get_mut("text"))?,
        other => other,
    };
    let before = text.as_str()?.to_owned();
    *text = serde_json::Value::from(format!("{before}{SENTINEL}"));
    Some(before)
}

/// What stands before the sentinel. A template that trimmed the sentinel's space would have trimmed the message's own.
fn cut_at_sentinel(prompt: &str, last: &str) -> Option<String> {
    let at = prompt.rfind(SENTINEL.trim_end())?;
    let before = &prompt[..at];
    let kept = if prompt[at..].starts_with(SENTINEL) { before } else { before.trim_end() };
    kept.contains(last).then(|| kept.to_owned())
}

fn parts_of(text: &str) -> serde_json::Value {
    serde_json::json!([{"type": "text", "text": text}])
}

/// The text of a content: itself, or its text parts, a line each.
fn text_of(content: Option<&serde_json::Value>) -> String {
    match content {
        Some(serde_json::Value::String(text)) => text.clone(),
        Some(serde_json::Value::Array(parts)) => {
            parts.iter().filter_map(|part| part["text"].as_str()).collect::<Vec<_>>().join("\n")
        }
        _ => String::new(),
    }
}

/// A template, or a list of named ones.
fn default_template(origin: &str, value: &serde_json::Value) -> Result<Option<String>, TemplateError> {
    let Some(list) = value.as_array() else { return Ok(value.as_str().map(str::to_owned)) };
    let named: Vec<(&str, &str)> = list
        .iter()
        .filter_map(|entry| Some((entry["name"].as_str()?, entry["template"].as_str()?)))
        .collect();
    match named.iter().find(|(name, _)| *name == "default") {
        Some((_, template)) => Ok(Some((*template).to_owned())),
        None if named.is_empty() => Ok(None),
        None => Err(TemplateError::NoDefault {
            origin: origin.to_owned(),
            names: named.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", "),
        }),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const SMOLLM: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new("test", source.to_owned(), vec![("bos_token".into(), "<s>".into())]).unwrap()
    }

    fn messages(list: serde_json::Value) -> Vec<Map<String, serde_json::Value>> {
        serde_json::from_value(list).unwrap()
    }

    fn render(source: &str, list: serde_json::Value) -> String {
        let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
        template(source).render(&messages(list), &options).unwrap()
    }

    #[test]
    fn a_real_template() {
        assert_eq!(
            render(SMOLLM, json!([{"role": "user", "content": "Hi"}])),
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
             <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn parts_become_text_where_the_template_wants_text() {
        let parts = json!([{"role": "system", "content": "S"}, {"role": "user", "content": [
            {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]);
        assert!(render(SMOLLM, parts).contains("<|im_start|>user\na\nb<|im_end|>"));
    }

    #[test]
    fn text_becomes_parts_where_the_template_wants_parts() {
        let source =
            "{% for m in messages %}{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endfor %}";
        assert_eq!(render(source, json!([{"role": "user", "content": "a"}])), "[a]");
        let both = json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]);
        assert_eq!(render(source, both), "[a][b]");
    }

    #[test]
    fn a_printed_list_is_not_mistaken_for_its_text() {
        let source = "{% for m in messages %}{{ m.content }}{% endfor %}";
        let parts = json!([{"role": "user", "content": [{"type": "text", "text": "a"}]}]);
        assert_eq!(render(source, parts), "a");
    }

    #[test]
    fn what_transformers_offers() {
        assert_eq!(render("{{ bos_token }}{% if tools %}T{% endif %}", json!([])), "<s>");
    }

    #[test]
    fn kwargs_are_variables() {
        let options = RenderOptions {
            kwargs: json!({"enable_thinking": false}).as_object().unwrap().clone(),
            ..RenderOptions::default()
        };
        let rendered = template("{{ enable_thinking }}").render(&[], &options).unwrap();
        assert_eq!(rendered, "False", "as Python writes it");
    }

    #[test]
    fn refusals_carry_the_templates_words() {
        let refusing = template("{{ raise_exception('roles must alternate') }}");
        let error = refusing.render(&[], &RenderOptions::default()).unwrap_err();
        assert!(error.to_string().ends_with(": roles must alternate"), "{error}");
        let error = ChatTemplate::new("file.jinja", "{% if %}".into(), vec![]).unwrap_err();
        assert!(error.to_string().starts_with("file.jinja: "), "{error}");
    }

    #[test]
    fn continuing_the_final_message() {
        let options = RenderOptions { continue_final_message: true, ..RenderOptions::default() };
        let list =
            messages(json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Sure, "}]));
        let prompt = template(SMOLLM).render(&list, &options).unwrap();
        assert!(prompt.ends_with("<|im_start|>assistant\nSure, "), "{prompt}");
        let hidden = template("nothing").render(&list, &options).unwrap_err();
        assert!(matches!(hidden, TemplateError::FinalMessageNotFound));
    }

    #[test]
    fn continued_text_may_look_like_what_the_template_writes_behind_it() {
        let options = RenderOptions { continue_final_message: true, ..RenderOptions::default() };
        for text in ["<", "im", "end", "", "Sure, ", "assistant"] {
            let list =
                messages(json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]));
            let prompt = template(SMOLLM).render(&list, &options).unwrap();
            assert!(prompt.ends_with(&format!("<|im_start|>assistant\n{text}")), "{text}: {prompt}");
            let trimming = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}";
            let prompt = template(trimming).render(&list, &options).unwrap();
            assert_eq!(prompt, format!("<user>Hi</s><assistant>{}", text.trim_end()));
            let in_parts =
                "{% for m in messages %}{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endfor %}";
            let prompt = template(in_parts).render(&list, &options).unwrap();
            assert_eq!(prompt, format!("[Hi][{text}"));
        }
    }

    #[test]
    fn named_templates() {
        let two = json!([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]);
        assert_eq!(default_template("f", &two).unwrap().as_deref(), Some("d"));
        let none = json!([{"name": "tool_use", "template": "t"}]);
        assert!(matches!(default_template("f", &none), Err(TemplateError::NoDefault { .. })));
    }
}

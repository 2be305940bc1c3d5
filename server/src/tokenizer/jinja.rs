//! Jinja as Transformers sets it up for chat templates.

use std::sync::LazyLock;

use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, ErrorKind};
use minijinja_contrib::pycompat::unknown_method_callback;
use regex::Regex;

use super::python_json::{Style, to_python_json};

/// An environment with Transformers' settings, filters and functions, and Python's methods.
pub(super) fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_unknown_method_callback(unknown_method_callback);
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment
}

/// `{% generation %}` marks the assistant's part for training; Transformers runs the block as it stands.
pub(super) fn without_generation_marks(source: &str) -> String {
    static MARK: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})").expect("a constant that a test compiles")
    });
    MARK.replace_all(source, |mark: &regex::Captures<'_>| {
        let block = if mark.get(2).is_some() { "endif" } else { "if true" };
        format!("{}{block}{}", &mark[1], &mark[3])
    })
    .into_owned()
}

/// The error's own words and the line, without the excerpt of the template.
pub(super) fn describe(error: &minijinja::Error) -> String {
    let words = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) if error.kind() != RAISED => format!("{words} (line {line})"),
        _ => words,
    }
}

const RAISED: ErrorKind = ErrorKind::EvalBlock;

#[allow(clippy::needless_pass_by_value, reason = "minijinja calls functions with owned arguments")]
fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(RAISED, message))
}

/// The time now, in UTC: a server has no place of its own.
#[allow(clippy::needless_pass_by_value, reason = "minijinja calls functions with owned arguments")]
fn strftime_now(format: String) -> Result<String, minijinja::Error> {
    let bad = |message: String| {
        minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now('{format}'): {message}"))
    };
    let items = time::format_description::parse_strftime_borrowed(&format).map_err(|e| bad(e.to_string()))?;
    time::OffsetDateTime::now_utc().format(&items).map_err(|e| bad(e.to_string()))
}

/// Python's `json.dumps(value, ensure_ascii=False, …)`.
#[allow(clippy::needless_pass_by_value, reason = "minijinja calls filters with owned arguments")]
fn tojson(value: Value, kwargs: Kwargs) -> Result<String, minijinja::Error> {
    let style = Style {
        indent: kwargs.get("indent")?,
        separators: separators(kwargs.get("separators")?)?,
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
    };
    kwargs.assert_all_used()?;
    let json = serde_json::to_value(&value)
        .map_err(|e| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    Ok(to_python_json(&json, &style))
}

fn separators(list: Option<Vec<String>>) -> Result<Option<(String, String)>, minijinja::Error> {
    let Some(list) = list else { return Ok(None) };
    let wrong =
        || minijinja::Error::new(ErrorKind::InvalidOperation, "tojson: separators must be two strings");
    let [item, key] = <[String; 2]>::try_from(list).map_err(|_| wrong())?;
    Ok(Some((item, key)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str) -> String {
        let source = without_generation_marks(source);
        environment().render_str(&source, ()).unwrap()
    }

    #[test]
    fn filters_and_functions() {
        assert_eq!(render("{{ {'a': [1, 'é<']} | tojson }}"), r#"{"a": [1, "é<"]}"#);
        assert_eq!(render("{{ {'a': 1} | tojson(indent=1) }}"), "{\n \"a\": 1\n}");
        assert_eq!(render("{{ {'a': 1, 'b': 2} | tojson(separators=(',', ':')) }}"), r#"{"a":1,"b":2}"#);
        let year = render("{{ strftime_now('%Y-%m-%d') }}");
        assert!(year.len() == 10 && year.starts_with("20"), "{year}");
    }

    #[test]
    fn pythons_methods_and_loop_controls() {
        assert_eq!(render("{{ ' x '.strip().upper() }}{{ 'a,b'.split(',')[1] }}"), "Xb");
        assert_eq!(
            render("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"),
            "1"
        );
    }

    #[test]
    fn marks_of_the_answer_keep_their_white_space_control() {
        assert_eq!(render("a {%- generation -%} b {%- endgeneration %}\nc"), "abc");
        assert_eq!(render("a\n  {% generation %}\nb{% endgeneration %}"), "a\nb");
    }

    #[test]
    fn mistakes_are_errors() {
        for source in
            ["{{ strftime_now('%Q') }}", "{{ 1 | tojson(separators=(',',)) }}", "{{ 1 | tojson(x=1) }}"]
        {
            assert!(environment().render_str(source, ()).is_err(), "{source}");
        }
    }
}

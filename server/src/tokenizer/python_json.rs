//! JSON as Python's `json.dumps` writes it: models were trained on prompts with its spaces.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{Formatter, Serializer};

/// The arguments of `json.dumps`.
#[derive(Debug, Clone, Default)]
pub(super) struct Style {
    /// Spaces per level; `None` writes one line.
    pub(super) indent: Option<usize>,
    /// After an item, after a key; `None`: `", "` and `": "`, with an indent `","` and `": "`.
    pub(super) separators: Option<(String, String)>,
    /// Keys in order of their code points.
    pub(super) sort_keys: bool,
    /// Escape everything that is not ASCII.
    pub(super) ensure_ascii: bool,
}

/// `json.dumps(value, …)`.
pub(super) fn to_python_json(value: &Value, style: &Style) -> String {
    let (item, key) = match &style.separators {
        Some((item, key)) => (item.as_str(), key.as_str()),
        None if style.indent.is_some() => (",", ": "),
        None => (", ", ": "),
    };
    let formatter = PythonFormatter {
        indent: style.indent,
        item,
        key,
        ascii: style.ensure_ascii,
        level: 0,
        filled: false,
    };
    let mut out = Vec::new();
    let sorted;
    let value = if style.sort_keys {
        sorted = with_sorted_keys(value);
        &sorted
    } else {
        value
    };
    value
        .serialize(&mut Serializer::with_formatter(&mut out, formatter))
        .expect("a JSON value is written to memory without error");
    String::from_utf8(out).expect("JSON is UTF-8")
}

fn with_sorted_keys(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().map(|(k, v)| (k.clone(), with_sorted_keys(v))).collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(entries.into_iter().collect())
        }
        Value::Array(items) => Value::Array(items.iter().map(with_sorted_keys).collect()),
        other => other.clone(),
    }
}

struct PythonFormatter<'a> {
    indent: Option<usize>,
    item: &'a str,
    key: &'a str,
    ascii: bool,
    level: usize,
    /// Whether the innermost array or object has an entry.
    filled: bool,
}

impl PythonFormatter<'_> {
    fn open<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.level += 1;
        self.filled = false;
        writer.write_all(bracket)
    }

    fn close<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.level -= 1;
        if self.filled {
            self.new_line(writer)?;
        }
        self.filled = true;
        writer.write_all(bracket)
    }

    fn begin_entry<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(self.item.as_bytes())?;
        }
        self.new_line(writer)
    }

    fn new_line<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        match self.indent {
            Some(indent) => write!(writer, "\n{:1$}", "", indent * self.level),
            None => Ok(()),
        }
    }
}

impl Formatter for PythonFormatter<'_> {
    fn begin_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"[")
    }

    fn end_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"]")
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.begin_entry(writer, first)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.filled = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"{")
    }

    fn end_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"}")
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.begin_entry(writer, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.filled = true;
        Ok(())
    }

    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        if !self.ascii {
            return writer.write_all(fragment.as_bytes());
        }
        for c in fragment.chars() {
            if c.is_ascii() {
                writer.write_all(&[c as u8])?;
            } else {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    write!(writer, "\\u{unit:04x}")?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn as_python_writes_it() {
        let value = json!({"b": [1, 2.5, {}, []], "a": {"x": "é\n\"🦀"}, "n": null});
        let check = |style: Style, expected: &str| assert_eq!(to_python_json(&value, &style), expected);
        check(Style::default(), r#"{"b": [1, 2.5, {}, []], "a": {"x": "é\n\"🦀"}, "n": null}"#);
        check(
            Style { sort_keys: true, ensure_ascii: true, ..Style::default() },
            r#"{"a": {"x": "\u00e9\n\"\ud83e\udd80"}, "b": [1, 2.5, {}, []], "n": null}"#,
        );
        check(
            Style { separators: Some((",".into(), ":".into())), ..Style::default() },
            r#"{"b":[1,2.5,{},[]],"a":{"x":"é\n\"🦀"},"n":null}"#,
        );
        check(
            Style { indent: Some(2), ..Style::default() },
            "{\n  \"b\": [\n    1,\n    2.5,\n    {},\n    []\n  ],\n  \"a\": {\n    \"x\": \"é\\n\\\"🦀\"\n  },\n  \"n\": null\n}",
        );
    }
}

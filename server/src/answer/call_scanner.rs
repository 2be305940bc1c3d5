//! One call as JSON, `{"name": …, "arguments": {…}}`, in a text that arrives in pieces: arguments are handed on as they
//! come, not when they are complete.

/// What a scanner came across.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The tool's name.
    Name(String),
    /// More of the arguments' JSON text; after the name.
    Arguments(String),
    /// The object is complete.
    Done,
    /// This is no call.
    Invalid,
}

/// Reads one call, character by character.
#[derive(Debug, Default)]
pub(super) struct CallScanner {
    state: State,
    /// The key whose value is being read.
    key: String,
    /// The text of the key, or of the value as far as it is kept.
    text: String,
    value: Nesting,
    named: bool,
    /// Arguments that came before the name, and whether there were any.
    early: String,
    has_arguments: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum State {
    #[default]
    Start,
    KeyOrEnd,
    Key,
    Colon,
    ValueStart,
    Value,
    CommaOrEnd,
    Over,
}

/// How deep a JSON text is nested, and whether it is inside a string.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Nesting {
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Nesting {
    /// Takes note of a character; whether it closes what the first one opened.
    pub(super) fn closes(&mut self, c: char) -> bool {
        if self.in_string {
            match c {
                _ if self.escaped => self.escaped = false,
                '\\' => self.escaped = true,
                '"' => {
                    self.in_string = false;
                    return self.depth == 0;
                }
                _ => {}
            }
            return false;
        }
        match c {
            '"' => self.in_string = true,
            '{' | '[' => self.depth += 1,
            '}' | ']' => {
                self.depth = self.depth.saturating_sub(1);
                return self.depth == 0;
            }
            _ => {}
        }
        false
    }
}

impl CallScanner {
    /// Whether the name is known, so that this is a call.
    pub(super) fn is_named(&self) -> bool {
        self.named
    }

    /// Adds a character. Nothing follows `Done` and `Invalid`.
    pub(super) fn push(&mut self, c: char, events: &mut Vec<Event>) {
        match self.state {
            State::Start => match c {
                '{' => self.state = State::KeyOrEnd,
                c if c.is_whitespace() => {}
                _ => self.invalid(events),
            },
            State::KeyOrEnd => match c {
                '"' => self.begin(State::Key, c),
                '}' => self.end(events),
                c if c.is_whitespace() => {}
                _ => self.invalid(events),
            },
            State::Key => {
                self.text.push(c);
                if self.value.closes(c) {
                    match serde_json::from_str(&self.text) {
                        Ok(key) => {
                            self.key = key;
                            self.state = State::Colon;
                        }
                        Err(_) => self.invalid(events),
                    }
                }
            }
            State::Colon => match c {
                ':' => self.state = State::ValueStart,
                c if c.is_whitespace() => {}
                _ => self.invalid(events),
            },
            State::ValueStart => {
                if !c.is_whitespace() {
                    self.begin(State::Value, c);
                    self.stream(events);
                }
            }
            State::Value => self.value_char(c, events),
            State::CommaOrEnd => match c {
                ',' => self.state = State::KeyOrEnd,
                '}' => self.end(events),
                c if c.is_whitespace() => {}
                _ => self.invalid(events),
            },
            State::Over => {}
        }
    }

    fn begin(&mut self, state: State, first: char) {
        self.state = state;
        self.text.clear();
        self.text.push(first);
        self.value = Nesting::default();
        self.value.closes(first);
    }

    fn value_char(&mut self, c: char, events: &mut Vec<Event>) {
        let is_bare = self.value.depth == 0 && !self.value.in_string;
        if is_bare && (c == ',' || c == '}' || c.is_whitespace()) {
            // A number or a word ends with what follows it.
            self.value_end(events);
            if self.state != State::Over {
                self.state = State::CommaOrEnd;
                self.push(c, events);
            }
            return;
        }
        self.text.push(c);
        let closes = self.value.closes(c);
        self.stream(events);
        if closes {
            self.state = State::CommaOrEnd;
            self.value_end(events);
        }
    }

    fn is_arguments(&self) -> bool {
        self.key == "arguments" || self.key == "parameters"
    }

    /// Hands on arguments that are an object; others are looked at when they are complete.
    fn stream(&mut self, events: &mut Vec<Event>) {
        if self.is_arguments() && self.value.depth > 0 || self.has_arguments && self.is_arguments() {
            self.has_arguments = true;
            let text = std::mem::take(&mut self.text);
            self.arguments(&text, events);
        }
    }

    fn arguments(&mut self, text: &str, events: &mut Vec<Event>) {
        if !self.named {
            self.early.push_str(text);
        } else if let Some(Event::Arguments(before)) = events.last_mut() {
            before.push_str(text);
        } else {
            events.push(Event::Arguments(text.to_owned()));
        }
    }

    fn value_end(&mut self, events: &mut Vec<Event>) {
        let text = std::mem::take(&mut self.text);
        if self.key == "name" && !self.named {
            match serde_json::from_str::<String>(&text) {
                Ok(name) if !name.is_empty() => {
                    events.push(Event::Name(name));
                    self.named = true;
                    let early = std::mem::take(&mut self.early);
                    if !early.is_empty() {
                        self.arguments(&early, events);
                    }
                }
                _ => self.invalid(events),
            }
        } else if self.is_arguments() && !self.has_arguments {
            // Some models write the object as a string, or `null` for none.
            let object = match serde_json::from_str::<serde_json::Value>(&text) {
                Ok(serde_json::Value::String(object)) => object,
                Ok(serde_json::Value::Null) => "{}".to_owned(),
                _ => return self.invalid(events),
            };
            self.has_arguments = true;
            self.arguments(&object, events);
        }
    }

    fn end(&mut self, events: &mut Vec<Event>) {
        if !self.named {
            return self.invalid(events);
        }
        if !self.has_arguments {
            self.arguments("{}", events);
        }
        self.state = State::Over;
        events.push(Event::Done);
    }

    fn invalid(&mut self, events: &mut Vec<Event>) {
        self.state = State::Over;
        events.push(Event::Invalid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(text: &str) -> (Option<String>, String, Option<Event>) {
        let (mut scanner, mut events) = (CallScanner::default(), Vec::new());
        for c in text.chars() {
            scanner.push(c, &mut events);
        }
        let (mut name, mut arguments, mut end) = (None, String::new(), None);
        for event in events {
            match event {
                Event::Name(text) => name = Some(text),
                Event::Arguments(text) => arguments.push_str(&text),
                other => end = Some(other),
            }
        }
        (name, arguments, end)
    }

    #[test]
    fn calls_in_many_forms() {
        let object = r#"{"a": "}\"{", "b": [1, {}]}"#;
        let string = serde_json::to_string(object).unwrap();
        for text in [
            format!(r#"{{"name": "f", "arguments": {object}}}"#),
            format!(r#" {{ "name" : "f" , "parameters" : {object} }} rest"#),
            format!(r#"{{"arguments": {object}, "name": "f"}}"#),
            format!(
                r#"{{"type": "function", "id": 7, "x": [{{"name": 1}}], "name": "f", "arguments": {object}}}"#
            ),
            format!(r#"{{"name": "f", "arguments": {string}}}"#),
        ] {
            assert_eq!(scan(&text), (Some("f".into()), object.into(), Some(Event::Done)), "{text}");
        }
        for text in
            [r#"{"name": "f"}"#, r#"{"name": "f", "arguments": null}"#, r#"{"name": "f", "arguments": {}}"#]
        {
            assert_eq!(scan(text), (Some("f".into()), "{}".into(), Some(Event::Done)), "{text}");
        }
    }

    #[test]
    fn what_is_no_call() {
        for text in [
            "x",
            "[",
            "{}",
            r#"{"a": 1}"#,
            r#"{"name": 5, "#,
            r#"{"name" 5"#,
            r#"{"name": "", "#,
            "{5",
            r#"{"name": "f", "arguments": 5}"#,
        ] {
            assert_eq!(scan(text).2, Some(Event::Invalid), "{text}");
        }
    }

    #[test]
    fn arguments_come_as_they_are_written() {
        let (mut scanner, mut events) = (CallScanner::default(), Vec::new());
        r#"{"name": "f", "arguments": {"a": "#.chars().for_each(|c| scanner.push(c, &mut events));
        assert_eq!(events, [Event::Name("f".into()), Event::Arguments("{\"a\": ".into())]);
        assert!(scanner.is_named());
    }
}

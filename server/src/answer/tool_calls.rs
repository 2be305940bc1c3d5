//! Calls of tools in a text that arrives in pieces.

use super::call_scanner::{CallScanner, Event, Nesting};
use super::marker::{Found, find};
use super::tool_format::{HERMES_BEGIN, HERMES_END, LLAMA_TAG, MISTRAL_BEGIN, ToolFormat};
use super::{Part, push_text};

/// Longest name of a tool that is waited for.
const MAX_NAME_BYTES: usize = 256;

/// Finds the calls of one format. What only looks like a call is content.
#[derive(Debug)]
pub struct ToolCallParser {
    format: ToolFormat,
    /// Names of the request's tools.
    tools: Vec<String>,
    /// Whether more than one call is wanted.
    parallel: bool,
    state: State,
    /// Text that was pushed and not looked at.
    held: String,
    /// What was looked at and is content if it turns out to be no call.
    raw: String,
    /// White space that is content only if something else follows.
    blank: String,
    /// Whether content was handed out since the last call.
    spoken: bool,
    /// Calls so far.
    calls: usize,
}

#[derive(Debug)]
enum State {
    /// Looking for the format's marker.
    Text,
    /// Nothing but white space since the beginning, or since what separates two calls, in the format without a marker.
    Unmarked,
    /// Behind the marker.
    Marked,
    /// Inside a call's object.
    Call(CallScanner),
    /// Behind a call.
    AfterCall,
    /// Between the objects of a list.
    Item,
    /// At a name that stands before the arguments.
    Name,
    /// In arguments that stand behind the name.
    Arguments(Nesting),
    /// Content to the end.
    Plain,
    /// Nothing more counts.
    Ignored,
}

impl ToolCallParser {
    /// A parser for the tools of these names; with `parallel` off, only the first call counts.
    pub fn new(format: ToolFormat, tools: Vec<String>, parallel: bool) -> Self {
        let state = if format == ToolFormat::Llama3Json { State::Unmarked } else { State::Text };
        let (held, raw, blank) = Default::default();
        Self { format, tools, parallel, state, held, raw, blank, spoken: false, calls: 0 }
    }

    /// Adds text; appends what is certain now.
    pub(super) fn push(&mut self, text: &str, parts: &mut Vec<Part>) {
        self.held.push_str(text);
        while self.step(parts) {}
    }

    /// Appends what was held back, when no more text follows.
    pub(super) fn finish(&mut self, parts: &mut Vec<Part>) {
        let rest = std::mem::take(&mut self.raw) + &std::mem::take(&mut self.held);
        let belongs_to_calls = match &self.state {
            State::Ignored | State::Arguments(_) | State::AfterCall => true,
            State::Call(scanner) => scanner.is_named(),
            State::Item => self.calls > 0,
            _ => false,
        };
        if !belongs_to_calls {
            self.content(&rest, parts);
        }
        if self.calls == 0 {
            push_text(parts, Part::Content(std::mem::take(&mut self.blank)));
        }
    }

    /// Does what can be done with the held text; `false` when more must come first.
    fn step(&mut self, parts: &mut Vec<Part>) -> bool {
        match self.state {
            State::Text => self.text(parts),
            State::Unmarked => self.unmarked(parts),
            State::Marked => self.marked(parts),
            State::Call(_) => self.call(parts),
            State::AfterCall => self.after_call(),
            State::Item => self.item(parts),
            State::Name => self.name(parts),
            State::Arguments(_) => self.arguments(parts),
            State::Plain => {
                let text = std::mem::take(&mut self.held);
                self.content(&text, parts);
                false
            }
            State::Ignored => {
                self.held.clear();
                false
            }
        }
    }

    fn content(&mut self, text: &str, parts: &mut Vec<Part>) {
        self.blank.push_str(text);
        self.spoken |= !self.blank.trim().is_empty();
        if self.spoken {
            push_text(parts, Part::Content(std::mem::take(&mut self.blank)));
        }
    }

    fn text(&mut self, parts: &mut Vec<Part>) -> bool {
        let marker = if self.format == ToolFormat::Hermes { HERMES_BEGIN } else { MISTRAL_BEGIN };
        match find(&self.held, marker) {
            Found::At(at) => {
                let before: String = self.held.drain(..at).collect();
                self.content(&before, parts);
                self.consume(marker.len());
                self.state = State::Marked;
                true
            }
            Found::Maybe(at) => {
                let before: String = self.held.drain(..at).collect();
                self.content(&before, parts);
                false
            }
        }
    }

    /// Moves the first bytes of the held text to what may turn out to be content.
    fn consume(&mut self, bytes: usize) {
        let text: String = self.held.drain(..bytes).collect();
        self.raw.push_str(&text);
    }

    /// Moves white space there; the character that follows, once it is known.
    fn next_char(&mut self) -> Option<char> {
        let blank = self.held.len() - self.held.trim_start().len();
        self.consume(blank);
        self.held.chars().next()
    }

    fn unmarked(&mut self, parts: &mut Vec<Part>) -> bool {
        match self.next_char() {
            None => return false,
            Some('{') => self.state = State::Call(CallScanner::default()),
            Some('<') if self.held.starts_with(LLAMA_TAG) => self.consume(LLAMA_TAG.len()),
            Some('<') if LLAMA_TAG.starts_with(&self.held) => return false,
            Some(_) => self.give_up(parts),
        }
        true
    }

    fn marked(&mut self, parts: &mut Vec<Part>) -> bool {
        match (self.next_char(), self.format) {
            (None, _) => return false,
            (Some('{'), _) => self.state = State::Call(CallScanner::default()),
            (Some('['), ToolFormat::Mistral) => {
                self.consume(1);
                self.state = State::Item;
            }
            (Some(c), ToolFormat::Mistral) if is_name(c) => self.state = State::Name,
            _ => self.give_up(parts),
        }
        true
    }

    /// What was looked at is no call, but content. Its marker is not found again.
    fn give_up(&mut self, parts: &mut Vec<Part>) {
        let text = std::mem::take(&mut self.raw);
        self.content(&text, parts);
        self.state = if self.format == ToolFormat::Llama3Json { State::Plain } else { State::Text };
    }

    fn call(&mut self, parts: &mut Vec<Part>) -> bool {
        let State::Call(mut scanner) = std::mem::replace(&mut self.state, State::Ignored) else {
            return false;
        };
        let (was_named, mut events, mut read) = (scanner.is_named(), Vec::new(), self.held.len());
        for (at, c) in self.held.char_indices() {
            scanner.push(c, &mut events);
            if matches!(events.last(), Some(Event::Done | Event::Invalid)) {
                read = at + c.len_utf8();
                break;
            }
        }
        let text: String = self.held.drain(..read).collect();
        if !was_named {
            self.raw.push_str(&text);
        }
        for event in events {
            match event {
                // Without a marker, only a tool's name tells a call from an answer in JSON.
                Event::Name(name) if self.format == ToolFormat::Llama3Json && !self.tools.contains(&name) => {
                    self.give_up(parts);
                    return true;
                }
                Event::Name(name) => self.begin_call(name, parts),
                Event::Arguments(text) => {
                    push_text(parts, Part::Arguments { index: self.calls - 1, text });
                }
                Event::Done => {
                    self.state = State::AfterCall;
                    return true;
                }
                Event::Invalid => {
                    self.give_up(parts);
                    return true;
                }
            }
        }
        self.state = State::Call(scanner);
        false
    }

    fn begin_call(&mut self, name: String, parts: &mut Vec<Part>) {
        self.blank.clear();
        self.raw.clear();
        self.spoken = false;
        parts.push(Part::Call { index: self.calls, name });
        self.calls += 1;
    }

    fn after_call(&mut self) -> bool {
        if !self.parallel {
            self.state = State::Ignored;
            return true;
        }
        let next = self.next_char();
        self.raw.clear();
        match (self.format, next) {
            (_, None) => return false,
            (ToolFormat::Hermes, Some(_)) => {
                if self.held.starts_with(HERMES_END) {
                    self.held.drain(..HERMES_END.len());
                } else if HERMES_END.starts_with(&self.held) {
                    return false;
                }
                self.state = State::Text;
            }
            (ToolFormat::Llama3Json, Some(';' | ',')) => {
                self.held.remove(0);
                self.state = State::Unmarked;
            }
            (ToolFormat::Llama3Json, Some('{' | '<')) => self.state = State::Unmarked,
            (ToolFormat::Llama3Json, Some(_)) => self.state = State::Plain,
            (ToolFormat::Mistral, Some(',')) => {
                self.held.remove(0);
                self.state = State::Item;
            }
            (ToolFormat::Mistral, Some(']')) => {
                self.held.remove(0);
                self.state = State::Text;
            }
            (ToolFormat::Mistral, Some(_)) => self.state = State::Text,
        }
        true
    }

    fn item(&mut self, parts: &mut Vec<Part>) -> bool {
        match self.next_char() {
            None => return false,
            Some('{') => self.state = State::Call(CallScanner::default()),
            Some(_) => self.give_up(parts),
        }
        true
    }

    /// `name{…}`, `name[ARGS]{…}`, `name[CALL_ID]…[ARGS]{…}`.
    fn name(&mut self, parts: &mut Vec<Part>) -> bool {
        let Some(at) = self.held.find('{') else {
            if self.held.len() > MAX_NAME_BYTES {
                self.give_up(parts);
                return true;
            }
            return false;
        };
        let name: String = self.held.chars().take_while(|&c| is_name(c)).collect();
        let between = self.held[name.len()..at].trim();
        if between.is_empty() || between.starts_with('[') && between.ends_with("[ARGS]") {
            self.held.drain(..at);
            self.begin_call(name, parts);
            self.state = State::Arguments(Nesting::default());
        } else {
            self.give_up(parts);
        }
        true
    }

    fn arguments(&mut self, parts: &mut Vec<Part>) -> bool {
        let State::Arguments(nesting) = &mut self.state else { return false };
        let end = self.held.char_indices().find_map(|(at, c)| nesting.closes(c).then_some(at + c.len_utf8()));
        let text: String = self.held.drain(..end.unwrap_or(self.held.len())).collect();
        let index = self.calls - 1;
        push_text(parts, Part::Arguments { index, text });
        if end.is_some() {
            self.state = State::AfterCall;
        }
        end.is_some()
    }
}

fn is_name(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '-' | '.')
}

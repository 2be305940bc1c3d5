use proptest::prelude::*;

use super::*;

fn tools(format: ToolFormat, parallel: bool) -> AnswerParser {
    AnswerParser::new().with_tools(ToolCallParser::new(format, vec!["f".into(), "g".into()], parallel))
}

/// Parts of a text that comes in these pieces, with text that goes on joined.
fn parse(mut parser: AnswerParser, pieces: &[&str]) -> Vec<Part> {
    let mut joined = Vec::new();
    for piece in pieces {
        parser.push(piece).into_iter().for_each(|part| push_text(&mut joined, part));
    }
    parser.finish().into_iter().for_each(|part| push_text(&mut joined, part));
    joined
}

/// The text whole, and cut everywhere.
fn check(parser: impl Fn() -> AnswerParser, text: &str, expected: &[Part]) {
    assert_eq!(parse(parser(), &[text]), expected, "{text}");
    let characters: Vec<String> = text.chars().map(String::from).collect();
    let characters: Vec<&str> = characters.iter().map(String::as_str).collect();
    assert_eq!(parse(parser(), &characters), expected, "{text}, character by character");
}

fn content(text: &str) -> Part {
    Part::Content(text.to_owned())
}

fn thought(text: &str) -> Part {
    Part::Reasoning(text.to_owned())
}

fn call(index: usize, name: &str, arguments: &str) -> [Part; 2] {
    [Part::Call { index, name: name.to_owned() }, Part::Arguments { index, text: arguments.to_owned() }]
}

fn calls(list: &[(&str, &str)]) -> Vec<Part> {
    list.iter().enumerate().flat_map(|(index, (name, arguments))| call(index, name, arguments)).collect()
}

const F: &str = r#"{"name": "f", "arguments": {"a": "<x> [é]"}}"#;
const F_ARGUMENTS: &str = r#"{"a": "<x> [é]"}"#;
const LLAMA_F: &str = r#"{"name": "f", "parameters": {"a": "<x> [é]"}}"#;

#[test]
fn calls_of_each_format() {
    let f = ("f", F_ARGUMENTS);
    let cases = [
        (ToolFormat::Hermes, format!("<tool_call>\n{F}\n</tool_call>"), calls(&[f])),
        (
            ToolFormat::Hermes,
            format!("<tool_call>{F}</tool_call>\n<tool_call>\n{F}\n</tool_call>\n"),
            calls(&[f, f]),
        ),
        (
            ToolFormat::Hermes,
            format!("Let me see.\n<tool_call>\n{F}\n</tool_call>"),
            [&[content("Let me see.\n")], calls(&[f]).as_slice()].concat(),
        ),
        (ToolFormat::Llama3Json, LLAMA_F.to_owned(), calls(&[f])),
        (ToolFormat::Llama3Json, format!("<|python_tag|>{LLAMA_F}; {LLAMA_F}"), calls(&[f, f])),
        (ToolFormat::Mistral, format!("[TOOL_CALLS] [{F}, {F}]"), calls(&[f, f])),
        (ToolFormat::Mistral, format!("[TOOL_CALLS]{F}"), calls(&[f])),
        (
            ToolFormat::Mistral,
            format!("[TOOL_CALLS]f[ARGS]{F_ARGUMENTS}[TOOL_CALLS]g{{}}[TOOL_CALLS]g[CALL_ID]12[ARGS]{{}}"),
            calls(&[f, ("g", "{}"), ("g", "{}")]),
        ),
    ];
    for (format, text, expected) in cases {
        check(|| tools(format, true), &text, &expected);
    }
}

#[test]
fn what_is_no_call_is_content() {
    for (format, texts) in [
        (
            ToolFormat::Hermes,
            &[
                "Hello",
                "<tool_call",
                "a <tool_call> b",
                "<tool_call>{\"x\": 1}</tool_call>",
                "1 < 2\n",
                "{\"name\": \"f\"}",
            ][..],
        ),
        (
            ToolFormat::Llama3Json,
            &[
                "Hello",
                "{\"a\": 1}",
                "{\"name\": \"h\", \"parameters\": {}}",
                "{\"na",
                "<b>",
                " {}",
                "<|python_tag|>print(1)",
            ],
        ),
        (ToolFormat::Mistral, &["[TOOL", "[TOOL_CALLS] []", "[TOOL_CALLS] 5", "[1]", "[TOOL_CALLS]f(x)"]),
    ] {
        for text in texts {
            check(|| tools(format, true), text, &[content(text)]);
        }
    }
    check(|| tools(ToolFormat::Hermes, true), "", &[]);
}

#[test]
fn one_call_where_one_is_wanted() {
    let text = format!("<tool_call>\n{F}\n</tool_call>\n<tool_call>\n{F}\n</tool_call>");
    check(|| tools(ToolFormat::Hermes, false), &text, &calls(&[("f", F_ARGUMENTS)]));
    check(
        || tools(ToolFormat::Llama3Json, false),
        &format!("{LLAMA_F}; {LLAMA_F}"),
        &calls(&[("f", F_ARGUMENTS)]),
    );
}

#[test]
fn a_call_that_is_cut_short_keeps_what_there_is() {
    let expected = [
        Part::Call { index: 0, name: "f".into() },
        Part::Arguments { index: 0, text: "{\"a\": \"<x".into() },
    ];
    check(
        || tools(ToolFormat::Hermes, true),
        "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"<x",
        &expected,
    );
    check(|| tools(ToolFormat::Mistral, true), "[TOOL_CALLS]f[ARGS]{\"a\": \"<x", &expected);
}

#[test]
fn reasoning_comes_before_the_answer() {
    let parser = || AnswerParser::new().with_reasoning(false);
    check(parser, "<think>\nLet me\n\nsee.\n</think>\n\nYes", &[thought("Let me\n\nsee."), content("Yes")]);
    check(parser, "\n<think></think>Yes", &[content("Yes")]);
    check(parser, "Yes", &[content("Yes")]);
    check(parser, " <thin", &[content(" <thin")]);
    check(parser, "<think>no end \n", &[thought("no end")]);
    check(parser, "No <think>x</think>", &[content("No <think>x</think>")]);
    let begun = || AnswerParser::new().with_reasoning(true);
    check(begun, "\nsee </thing> </think> Yes", &[thought("see </thing>"), content("Yes")]);
    let both = || tools(ToolFormat::Hermes, true).with_reasoning(false);
    let text = format!("<think>\n<tool_call>?\n</think>\n\n<tool_call>\n{F}\n</tool_call>");
    check(both, &text, &[&[thought("<tool_call>?")], calls(&[("f", F_ARGUMENTS)]).as_slice()].concat());
}

#[test]
fn templates_tell_their_format() {
    for (source, format) in [
        ("… <tool_call></tool_call> …", Some(ToolFormat::Hermes)),
        ("{{- \"<|python_tag|>\" }}", Some(ToolFormat::Llama3Json)),
        ("{{ \"[TOOL_CALLS]\" }}", Some(ToolFormat::Mistral)),
        ("{{ messages }}", None),
    ] {
        assert_eq!(ToolFormat::of_template(source), format);
    }
    assert_eq!(ToolFormat::Mistral.call_id().len(), 9);
    assert_ne!(ToolFormat::Hermes.call_id(), ToolFormat::Hermes.call_id());
}

proptest! {
    /// However a text is cut, its parts are the same; and nothing makes a parser panic.
    #[test]
    fn cuts_do_not_matter(
        tokens in prop::collection::vec(prop::sample::select(vec![
            "<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "{", "}", "[", "]", "\"", ":", ",", ";",
            "\"name\": ", "\"f\"", "\"arguments\": ", "f", " ", "\n", "é", "1", "\\", "<|python_tag|>"]), 0..24),
        cuts in prop::collection::vec(0usize..200, 0..10),
        format in prop::sample::select(vec![ToolFormat::Hermes, ToolFormat::Llama3Json, ToolFormat::Mistral]),
    ) {
        let text = tokens.concat();
        let mut cuts: Vec<usize> = cuts.into_iter().filter(|&cut| text.is_char_boundary(cut)).collect();
        cuts.extend([0, text.len()]);
        cuts.sort_unstable();
        let pieces: Vec<&str> = cuts.windows(2).map(|w| &text[w[0]..w[1]]).collect();
        let parser = || tools(format, true).with_reasoning(false);
        prop_assert_eq!(parse(parser(), &pieces), parse(parser(), &[&text]));
    }
}

use super::*;
use crate::engine::Progress;

const EOS: u32 = 0;

fn compiler() -> GrammarCompiler {
    GrammarCompiler::new(Arc::new(crate::tokenizer::tests::rustdoc()), 4096, vec![EOS])
}

/// Whether the grammar takes the text, token by token, and may end or has ended behind it.
fn takes(compiler: &GrammarCompiler, source: &GrammarSource, text: &str) -> bool {
    takes_with(compiler, source, GrammarOptions::default(), text)
}

fn takes_with(
    compiler: &GrammarCompiler,
    source: &GrammarSource,
    options: GrammarOptions,
    text: &str,
) -> bool {
    let grammar = compiler.compile(source, options).unwrap();
    let mut place = grammar.0.begin();
    let mut ended = false;
    // As a model would: any tokens that spell the text, the first one that is allowed and longest.
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        if ended {
            return false;
        }
        let mask = place.allowed().unwrap();
        let next = (0..4096u32)
            .filter(|&id| mask.contains(id))
            .map(|id| (id, compiler.tokenizer.token_bytes(id)))
            .filter(|(_, bytes)| !bytes.is_empty() && rest.starts_with(bytes))
            .max_by_key(|(_, bytes)| bytes.len());
        let Some((id, bytes)) = next else { return false };
        ended = place.accept(id).unwrap() == Progress::Complete;
        rest = &rest[bytes.len()..];
    }
    ended || place.allowed().unwrap().contains(EOS)
}

#[test]
fn texts_that_follow_and_texts_that_do_not() {
    let compiler = compiler();
    let schema = json!({"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"], "additionalProperties": false});
    let schema = GrammarSource::JsonSchema(schema);
    let regex = |text: &str| GrammarSource::Regex(text.to_owned());
    let choices =
        GrammarSource::Choice(["a", "ab", "x/y", "1+1?", "日本", "-#&~"].map(str::to_owned).to_vec());
    let lark = GrammarSource::Lark(
        "start: greeting \" \" NAME\ngreeting: \"hi\" | \"ho\"\nNAME: /[a-z]+/".to_owned(),
    );
    let cases = [
        (&GrammarSource::JsonObject, r#"{"a": [1, {"b": null}], "é": "日本"}"#, true),
        (&GrammarSource::JsonObject, "[1]", false),
        (&schema, r#"{"name": "Bo", "age": 3}"#, true),
        (&schema, "{\n  \"name\": \"Bo\",\n  \"age\": 3\n}", true),
        (&schema, r#"{"name": "Bo"}"#, false),
        (&schema, r#"{"name": "Bo", "age": "3"}"#, false),
        (&schema, r#"{"name": "Bo", "age": 3"#, false),
        (&regex(r"[0-9]{3}-[a-f]+"), "123-abc", true),
        (&regex(r"[0-9]{3}-[a-f]+"), "12-abc", false),
        (&regex(r"a/b\d"), "a/b7", true),
        (&choices, "a", true),
        (&choices, "ab", true),
        (&choices, "x/y", true),
        (&choices, "1+1?", true),
        (&choices, "日本", true),
        (&choices, "-#&~", true),
        (&choices, "abc", false),
        (&lark, "hi bob", true),
        (&lark, "hi", false),
    ];
    for (source, text, expected) in cases {
        assert_eq!(takes(&compiler, source, text), expected, "{source:?} {text}");
    }
}

#[test]
fn white_space_in_json_has_an_end() {
    let compiler = compiler();
    let spaces = " ".repeat(100);
    assert!(takes(&compiler, &GrammarSource::JsonObject, "{ }"));
    assert!(!takes(&compiler, &GrammarSource::JsonObject, &format!("{{{spaces}}}")));
}

#[test]
fn what_is_wrong_is_told_without_the_parsers_insides() {
    let compiler = compiler();
    let cases = [
        GrammarSource::JsonSchema(json!({"type": "nonsense"})),
        GrammarSource::JsonSchema(json!(5)),
        GrammarSource::JsonSchema(json!(false)),
        GrammarSource::JsonSchema(json!({"$ref": "https://example.com/schema"})),
        GrammarSource::JsonSchema(json!({"type": "integer", "minimum": 5, "maximum": 1})),
        GrammarSource::Regex("(".to_owned()),
        GrammarSource::Regex("(?=a)b".to_owned()),
        GrammarSource::Lark("start: nothing".to_owned()),
        GrammarSource::Lark(String::new()),
        GrammarSource::Lark("root ::= \"a\"".to_owned()),
    ];
    for source in cases {
        let error = compiler.compile(&source, GrammarOptions::default()).unwrap_err().to_string();
        assert!(
            !error.is_empty() && !error.contains("<state>") && !error.contains("verbose"),
            "{source:?}: {error}"
        );
    }
}

#[test]
fn a_first_mask_that_takes_too_long_is_given_up() {
    // This one takes seconds.
    let source = GrammarSource::Regex("(a{1000}){1000}{1000}".to_owned());
    let matcher = Matcher::new(compiler().make_factory().unwrap().create_parser(source.grammar()));
    let error = TokenGrammar::new(matcher, Vec::new(), Duration::from_millis(20)).err().unwrap();
    assert!(error.contains("too complex"), "{error}");
}

#[test]
fn an_end_of_sequence_that_is_ignored_comes_only_at_the_end() {
    let compiler = compiler();
    let digits = GrammarSource::Regex("[0-9]+".to_owned());
    let first_and_second = |ignore_eos| {
        let grammar = compiler.compile(&digits, GrammarOptions { ignore_eos, ..Default::default() }).unwrap();
        let mut place = grammar.0.begin();
        let first = place.allowed().unwrap().contains(EOS);
        let one = compiler.tokenizer.token_id("1").unwrap();
        assert_eq!(place.accept(one), Ok(Progress::Open));
        (first, place.allowed().unwrap().contains(EOS))
    };
    assert_eq!(first_and_second(false), (false, true));
    assert_eq!(first_and_second(true), (false, false));
}

#[test]
fn equal_grammars_are_compiled_once() {
    let compiler = compiler();
    let compile = |text: &str| {
        compiler.compile(&GrammarSource::Regex(text.to_owned()), GrammarOptions::default()).unwrap()
    };
    assert_eq!(compile("a+"), compile("a+"));
    assert_ne!(compile("a+"), compile("b+"));
}

#[test]
fn reasoning_is_free_and_the_answer_is_not() {
    let compiler = compiler();
    let id = |token: &str| compiler.tokenizer.token_id(token).unwrap();
    let (begin, end) = (id("<"), id(">"));
    let source = GrammarSource::Choice(vec!["1".to_owned()]);
    let begun = |begun| GrammarOptions {
        reasoning: Some(ReasoningTokens { begin, end, begun }),
        ..GrammarOptions::default()
    };
    for (options, text, expected) in [
        (begun(false), "1", true),
        (begun(false), "<anything>1", true),
        (begun(false), "<anything>2", false),
        (begun(false), "anything>1", false),
        (begun(true), "anything>1", true),
        (begun(true), "1", false),
    ] {
        assert_eq!(takes_with(&compiler, &source, options, text), expected, "{options:?} {text}");
    }
}

#[test]
fn numbers_without_a_bottom_are_refused() {
    let compiler = compiler();
    let compile = |source: &GrammarSource| compiler.compile(source, GrammarOptions::default());
    for number in [json!(i64::MIN), json!(i64::MIN as f64)] {
        let schema = json!({"items": {"enum": [number]}});
        let lark = GrammarSource::Lark(format!("start: %json {schema}"));
        for source in [GrammarSource::JsonSchema(schema), lark] {
            assert!(matches!(compile(&source), Err(GrammarError::Invalid(_))), "{source:?}");
        }
    }
    compile(&GrammarSource::JsonSchema(json!({"enum": [i64::MIN + 2048, i64::MAX, -1e19, 1e300]}))).unwrap();
}

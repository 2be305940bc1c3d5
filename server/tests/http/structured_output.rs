//! Answers that follow a schema, an expression, a choice or a grammar.

use serde_json::{Value, json};

use crate::support::TestServer;

const CHAT: &str = "/v1/chat/completions";

fn schema() -> Value {
    json!({"type": "object", "properties": {
        "kind": {"enum": ["struct", "trait", "fn"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "minItems": 1, "maxItems": 2}},
        "required": ["kind", "count", "tags"], "additionalProperties": false})
}

fn check(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{text}: {e}"));
    assert!(["struct", "trait", "fn"].contains(&value["kind"].as_str().unwrap()), "{text}");
    assert!(value["count"].as_u64().unwrap() < 100, "{text}");
    let tags = value["tags"].as_array().unwrap();
    assert!((1..=2).contains(&tags.len()), "{text}");
    assert!(tags.iter().all(|tag| tag.as_str().unwrap().chars().count() <= 6), "{text}");
}

#[tokio::test]
async fn every_answer_follows_its_schema_alone_and_in_a_crowd() {
    let server = TestServer::start().await;
    let body = |seed: usize| {
        json!({"prompt": "A Vec is ", "n": 3, "seed": seed, "temperature": 1.5, "max_tokens": 300,
            "structured_outputs": {"json": schema()}})
    };
    let alone = server.complete(body(7)).await;
    for choice in alone["choices"].as_array().unwrap() {
        assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &Value::Null));
        check(choice["text"].as_str().unwrap());
    }
    let mut crowd: Vec<_> = (0..8).map(|seed| body(seed + 4)).collect();
    // Others are free: masks are each sequence's own.
    crowd.push(json!({"prompt": "Returns the", "max_tokens": 40, "temperature": 0, "ignore_eos": true}));
    let answers = futures::future::join_all(crowd.into_iter().map(|body| server.complete(body))).await;
    assert_eq!(answers[3]["choices"], alone["choices"], "a seed's answer does not depend on the crowd");
    for answer in &answers[..8] {
        answer["choices"]
            .as_array()
            .unwrap()
            .iter()
            .for_each(|choice| check(choice["text"].as_str().unwrap()));
    }
    let free = json!({"prompt": "Returns the", "max_tokens": 40, "temperature": 0, "ignore_eos": true});
    assert_eq!(answers[8]["choices"], server.complete(free).await["choices"]);
}

#[tokio::test]
async fn every_way_to_ask_is_followed() {
    let server = TestServer::chatty().await;
    let with = |field: &str, value: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 300, "seed": 1,
            "temperature": 1});
        body[field] = value;
        body
    };
    let content = async |body: Value| {
        let answer = server.ok(CHAT, &body).await;
        assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{answer}");
        answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
    };
    let format =
        json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema(), "strict": true}});
    check(&content(with("response_format", format)).await);
    check(&content(with("guided_json", Value::from(schema().to_string()))).await);
    let choice = content(with("structured_outputs", json!({"choice": ["left", "right"]}))).await;
    assert!(["left", "right"].contains(&choice.as_str()), "{choice}");
    let date = content(with("structured_outputs", json!({"regex": "[0-9]{4}-[01][0-9]"}))).await;
    assert!(date.len() == 7 && date.as_bytes()[4] == b'-', "{date}");
    let grammar = "start: \"go \" DIRECTION\nDIRECTION: /north|south/";
    let text = content(with("structured_outputs", json!({"grammar": grammar}))).await;
    assert!(["go north", "go south"].contains(&text.as_str()), "{text}");
    let mut body = with("response_format", json!({"type": "json_object"}));
    body["logit_bias"] = json!({"95": 40});
    let text = content(body).await;
    assert!(serde_json::from_str::<Value>(&text).unwrap().is_object(), "{text}");
}

#[tokio::test]
async fn a_stream_and_its_logprobs_say_the_same() {
    let server = TestServer::start().await;
    let body = json!({"prompt": "x", "seed": 3, "max_tokens": 300, "logprobs": 2,
        "structured_outputs": {"json": schema()}});
    let whole = server.choice(body.clone()).await;
    let events = server.stream("/v1/completions", body).await;
    let text: String = events.iter().map(|event| event["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(text, whole["text"].as_str().unwrap());
    check(&text);
    let tokens = whole["logprobs"]["tokens"].as_array().unwrap();
    assert_eq!(tokens.iter().map(|token| token.as_str().unwrap()).collect::<String>(), text);
    // Log-probabilities are the model's own, not what the grammar leaves.
    let lowest = whole["logprobs"]["token_logprobs"].as_array().unwrap().iter().map(|l| l.as_f64().unwrap());
    assert!(lowest.fold(0.0, f64::min) < -1.0);
}

#[tokio::test]
async fn how_a_grammar_gets_along_with_other_fields() {
    let server = TestServer::start().await;
    let choice = |fields: Value| {
        let mut body = json!({"prompt": "x", "max_tokens": 20, "temperature": 0,
            "structured_outputs": {"regex": "[0-9]+"}});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        server.choice(body)
    };
    let digits = |choice: &Value| choice["text"].as_str().unwrap().len();
    let long = choice(json!({"ignore_eos": true})).await;
    assert_eq!((&long["finish_reason"], digits(&long) >= 20), (&json!("length"), true), "{long}");
    let long = choice(json!({"min_tokens": 20})).await;
    assert!(digits(&long) >= 20, "{long}");
    // A complete grammar ends the text, whatever else was asked for.
    let fields = json!({"structured_outputs": {"choice": ["yes"]}, "ignore_eos": true, "min_tokens": 10});
    let short = choice(fields).await;
    assert_eq!((&short["text"], &short["finish_reason"]), (&json!("yes"), &json!("stop")));
    // What no field leaves any choice for, the grammar decides.
    let fields = json!({"structured_outputs": {"choice": ["yes"]}, "allowed_token_ids": [5]});
    assert_eq!(choice(fields).await["text"], "yes");
    let stopped = choice(json!({"structured_outputs": {"choice": ["one two"]}, "stop": " "})).await;
    assert_eq!((&stopped["text"], &stopped["stop_reason"]), (&json!("one"), &json!(" ")));
}

#[tokio::test]
async fn grammars_that_cannot_be_used_are_named() {
    let server = TestServer::chatty().await;
    let format = |schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}});
    let cases = [
        (format(json!({"type": "what"})), "response_format"),
        (format(json!({"type": "integer", "minimum": 2, "maximum": 1})), "response_format"),
        (json!({"structured_outputs": {"grammar": "root ::= \"a\""}}), "structured_outputs.grammar"),
        (json!({"structured_outputs": {"regex": "("}}), "structured_outputs.regex"),
    ];
    for (mut body, param) in cases {
        body["messages"] = json!([{"role": "user", "content": "x"}]);
        let (status, error) = server.post(CHAT, &body).await;
        assert_eq!((status.as_u16(), &error["error"]["param"]), (400, &json!(param)), "{error}");
    }
}

//! Server-sent events.

use serde_json::{Value, json};

use crate::support::TestServer;

const PATH: &str = "/v1/completions";

fn joined(events: &[Value], index: usize) -> String {
    let choices = events.iter().flat_map(|event| event["choices"].as_array().unwrap());
    choices.filter(|c| c["index"] == index).map(|c| c["text"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn the_parts_are_the_whole() {
    let server = TestServer::start().await;
    let body = json!({"prompt": ["Returns the", "Grüße, 日本"], "n": 2, "seed": 3, "max_tokens": 20, "echo": true,
        "logprobs": 1, "stop": ["the"]});
    let whole = server.complete(body.clone()).await;
    let events = server.stream(PATH, body).await;
    for (index, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
        assert_eq!(joined(&events, index), choice["text"].as_str().unwrap());
        let parts: Vec<&Value> =
            events.iter().map(|event| &event["choices"][0]).filter(|part| part["index"] == index).collect();
        let ends = parts.iter().filter(|part| !part["finish_reason"].is_null()).count();
        assert_eq!(ends, 1);
        let last = parts.last().unwrap();
        assert_eq!(
            (&last["finish_reason"], &last["stop_reason"]),
            (&choice["finish_reason"], &choice["stop_reason"])
        );
        for list in ["tokens", "token_logprobs", "text_offset", "top_logprobs"] {
            let entries: Vec<Value> = parts
                .iter()
                .filter_map(|part| part["logprobs"][list].as_array())
                .flatten()
                .cloned()
                .collect();
            assert_eq!(Value::from(entries), choice["logprobs"][list], "{list}");
        }
    }
    assert!(
        events.iter().all(|event| event["id"] == events[0]["id"] && event["object"] == "text_completion")
    );
    assert!(events.iter().all(|event| event.get("usage").is_none()));
}

#[tokio::test]
async fn usage_comes_last_when_asked_for() {
    let server = TestServer::start().await;
    let body = json!({"prompt": "a", "max_tokens": 5, "ignore_eos": true, "stream_options": {"include_usage": true}});
    let events = server.stream(PATH, body).await;
    let (last, parts) = events.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(
        (&last["usage"]["completion_tokens"], &last["usage"]["prompt_tokens"]),
        (&json!(5), &json!(1))
    );
    assert_eq!(parts.len(), 5, "an event per token");
    assert!(parts.iter().all(|part| part.get("usage").is_none()));
}

#[tokio::test]
async fn usage_comes_all_along_when_asked_for() {
    let server = TestServer::start().await;
    let body = json!({"prompt": "a", "max_tokens": 4, "ignore_eos": true,
        "stream_options": {"include_usage": true, "continuous_usage_stats": true}});
    let events = server.stream(PATH, body).await;
    let tokens: Vec<u64> = events.iter().map(|e| e["usage"]["completion_tokens"].as_u64().unwrap()).collect();
    assert_eq!(tokens, [1, 2, 3, 4, 4]);
}

#[tokio::test]
async fn nothing_after_the_beginning_of_a_stop_string_is_shown_too_early() {
    let server = TestServer::start().await;
    let body = json!({"prompt": "Returns the number of", "temperature": 0, "max_tokens": 12});
    let text = server.choice(body.clone()).await["text"].as_str().unwrap().to_owned();
    let stop: String = text.chars().skip(9).take(8).collect();
    let mut stopping = body;
    stopping["stop"] = json!(stop);
    let events = server.stream(PATH, stopping).await;
    let before = &text[..text.find(&stop).unwrap()];
    let mut shown = String::new();
    for event in &events {
        shown.push_str(event["choices"][0]["text"].as_str().unwrap());
        assert!(before.starts_with(&shown), "{shown:?} is not the beginning of {before:?}");
    }
    assert_eq!(shown, before);
}

#[tokio::test]
async fn stop_strings_of_characters_that_tokens_share() {
    let server = TestServer::start().await;
    // The model knows these characters by their bytes only: each takes several tokens, which no token's end respects.
    let text = "日本語と🦀です";
    let tokens = server.ok("/tokenize", &json!({"prompt": text, "add_special_tokens": false})).await;
    assert!(tokens["count"].as_u64().unwrap() > text.chars().count() as u64);
    for (stop, before) in [("🦀", "日本語と"), ("語と🦀", "日本"), ("本", "日"), ("す", "日本語と🦀で")]
    {
        for include in [false, true] {
            let body = json!({"prompt": "x", "structured_outputs": {"choice": [text]}, "max_tokens": 100, "temperature": 0, "stop": stop,
                "include_stop_str_in_output": include, "stream_options": {"include_usage": true}});
            let events = server.stream("/v1/completions", body.clone()).await;
            let expected = format!("{before}{}", if include { stop } else { "" });
            assert_eq!(joined(&events, 0), expected, "{stop}");
            assert!(!events.iter().any(|event| event.to_string().contains('\u{FFFD}')));
            let mut body = body;
            body.as_object_mut().unwrap().remove("stream_options");
            let whole = server.complete(body).await;
            assert_eq!(
                (&whole["choices"][0]["text"], &whole["choices"][0]["stop_reason"]),
                (&json!(expected), &json!(stop))
            );
            assert_eq!(whole["usage"], events.last().unwrap()["usage"]);
        }
    }
}

#[tokio::test]
async fn a_bad_request_for_a_stream_is_an_error_and_no_stream() {
    let server = TestServer::start().await;
    let (status, error) = server.post(PATH, &json!({"prompt": "a", "stream": true, "n": 0})).await;
    assert_eq!((status.as_u16(), &error["error"]["param"]), (400, &json!("n")));
}

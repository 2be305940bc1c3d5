//! `/v1/responses`.

use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::TestServer;

const PATH: &str = "/v1/responses";

fn body(fields: Value) -> Value {
    let mut body =
        json!({"input": "What is a Vec?", "temperature": 0, "max_output_tokens": 12, "ignore_eos": true});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

fn text(response: &Value) -> &str {
    response["output"][0]["content"][0]["text"].as_str().unwrap()
}

#[tokio::test]
async fn a_response_is_the_chats_answer_and_is_kept() {
    let server = TestServer::chatty().await;
    let response = server.ok(PATH, &body(json!({"instructions": "Be brief.", "metadata": {"a": "b"}}))).await;
    let chat = json!({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a Vec?"}],
        "temperature": 0, "max_completion_tokens": 12, "ignore_eos": true});
    let chat = server.ok("/v1/chat/completions", &chat).await;
    assert_eq!(text(&response), chat["choices"][0]["message"]["content"]);
    assert_eq!(
        (&response["status"], &response["incomplete_details"]["reason"]),
        (&json!("incomplete"), &json!("max_output_tokens"))
    );
    assert_eq!(response["usage"]["input_tokens"], chat["usage"]["prompt_tokens"]);
    assert_eq!(
        (&response["usage"]["output_tokens"], &response["metadata"]),
        (&json!(12), &json!({"a": "b"}))
    );
    let id = response["id"].as_str().unwrap();
    let path = format!("{PATH}/{id}");
    assert_eq!(server.get(&path).await, (StatusCode::OK, response.clone()));
    // Who goes on from it has said and heard it all.
    let next = server.ok(PATH, &body(json!({"input": "Why?", "previous_response_id": id}))).await;
    let conversation = json!([{"role": "user", "content": "What is a Vec?"},
        {"role": "assistant", "content": text(&response)}, {"role": "user", "content": "Why?"}]);
    let whole = server.ok(PATH, &body(json!({"input": conversation, "store": false}))).await;
    assert_eq!(text(&next), text(&whole));
    assert_eq!(
        server.get(&format!("{PATH}/{}", whole["id"].as_str().unwrap())).await.0,
        StatusCode::NOT_FOUND
    );
    let gone = server.send(Method::DELETE, &path, "").await;
    assert_eq!(gone.json::<Value>().await.unwrap()["deleted"], true);
    assert_eq!(server.get(&path).await.0, StatusCode::NOT_FOUND);
    let (status, error) = server.post(PATH, &body(json!({"previous_response_id": id}))).await;
    assert_eq!((status, &error["error"]["type"]), (StatusCode::NOT_FOUND, &json!("NotFoundError")));
}

#[tokio::test]
async fn a_stream_tells_the_same_in_order() {
    let server = TestServer::chatty().await;
    let fields = json!({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"enum": ["left", "right"]}}},
        "include": ["message.output_text.logprobs"]});
    let whole = server.ok(PATH, &body(fields.clone())).await;
    assert_eq!(whole["status"], "completed");
    assert!(["\"left\"", "\"right\""].contains(&text(&whole)), "{whole}");
    assert!(!whole["output"][0]["content"][0]["logprobs"].as_array().unwrap().is_empty());
    let mut streamed = body(fields);
    streamed["stream"] = json!(true);
    let raw = server.send(Method::POST, PATH, streamed.to_string()).await.text().await.unwrap();
    let events: Vec<(&str, Value)> = raw
        .split("\n\n")
        .filter_map(|event| event.strip_prefix("event: ")?.split_once("\ndata: "))
        .map(|(name, data)| (name, serde_json::from_str(data).unwrap()))
        .collect();
    for (number, (name, data)) in events.iter().enumerate() {
        assert_eq!((&data["type"], &data["sequence_number"]), (&json!(name), &json!(number)));
    }
    let names: Vec<&str> = events.iter().map(|(name, _)| name.strip_prefix("response.").unwrap()).collect();
    assert_eq!(names[..4], ["created", "in_progress", "output_item.added", "content_part.added"]);
    let end = ["output_text.done", "content_part.done", "output_item.done", "completed"];
    assert_eq!(names[names.len() - 4..], end);
    let said: String = events.iter().filter_map(|(_, data)| data["delta"].as_str()).collect();
    let last = &events.last().unwrap().1["response"];
    assert_eq!((said.as_str(), text(last)), (text(&whole), text(&whole)));
    assert_eq!(last["usage"]["total_tokens"], whole["usage"]["total_tokens"]);
    assert_eq!(server.get(&format!("{PATH}/{}", last["id"].as_str().unwrap())).await.1, *last);
}

#[tokio::test]
async fn in_the_background_until_it_is_done_or_cancelled() {
    let server = TestServer::chatty().await;
    let begun = server.ok(PATH, &body(json!({"background": true}))).await;
    assert_eq!(begun["status"], "in_progress");
    let path = format!("{PATH}/{}", begun["id"].as_str().unwrap());
    let deadline = Instant::now() + Duration::from_secs(20);
    let done = loop {
        let (_, response) = server.get(&path).await;
        if response["status"] != "in_progress" {
            break response;
        }
        assert!(Instant::now() < deadline, "{response}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let direct = server.ok(PATH, &body(json!({}))).await;
    assert_eq!((&done["status"], text(&done)), (&json!("incomplete"), text(&direct)));

    let long = server.ok(PATH, &body(json!({"background": true, "max_output_tokens": 900}))).await;
    let path = format!("{PATH}/{}/cancel", long["id"].as_str().unwrap());
    let (status, cancelled) = server.post(&path, &json!({})).await;
    assert_eq!((status, &cancelled["status"]), (StatusCode::OK, &json!("cancelled")));
    // The engine hears of it too.
    server.until("vllm:num_requests_running", &[], 0.0).await;
    let (status, error) =
        server.post(&format!("{PATH}/{}/cancel", direct["id"].as_str().unwrap()), &json!({})).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{error}");
}

#[tokio::test]
async fn mistakes_are_named_in_this_apis_words() {
    let server = TestServer::chatty().await;
    let cases = [
        (json!({"input": null}), "input"),
        (json!({"input": []}), "input"),
        (json!({"input": [{"role": "user", "content": 1}]}), "input[0].content"),
        (json!({"max_output_tokens": 0}), "max_output_tokens"),
        (json!({"text": {"format": {"type": "xml"}}}), "text.format"),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
        (json!({"temperature": -1}), "temperature"),
    ];
    for (fields, param) in cases {
        let (status, error) = server.post(PATH, &body(fields)).await;
        assert_eq!((status, &error["error"]["param"]), (StatusCode::BAD_REQUEST, &json!(param)), "{error}");
    }
}

//! `/v1/chat/completions`.

use serde_json::{Value, json};

use crate::support::TestServer;

const PATH: &str = "/v1/chat/completions";

fn chat(fields: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "What is a Vec?"}], "temperature": 0,
        "max_completion_tokens": 10, "ignore_eos": true});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn the_template_makes_the_prompt() {
    let server = TestServer::chatty().await;
    let answer = server.ok(PATH, &chat(json!({"return_token_ids": true}))).await;
    assert_eq!(answer["object"], "chat.completion");
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    let prompt = server.ok("/detokenize", &json!({"tokens": answer["prompt_token_ids"]})).await;
    assert_eq!(prompt["prompt"], "<|im_start|>user\nWhat is a Vec?<|im_end|>\n<|im_start|>assistant\n");
    let tokens = server.ok("/tokenize", &chat(json!({}))).await;
    assert_eq!(tokens["tokens"], answer["prompt_token_ids"]);
    let rendered = server.ok("/v1/chat/completions/render", &chat(json!({}))).await;
    assert_eq!(rendered["token_ids"], answer["prompt_token_ids"]);
    let message = &answer["choices"][0]["message"];
    assert_eq!(message["role"], "assistant");
    let completed = server
        .choice(json!({"prompt": answer["prompt_token_ids"], "temperature": 0, "max_tokens": 10, "ignore_eos": true}))
        .await;
    assert_eq!(message["content"], completed["text"]);
    assert_eq!(answer["usage"]["completion_tokens"], 10);
}

#[tokio::test]
async fn parts_of_text_are_a_text() {
    let server = TestServer::chatty().await;
    let parts = json!([{"type": "text", "text": "What is a Vec?"}]);
    let messages = json!([{"role": "user", "content": parts}]);
    let answer = server.ok(PATH, &chat(json!({"messages": messages}))).await;
    assert_eq!(answer["choices"], server.ok(PATH, &chat(json!({}))).await["choices"]);
}

#[tokio::test]
async fn a_final_message_can_be_continued() {
    let server = TestServer::chatty().await;
    let messages = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "A vector"}]);
    let fields =
        json!({"messages": messages, "continue_final_message": true, "add_generation_prompt": false});
    let tokens = server.ok("/tokenize", &fields).await;
    let prompt = server.ok("/detokenize", &json!({"tokens": tokens["tokens"]})).await;
    assert!(prompt["prompt"].as_str().unwrap().ends_with("<|im_start|>assistant\nA vector"), "{prompt}");
}

#[tokio::test]
async fn deltas_are_the_answer() {
    let server = TestServer::chatty().await;
    let body = chat(json!({"n": 2, "logprobs": true, "top_logprobs": 2, "temperature": 1, "seed": 5}));
    let whole = server.ok(PATH, &body).await;
    let mut streamed = body;
    streamed["stream_options"] = json!({"include_usage": true});
    let events = server.stream(PATH, streamed).await;
    let (last, parts) = events.split_last().unwrap();
    // The second time, the prompt's first block is in the cache.
    let mut usage = whole["usage"].clone();
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 0);
    usage["prompt_tokens_details"]["cached_tokens"] = json!(16);
    assert_eq!(last["usage"], usage);
    for (index, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
        let parts: Vec<&Value> =
            parts.iter().map(|e| &e["choices"][0]).filter(|c| c["index"] == index).collect();
        let content: String = parts.iter().map(|part| part["delta"]["content"].as_str().unwrap()).collect();
        assert_eq!(content, choice["message"]["content"].as_str().unwrap());
        let roles: Vec<_> = parts.iter().filter_map(|part| part["delta"].get("role")).collect();
        assert_eq!(roles, ["assistant"]);
        assert_eq!(parts[0]["delta"]["role"], "assistant");
        let entries: Vec<Value> =
            parts.iter().flat_map(|part| part["logprobs"]["content"].as_array().unwrap().clone()).collect();
        assert_eq!(Value::from(entries.clone()), choice["logprobs"]["content"]);
        assert_eq!(entries.len(), 10);
        assert!(entries.iter().all(|entry| entry["top_logprobs"].as_array().unwrap().len() == 2));
        let bytes: Vec<u8> = entries
            .iter()
            .flat_map(|entry| serde_json::from_value::<Vec<u8>>(entry["bytes"].clone()).unwrap())
            .collect();
        assert_eq!(String::from_utf8_lossy(&bytes), content);
    }
    assert!(events.iter().all(|event| event["object"] == "chat.completion.chunk"));
}

#[tokio::test]
async fn without_max_tokens_the_context_is_the_limit() {
    let server = TestServer::with(|settings, folder| {
        let file = folder.join("t.jinja");
        std::fs::write(&file, "{{ messages[0].content }}").unwrap();
        settings.chat_template = Some(file);
        settings.max_model_len = Some(48);
    })
    .await;
    let body = json!({"messages": [{"role": "user", "content": "a"}], "ignore_eos": true});
    let usage = &server.ok(PATH, &body).await["usage"];
    assert_eq!(usage["total_tokens"], 48);
}

#[tokio::test]
async fn the_templates_refusal_is_told() {
    let server = TestServer::with(|settings, folder| {
        let file = folder.join("t.jinja");
        std::fs::write(&file, "{{ raise_exception('only saints') }}").unwrap();
        settings.chat_template = Some(file);
    })
    .await;
    let (status, error) = server.post(PATH, &chat(json!({}))).await;
    assert_eq!((status.as_u16(), &error["error"]["param"]), (400, &json!("messages")));
    assert!(error["error"]["message"].as_str().unwrap().ends_with("only saints"), "{error}");
}

#[tokio::test]
async fn a_model_without_a_template_refuses_chats() {
    let server = TestServer::start().await;
    let (status, error) = server.post(PATH, &chat(json!({}))).await;
    assert_eq!(status.as_u16(), 400);
    assert!(error["error"]["message"].as_str().unwrap().contains("no chat template"), "{error}");
}

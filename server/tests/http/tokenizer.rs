//! `/tokenize`, `/detokenize`, `/tokenizer_info`.

use serde_json::{Value, json};

use crate::support::{TEMPLATE, TestServer};

#[tokio::test]
async fn there_and_back() {
    let server = TestServer::start().await;
    let text = "fn main() { /* Grüße, 日本 */ }<|endoftext|>";
    let answer = server.ok("/tokenize", &json!({"prompt": text, "return_token_strs": true})).await;
    assert_eq!(answer["count"], answer["tokens"].as_array().unwrap().len());
    assert_eq!(answer["max_model_len"], 1024);
    let strs = answer["token_strs"].as_array().unwrap();
    assert_eq!((strs[0].as_str(), strs.last().unwrap().as_str()), (Some("fn"), Some("<|endoftext|>")));
    let back = server.ok("/detokenize", &json!({"tokens": answer["tokens"]})).await;
    assert_eq!(back, json!({"prompt": text}));
    let (_, plain) = server.post("/tokenize", &json!({"prompt": text})).await;
    assert_eq!(plain.get("token_strs"), None);
}

#[tokio::test]
async fn what_lm_eval_asks_for_before_it_trusts_a_tokenizer() {
    let server = TestServer::chatty().await;
    let (status, info) = server.get("/tokenizer_info").await;
    assert_eq!(status.as_u16(), 200);
    assert_eq!(info["eos_token"], "<|endoftext|>");
    assert_eq!(info["tokenizer_class"], "PreTrainedTokenizerFast");
    assert_eq!(info["chat_template"], TEMPLATE);
    let answer = server.ok("/tokenize", &json!({"prompt": "test", "add_special_tokens": false})).await;
    assert!(answer["tokens"].as_array().is_some_and(|tokens| !tokens.is_empty()));
}

#[tokio::test]
async fn what_is_wrong_is_named() {
    let server = TestServer::start().await;
    let cases: [(&str, Value, &str); 4] = [
        ("/tokenize", json!({}), "prompt"),
        ("/tokenize", json!({"prompt": "a", "messages": []}), "prompt"),
        ("/detokenize", json!({"tokens": [4096]}), "tokens"),
        ("/detokenize", json!({"tokens": ["a"]}), "tokens[0]"),
    ];
    for (path, body, param) in cases {
        let (status, error) = server.post(path, &body).await;
        assert_eq!((status.as_u16(), error["error"]["param"].as_str()), (400, Some(param)), "{error}");
    }
}

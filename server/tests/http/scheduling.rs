//! Whose turn it is, and what is found in the cache of those before.

use config::SchedulingPolicy;
use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::support::TestServer;

const PATH: &str = "/v1/completions";

/// 100 token ids.
fn prompt() -> Vec<u32> {
    (0..100).map(|index| 100 + 37 * index % 3000).collect()
}

fn cached(answer: &Value) -> u64 {
    answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
}

#[tokio::test]
async fn usage_and_metrics_say_what_was_cached() {
    let server = TestServer::start().await;
    let body = json!({"prompt": prompt(), "max_tokens": 8, "seed": 1, "ignore_eos": true});
    let first = server.ok(PATH, &body).await;
    assert_eq!(cached(&first), 0);
    let second = server.ok(PATH, &body).await;
    assert_eq!(cached(&second), 96);
    assert_eq!(second["choices"], first["choices"]);

    let mut several = body.clone();
    several["n"] = json!(3);
    let several = server.ok(PATH, &several).await;
    assert_eq!(cached(&several), 96, "the sequences of a prompt share it");
    assert_eq!(several["choices"][0]["text"], first["choices"][0]["text"]);

    let mut salted = body.clone();
    salted["cache_salt"] = json!("tenant");
    assert_eq!([cached(&server.ok(PATH, &salted).await), cached(&server.ok(PATH, &salted).await)], [0, 96]);

    let mut streamed = body.clone();
    streamed["stream_options"] = json!({"include_usage": true});
    // A text that ends at a stop string says so too.
    let text = first["choices"][0]["text"].as_str().unwrap();
    streamed["stop"] = json!(text.chars().nth(2).unwrap().to_string());
    let events = server.stream(PATH, streamed).await;
    assert_eq!(cached(events.last().unwrap()), 96);

    let mut scored = body;
    scored["prompt_logprobs"] = json!(0);
    assert_eq!(cached(&server.ok(PATH, &scored).await), 0, "a prompt that is scored is computed");

    // Every sequence but the scored one looked; all but the first of each salt found.
    let value = async |name: &str| server.metric(name, &[]).await.unwrap();
    assert_eq!(value("vllm:prefix_cache_queries_total").await, 800.0);
    assert_eq!(value("vllm:prefix_cache_hits_total").await, 6.0 * 96.0);
    assert_eq!(value("vllm:prompt_tokens_total").await, 900.0);
}

#[tokio::test]
async fn the_cache_can_be_off() {
    let server = TestServer::with(|settings, _| settings.enable_prefix_caching = Some(false)).await;
    let body = json!({"prompt": prompt(), "max_tokens": 2});
    assert_eq!([cached(&server.ok(PATH, &body).await), cached(&server.ok(PATH, &body).await)], [0, 0]);
}

#[tokio::test]
async fn priorities_are_for_servers_that_have_them() {
    let body = json!({"prompt": "a", "max_tokens": 1, "priority": -3});
    let (status, answer) = TestServer::start().await.post(PATH, &body).await;
    assert_eq!((status, &answer["error"]["param"]), (StatusCode::BAD_REQUEST, &json!("priority")));

    let by_priority =
        TestServer::with(|settings, _| settings.scheduling_policy = Some(SchedulingPolicy::Priority)).await;
    by_priority.ok(PATH, &body).await;
}

#[tokio::test]
async fn speculation_shows_in_metrics_and_not_in_answers() {
    let phrase = &prompt()[..8];
    let body = json!({"prompt": phrase.repeat(8), "max_tokens": 40, "temperature": 0, "ignore_eos": true});
    let expected = TestServer::start().await.choice(body.clone()).await;
    let config = r#"{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}"#;
    let server =
        TestServer::with(|settings, _| settings.speculative_config = Some(config.parse().unwrap())).await;
    assert_eq!(server.choice(body).await, expected);
    let value = async |name: &str| server.metric(name, &[]).await.unwrap();
    let accepted = value("vllm:spec_decode_num_accepted_tokens_total").await;
    assert!(accepted > 0.0 && accepted <= value("vllm:spec_decode_num_draft_tokens_total").await);
    assert!(value("vllm:spec_decode_num_drafts_total").await > 0.0);
    assert_eq!(value("vllm:generation_tokens_total").await, 40.0);
}

//! Many clients at once, some of whom go away.

use std::time::Duration;

use converter::plan::Recipe;
use futures::StreamExt;
use futures::future::join_all;
use serde_json::{Value, json};

use crate::common::{Server, block_on, converted, heldout_windows};

fn request(prompt: &[u32], seed: usize, max_tokens: usize) -> Value {
    json!({"model": "model", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0.9, "top_p": 0.95,
           "seed": seed, "ignore_eos": true, "return_token_ids": true})
}

#[test]
fn disconnects_hurt_nobody_and_the_crowd_does_not_change_a_text() {
    let (_folder, model) = converted(Recipe::new("w4a6".parse().expect("a scheme")));
    // Room for a few sequences: the others wait, and those that grow push each other out.
    let server = Server::start(&model, |config| config.kv_cache_memory_bytes = Some(1 << 20));
    let windows = heldout_windows(8);
    let prompt = |i: usize| &windows[i % 8][..20 + 13 * (i % 7)];
    block_on(async {
        let mut alone = Vec::new();
        for i in 0..32 {
            alone.push(server.post("/v1/completions", &request(prompt(i), i, 60 + i)).await);
        }
        let crowd = join_all((0..32).map(|i| {
            let (server, prompt) = (&server, prompt(i));
            async move {
                let mut body = request(prompt, i, 60 + i);
                if i % 3 == 1 {
                    // Reads a little of the stream, then goes away.
                    body["stream"] = json!(true);
                    body["max_tokens"] = json!(400);
                    let url = server.url("/v1/completions");
                    let response =
                        reqwest::Client::new().post(url).json(&body).send().await.expect("a response");
                    let read = response.bytes_stream().take(1 + i % 5).collect::<Vec<_>>().await;
                    assert!(read.iter().all(Result::is_ok));
                    return None;
                }
                Some(server.post("/v1/completions", &body).await)
            }
        }))
        .await;
        for (i, (alone, crowded)) in alone.iter().zip(crowd).enumerate() {
            let Some(crowded) = crowded else { continue };
            let (a, b) = (&alone["choices"][0], &crowded["choices"][0]);
            assert_eq!(a["text"], b["text"], "request {i}");
            assert_eq!(a["token_ids"], b["token_ids"], "request {i}");
            assert_eq!(b["token_ids"].as_array().map(Vec::len), Some(60 + i));
        }
        assert!(server.metric("vllm:num_preemptions_total", "").await > 0.0, "the cache was too roomy");
        // Nothing is left of those who went away.
        for _ in 0..200 {
            if server.metric("vllm:num_requests_running", "").await == 0.0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(server.metric("vllm:num_requests_running", "").await, 0.0);
        assert_eq!(server.metric("vllm:num_requests_waiting", "").await, 0.0);
        assert_eq!(server.metric("vllm:kv_cache_usage_perc", "").await, 0.0);
    });
}

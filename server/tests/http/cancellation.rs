//! Clients that go away.

use std::time::Duration;

use futures::StreamExt;
use reqwest::Method;
use serde_json::json;

use crate::support::TestServer;

const ENDED: &str = "vllm:request_success_total";

async fn nothing_is_left(server: &TestServer) {
    server.until("vllm:num_requests_running", &[], 0.0).await;
    server.until("vllm:num_requests_waiting", &[], 0.0).await;
    server.until("vllm:kv_cache_usage_perc", &[], 0.0).await;
}

#[tokio::test]
async fn a_stream_that_is_dropped_is_cancelled() {
    let server = TestServer::start().await;
    let stream = server.endless().await;
    drop(stream);
    nothing_is_left(&server).await;
    assert_eq!(server.metric(ENDED, &["\"abort\""]).await, Some(1.0));
    let generated = server.metric("vllm:generation_tokens_total", &[]).await.unwrap();
    assert!(generated < 1000.0, "it did not run to its end: {generated}");
}

#[tokio::test]
async fn an_answer_that_nobody_waits_for_is_cancelled() {
    let server = TestServer::start().await;
    let body = json!({"prompt": "a", "n": 3, "max_tokens": 1000, "ignore_eos": true});
    let request = server.send(Method::POST, "/v1/completions", body.to_string());
    let impatient = async {
        server.until("vllm:num_requests_running", &[], 3.0).await;
    };
    tokio::select! {
        _ = request => panic!("it was not to finish"),
        () = impatient => {}
    }
    nothing_is_left(&server).await;
    assert_eq!(server.metric(ENDED, &["\"abort\""]).await, Some(3.0));
}

#[tokio::test]
async fn every_endpoint_notices_that_its_client_left() {
    let server = TestServer::chatty().await;
    let messages = json!([{"role": "user", "content": "a"}]);
    let chat = json!({"messages": messages, "ignore_eos": true, "n": 2});
    let streamed = json!({"messages": messages, "ignore_eos": true, "n": 2, "stream": true});
    let response = json!({"input": "a", "ignore_eos": true});
    let streamed_response = json!({"input": "a", "ignore_eos": true, "stream": true});
    // So many tokens that they are computed in several steps.
    let embeddings = json!({"input": vec![vec![5; 1000]; 32]});
    let cases = [
        ("/v1/chat/completions", chat, 2.0),
        ("/v1/chat/completions", streamed, 2.0),
        ("/v1/responses", response, 1.0),
        ("/v1/responses", streamed_response, 1.0),
        ("/v1/embeddings", embeddings, 32.0),
    ];
    let ended = async |reason: &str| server.metric(ENDED, &[&format!("\"{reason}\"")]).await.unwrap();
    for (path, body, sequences) in cases {
        let before = [ended("abort").await, ended("length").await];
        let whole = async {
            let response = server.send(Method::POST, path, body.to_string()).await;
            response.bytes().await
        };
        let impatient = async {
            while server.metric("vllm:num_requests_running", &[]).await == Some(0.0) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::select! {
            _ = whole => panic!("{path} was not to finish"),
            () = impatient => {}
        }
        nothing_is_left(&server).await;
        // The first of many inputs may have been ready; every sequence is counted once.
        let (aborted, finished) = (ended("abort").await - before[0], ended("length").await - before[1]);
        assert!(aborted > 0.0 && aborted + finished == sequences, "{path}: {aborted} + {finished}");
    }
    let generated = server.metric("vllm:generation_tokens_total", &[]).await.unwrap();
    assert!(generated < 4000.0, "they did not run to their ends: {generated}");
}

#[tokio::test]
async fn a_stop_string_ends_the_engines_work_too() {
    let server = TestServer::start().await;
    let body = json!({"prompt": "a", "max_tokens": 1000, "ignore_eos": true, "stop": ["e", "a", "\n", " "]});
    server.complete(body).await;
    nothing_is_left(&server).await;
    assert_eq!(server.metric(ENDED, &["\"stop\""]).await, Some(1.0));
    assert_eq!(server.metric(ENDED, &["\"abort\""]).await, Some(0.0));
}

#[tokio::test]
async fn thirty_two_streams_with_random_disconnects() {
    let server = TestServer::start().await;
    let body =
        |seed: usize| json!({"prompt": "Returns the", "seed": seed, "max_tokens": 48, "ignore_eos": true});
    let alone = server.choice(body(4)).await["text"].clone();
    let clients = (0..32).map(|seed| {
        let server = &server;
        async move {
            if seed % 3 != 1 {
                let events = server.stream("/v1/completions", body(seed)).await;
                let text = |e: &serde_json::Value| e["choices"][0]["text"].as_str().unwrap().to_owned();
                return Some(events.iter().map(text).collect::<String>());
            }
            let mut body = body(seed);
            body["stream"] = json!(true);
            let response = server.send(Method::POST, "/v1/completions", body.to_string()).await;
            let mut stream = Box::pin(response.bytes_stream());
            for _ in 0..seed % 7 {
                stream.next().await;
            }
            None
        }
    });
    let texts = futures::future::join_all(clients).await;
    assert_eq!(texts.iter().flatten().count(), 21);
    assert!(texts.iter().flatten().all(|text| !text.is_empty()));
    nothing_is_left(&server).await;
    // Seed 4 goes away; its neighbours do not mind, nor does it when it comes again.
    assert_eq!(server.choice(body(4)).await["text"], alone);
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(texts[3].as_deref(), server.choice(body(3)).await["text"].as_str());
}

//! The table of errors, over the wire.

use std::sync::Arc;

use config::ServerConfig;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use server::http::{ApiKeys, App, router};
use server::telemetry::Telemetry;

use crate::support::TestServer;

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// Method, path, body; status, type, param.
type Case = (Method, &'static str, &'static str, u16, &'static str, Option<&'static str>);

#[tokio::test]
async fn what_is_wrong_with_a_request_is_told_and_named() {
    let server = TestServer::start().await;
    let bad = "BadRequestError";
    let cases: [Case; 35] = [
        (Method::POST, COMPLETIONS, "{", 400, bad, None),
        (Method::POST, COMPLETIONS, "", 400, bad, None),
        (Method::POST, COMPLETIONS, "[]", 400, bad, None),
        (Method::POST, COMPLETIONS, "{}", 400, bad, Some("prompt")),
        (Method::POST, COMPLETIONS, r#"{"prompt": ""}"#, 400, bad, Some("prompt")),
        (Method::POST, COMPLETIONS, r#"{"prompt": []}"#, 400, bad, Some("prompt")),
        (Method::POST, COMPLETIONS, r#"{"prompt": [[]]}"#, 400, bad, Some("prompt")),
        (Method::POST, COMPLETIONS, r#"{"prompt": [4096]}"#, 400, bad, Some("prompt")),
        (Method::POST, COMPLETIONS, r#"{"prompt": "a", "max_tokens": 0}"#, 400, bad, Some("max_tokens")),
        (Method::POST, COMPLETIONS, r#"{"prompt": "a", "max_tokens": -1}"#, 400, bad, Some("max_tokens")),
        (Method::POST, COMPLETIONS, r#"{"prompt": "a", "max_tokens": "1"}"#, 400, bad, Some("max_tokens")),
        (Method::POST, COMPLETIONS, r#"{"prompt": "a", "temperature": -1}"#, 400, bad, Some("temperature")),
        (
            Method::POST,
            COMPLETIONS,
            r#"{"prompt": "a", "temperature": "hot"}"#,
            400,
            bad,
            Some("temperature"),
        ),
        (Method::POST, COMPLETIONS, r#"{"prompt": "a", "temperature": 1e999}"#, 400, bad, None),
        (Method::POST, COMPLETIONS, r#"{"prompt": "a", "top_p": 0}"#, 400, bad, Some("top_p")),
        (Method::POST, COMPLETIONS, r#"{"prompt": "a", "logprobs": 21}"#, 400, bad, Some("logprobs")),
        (Method::POST, COMPLETIONS, r#"{"prompt": "a", "n": 0}"#, 400, bad, Some("n")),
        (Method::POST, COMPLETIONS, r#"{"prompt": "a", "n": 99999999999}"#, 400, bad, Some("n")),
        (Method::POST, COMPLETIONS, r#"{"prompt": "a", "suffix": "b"}"#, 400, bad, Some("suffix")),
        (Method::POST, COMPLETIONS, r#"{"prompt": "a", "guided_json": 1}"#, 400, bad, Some("guided_json")),
        (
            Method::POST,
            COMPLETIONS,
            r#"{"prompt": "a", "structured_outputs": {"regex": "("}}"#,
            400,
            bad,
            Some("structured_outputs.regex"),
        ),
        (Method::POST, COMPLETIONS, r#"{"prompt": "a", "model": "b"}"#, 404, "NotFoundError", Some("model")),
        (Method::POST, CHAT, "{}", 400, bad, Some("messages")),
        (Method::POST, CHAT, r#"{"messages": []}"#, 400, bad, Some("messages")),
        (
            Method::POST,
            CHAT,
            r#"{"messages": [{"role": "user"}], "top_logprobs": 2}"#,
            400,
            bad,
            Some("top_logprobs"),
        ),
        (
            Method::POST,
            CHAT,
            r#"{"messages": [{"role": "user"}], "tools": [{}]}"#,
            400,
            bad,
            Some("tools[0]"),
        ),
        (Method::POST, COMPLETIONS, r#"{"prompt": "a", "stop": 5}"#, 400, bad, Some("stop")),
        (
            Method::POST,
            CHAT,
            r#"{"messages": [{"role": "user"}], "max_completion_tokens": 0}"#,
            400,
            bad,
            Some("max_completion_tokens"),
        ),
        (
            Method::POST,
            "/tokenize",
            r#"{"messages": [{"role": "user"}], "chat_template": "x"}"#,
            400,
            bad,
            Some("chat_template"),
        ),
        (Method::POST, COMPLETIONS, r#"{"prompt": "a", "max_tokens": 3.5}"#, 400, bad, Some("max_tokens")),
        (Method::GET, "/v1/models/none", "", 404, "NotFoundError", Some("model")),
        (Method::GET, "/v1/none", "", 404, "NotFoundError", None),
        (Method::GET, "/none", "", 404, "NotFoundError", None),
        (Method::GET, COMPLETIONS, "", 405, bad, None),
        (Method::DELETE, "/v1/models", "", 405, bad, None),
    ];
    for (method, path, body, status, kind, param) in cases {
        let what = format!("{method} {path} {body}");
        let response = server.send(method, path, body).await;
        assert_eq!(response.status().as_u16(), status, "{what}");
        assert!(response.headers().contains_key("x-request-id"), "{what}");
        let error = response.json::<Value>().await.unwrap()["error"].clone();
        assert_eq!(error["type"], kind, "{what}: {error}");
        assert_eq!(error["param"].as_str(), param, "{what}: {error}");
        assert_eq!(error["code"], status, "{what}: {error}");
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{what}");
    }
}

#[tokio::test]
async fn what_cannot_fit_is_refused_and_what_is_truncated_is_not() {
    let server = TestServer::start().await;
    let too_long = "a".repeat(1 << 20);
    let ids = vec![5; 100_000];
    for prompt in [json!(too_long), json!(["a", too_long]), json!(ids), json!([[5], ids])] {
        let (status, error) = server.post(COMPLETIONS, &json!({"prompt": prompt, "max_tokens": 1})).await;
        assert_eq!((status.as_u16(), &error["error"]["param"]), (400, &json!("prompt")));
        server.complete(json!({"prompt": prompt, "max_tokens": 1, "truncate_prompt_tokens": 4})).await;
    }
    let prompts = vec!["a"; 5000];
    let (status, error) = server.post(COMPLETIONS, &json!({"prompt": prompts, "max_tokens": 1})).await;
    assert_eq!((status.as_u16(), &error["error"]["param"]), (400, &json!("prompt")));
}

#[tokio::test]
async fn monstrous_requests_are_refused_and_do_no_harm() {
    let server = TestServer::chatty().await;
    let body = |fields: Value| fields.to_string().into_bytes();
    let message = json!({"role": "user", "content": "hello there"});
    let invalid_utf8 = b"{\"prompt\": \"\xff\xfe\"}".to_vec();
    let unclosed = [br#"{"prompt": "#.as_slice(), &[b'['; 100_000]].concat();
    let cases: [(&str, &str, Vec<u8>, Option<&str>); 11] = [
        ("invalid UTF-8", COMPLETIONS, invalid_utf8, None),
        ("half a surrogate", COMPLETIONS, br#"{"prompt": "\ud800"}"#.to_vec(), None),
        ("deep nesting", COMPLETIONS, unclosed, None),
        ("10,000 messages", CHAT, body(json!({"messages": vec![message; 10_000]})), Some("messages")),
        ("10,000 prompts", COMPLETIONS, body(json!({"prompt": vec!["a"; 10_000]})), Some("prompt")),
        ("ids out of range", COMPLETIONS, body(json!({"prompt": vec![1_000_000; 10]})), Some("prompt")),
        (
            "ids beyond 64 bits",
            COMPLETIONS,
            br#"{"prompt": [99999999999999999999]}"#.to_vec(),
            Some("prompt"),
        ),
        ("30 MB of text", COMPLETIONS, body(json!({"prompt": "a b".repeat(10_000_000)})), Some("prompt")),
        (
            "a million stops",
            COMPLETIONS,
            body(json!({"prompt": "a", "stop": vec!["x"; 1_000_000]})),
            Some("stop"),
        ),
        ("a million items", "/v1/responses", body(json!({"input": vec![1; 1_000_000]})), Some("input[0]")),
        ("ids to spell", "/detokenize", body(json!({"tokens": [5, 4096]})), Some("tokens")),
    ];
    for (what, path, bytes, param) in cases {
        let response = server.send(Method::POST, path, bytes).await;
        assert_eq!(response.status(), StatusCode::BAD_REQUEST, "{what}");
        let error = response.json::<Value>().await.unwrap()["error"].clone();
        assert_eq!(error["param"].as_str(), param, "{what}: {error}");
        assert!(error["message"].as_str().unwrap().len() < 1000, "{what}: no echo of what was sent");
    }
    let id = server.send(Method::GET, "/v1/models/%ff", "").await;
    assert_eq!(id.status(), StatusCode::BAD_REQUEST);
    assert_eq!(id.json::<Value>().await.unwrap()["error"]["param"], "id");
    server.complete(json!({"prompt": "a", "max_tokens": 1})).await;
}

#[tokio::test]
async fn unknown_fields_are_accepted() {
    let server = TestServer::start().await;
    let body = json!({"prompt": "a", "max_tokens": 1.0, "no_stop_trim": true, "separate_reasoning": false,
        "return_hidden_states": false, "stop": null, "user": "u", "cache_salt": "s"});
    server.complete(body).await;
}

#[tokio::test]
async fn a_body_that_is_too_large() {
    let server = TestServer::with(|settings, _| settings.max_body_bytes = Some(1000)).await;
    let (status, error) = server.post(COMPLETIONS, &json!({"prompt": "a".repeat(1000)})).await;
    assert_eq!((status, &error["error"]["code"]), (StatusCode::PAYLOAD_TOO_LARGE, &json!(413)));
}

#[tokio::test]
async fn keys_are_needed_for_v1_alone() {
    let server = TestServer::with(|settings, _| settings.api_key = Some(vec!["secret".into()])).await;
    let (status, error) = server.get("/v1/models").await;
    assert_eq!((status.as_u16(), &error["error"]["type"]), (401, &json!("AuthenticationError")));
    for path in ["/health", "/metrics", "/version", "/load"] {
        assert_eq!(server.get(path).await.0.as_u16(), 200, "{path}");
    }
    let body = json!({"prompt": "a", "max_tokens": 1});
    let with = server.send_with(COMPLETIONS, &body, ("authorization", "Bearer secret")).await;
    assert_eq!(with.status().as_u16(), 200);
    let wrong = server.send_with(COMPLETIONS, &body, ("authorization", "Bearer secreT")).await;
    assert_eq!(wrong.status().as_u16(), 401);
}

#[tokio::test]
async fn the_clients_request_id_comes_back() {
    let server = TestServer::start().await;
    let response = server
        .send_with(COMPLETIONS, &json!({"prompt": "a", "max_tokens": 1}), ("x-request-id", "my-1"))
        .await;
    assert_eq!(response.headers()["x-request-id"], "my-1");
    assert_eq!(response.json::<Value>().await.unwrap()["id"], "cmpl-my-1");
    let body = json!({"prompt": "a", "max_tokens": 1, "request_id": "my-2"});
    let response = server.send(Method::POST, COMPLETIONS, body.to_string()).await;
    assert_eq!(response.headers()["x-request-id"], "my-2");
    assert_eq!(response.json::<Value>().await.unwrap()["id"], "cmpl-my-2");
}

#[tokio::test]
async fn browsers_may_call_from_allowed_origins() {
    let server =
        TestServer::with(|settings, _| settings.allowed_origins = Some(vec!["https://a.example".into()]))
            .await;
    let allowed =
        server.send_with("/tokenize", &json!({"prompt": "a"}), ("origin", "https://a.example")).await;
    assert_eq!(allowed.headers()["access-control-allow-origin"], "https://a.example");
    assert_eq!(allowed.headers()["access-control-expose-headers"], "x-request-id");
    let other = server.send_with("/tokenize", &json!({"prompt": "a"}), ("origin", "https://b.example")).await;
    assert!(!other.headers().contains_key("access-control-allow-origin"));
}

#[tokio::test]
async fn a_full_queue_is_429_and_later_fine() {
    let server = TestServer::with(|settings, _| {
        settings.max_num_seqs = Some(1);
        settings.max_num_queued_reqs = Some(1);
    })
    .await;
    let running = server.endless().await;
    let queued = json!({"prompt": "a", "max_tokens": 2});
    let waiting = server.complete(queued.clone());
    let refused = async {
        server.until("vllm:num_requests_waiting", &[], 1.0).await;
        let response = server.send(Method::POST, COMPLETIONS, queued.to_string()).await;
        drop(running);
        response
    };
    let (answer, refused) = futures::future::join(waiting, refused).await;
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    assert!(refused.headers().contains_key("retry-after"));
    assert_eq!(refused.json::<Value>().await.unwrap()["error"]["type"], "RateLimitError");
    assert_eq!(answer["choices"].as_array().unwrap().len(), 1);
    assert_eq!(server.metric("vllm:admission_rejections_total", &["queue_full"]).await, Some(1.0));
    // More than could ever be there is no matter of waiting.
    let (status, error) = server.post(COMPLETIONS, &json!({"prompt": "a", "n": 3})).await;
    assert_eq!((status.as_u16(), &error["error"]["param"]), (400, &json!("n")));
}

#[tokio::test]
async fn while_draining_new_requests_are_503_and_running_ones_finish() {
    let mut server = TestServer::start().await;
    let body = json!({"prompt": "a", "max_tokens": 400, "ignore_eos": true});
    let running = server
        .send(Method::POST, COMPLETIONS, {
            let mut body = body.clone();
            body["stream"] = json!(true);
            body.to_string()
        })
        .await;
    server.stop();
    while server.get("/health").await.0.as_u16() == 200 {
        tokio::task::yield_now().await;
    }
    let (status, error) = server.post(COMPLETIONS, &body).await;
    assert_eq!((status.as_u16(), &error["error"]["type"]), (503, &json!("ServiceUnavailableError")));
    let text = running.text().await.unwrap();
    assert!(text.contains("\"finish_reason\":\"length\"") && text.ends_with("data: [DONE]\n\n"));
    server.ended().await;
}

#[tokio::test]
async fn what_is_not_done_in_time_is_aborted() {
    let mut server = TestServer::with(|settings, _| settings.shutdown_timeout = Some(0)).await;
    let body = json!({"prompt": "a", "max_tokens": 1000, "ignore_eos": true, "stream": true});
    let running = server.send(Method::POST, COMPLETIONS, body.to_string()).await;
    server.stop();
    let text = running.text().await.unwrap();
    assert!(text.contains("ServiceUnavailableError") && text.ends_with("data: [DONE]\n\n"), "{text}");
    server.ended().await;
}

#[tokio::test]
async fn while_loading_everything_but_probes_is_503() {
    let telemetry = Arc::new(Telemetry::new("m").unwrap());
    let keys = Arc::new(ApiKeys::load(&[], None).unwrap());
    let app = Arc::new(App::new(ServerConfig::default(), keys, telemetry));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    let server = tokio::spawn(async move { axum::serve(listener, router(app)).await });
    let client = reqwest::Client::new();
    for (path, expected) in
        [("/health", 503), ("/v1/models", 503), ("/metrics", 200), ("/version", 200), ("/load", 200)]
    {
        let status = client.get(format!("{base}{path}")).send().await.unwrap().status();
        assert_eq!(status.as_u16(), expected, "{path}");
    }
    server.abort();
}

//! The log's line of a request.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::process::{Process, text_of};

/// The lines of requests, once there are this many.
fn lines(server: &Process, count: usize) -> Vec<Value> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let log = server.log();
        let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        let requests: Vec<Value> = lines.into_iter().filter(|line| line["message"] == "request").collect();
        if requests.len() >= count {
            assert_eq!(requests.len(), count, "{log}");
            return requests;
        }
        assert!(Instant::now() < deadline, "{log}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_line_tells_what_a_request_took_and_how_it_ended() {
    let server = Process::start(&["--log-format", "json"]);
    let send = |body: Value| server.send("POST", "/v1/completions", "", &body.to_string());
    text_of(send(json!({"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": true, "request_id": "one"})));
    text_of(send(json!({"prompt": "a", "max_tokens": 3, "ignore_eos": true, "stream": true, "n": 2})));
    text_of(send(json!({"prompt": "a", "n": 0})));
    // Probes are no news.
    server.get("/health", "");
    lines(&server, 3);
    drop(server.stream());
    let lines = lines(&server, 4);

    let (whole, streamed, refused, left) = (&lines[0], &lines[1], &lines[2], &lines[3]);
    for (key, value) in [
        ("method", json!("POST")),
        ("path", json!("/v1/completions")),
        ("status", json!(200)),
        ("prompt_tokens", json!(3)),
        ("completion_tokens", json!(4)),
        ("finish_reasons", json!("length")),
        ("request_id", json!("one")),
    ] {
        assert_eq!(whole[key], value, "{key}: {whole}");
    }
    assert!(whole["first_token_ms"].as_u64() <= whole["ms"].as_u64(), "{whole}");
    assert_eq!(
        (&streamed["completion_tokens"], &streamed["finish_reasons"]),
        (&json!(6), &json!("length,length"))
    );
    assert!(streamed.get("client_left").is_none(), "{streamed}");
    assert_eq!((&refused["status"], refused.get("prompt_tokens")), (&json!(400), None));
    assert_eq!((&left["status"], &left["client_left"]), (&json!(200), &json!(true)));
    let tokens = left["completion_tokens"].as_u64().unwrap();
    assert!((1..400).contains(&tokens), "{left}");
    server.signal("TERM");
    assert_eq!(server.ended(), Some(0));
}

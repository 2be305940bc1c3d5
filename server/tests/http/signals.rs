//! What the program does when it is told to stop, or to read its files again.

use std::thread;
use std::time::{Duration, Instant};

use crate::process::{Process, text_of};

#[test]
fn sigterm_under_load_lets_every_accepted_request_finish() {
    let server = Process::start(&["--max-num-seqs", "4", "--shutdown-timeout", "120"]);
    // Four run, the others wait: all were accepted.
    let streams: Vec<_> = (0..4).map(|_| server.stream()).collect();
    let waiting: Vec<_> = (0..4)
        .map(|_| {
            let body = r#"{"prompt": "a", "max_tokens": 20, "ignore_eos": true}"#;
            server.send("POST", "/v1/completions", "", body)
        })
        .collect();
    let deadline = Instant::now() + Duration::from_secs(10);
    while !server.get("/load", "").contains("\"server_load\":8") {
        assert!(Instant::now() < deadline, "{}", server.get("/load", ""));
    }
    server.signal("TERM");
    let deadline = Instant::now() + Duration::from_secs(10);
    while server.get("/health", "").starts_with("HTTP/1.1 200") {
        assert!(Instant::now() < deadline, "it does not begin to drain");
    }
    assert!(server.get("/health", "").starts_with("HTTP/1.1 503"));
    for (stream, begun) in streams {
        let text = begun + &text_of(stream);
        assert!(text.contains("\"finish_reason\":\"length\"") && text.contains("data: [DONE]"), "{text}");
        // The key: the model may well say the word.
        assert!(!text.contains("\"error\":"), "{text}");
    }
    for stream in waiting {
        let text = text_of(stream);
        assert!(text.starts_with("HTTP/1.1 200") && text.contains("\"completion_tokens\":20"), "{text}");
    }
    assert_eq!(server.ended(), Some(0));
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let server = Process::start(&["--max-num-seqs", "1", "--shutdown-timeout", "600"]);
    let many = r#"{"prompt": "a", "max_tokens": 1000, "ignore_eos": true, "n": 64}"#;
    let _busy = server.send("POST", "/v1/completions", "", many);
    let deadline = Instant::now() + Duration::from_secs(10);
    while !server.get("/load", "").contains("\"server_load\":64") {
        assert!(Instant::now() < deadline, "{}", server.get("/load", ""));
    }
    server.signal("TERM");
    while server.get("/health", "").starts_with("HTTP/1.1 200") {
        thread::sleep(Duration::from_millis(10));
    }
    let started = Instant::now();
    server.signal("INT");
    assert_eq!(server.ended(), Some(130));
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn sighup_reads_the_keys_again() {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys.txt");
    std::fs::write(&keys, "old\n").unwrap();
    let server = Process::start(&["--api-key-file", keys.to_str().unwrap()]);
    assert!(server.get("/v1/models", "old").starts_with("HTTP/1.1 200"));
    std::fs::write(&keys, "new\n").unwrap();
    server.signal("HUP");
    let deadline = Instant::now() + Duration::from_secs(10);
    while !server.get("/v1/models", "new").starts_with("HTTP/1.1 200") {
        assert!(Instant::now() < deadline, "the new key is not taken");
        thread::sleep(Duration::from_millis(10));
    }
    assert!(server.get("/v1/models", "old").starts_with("HTTP/1.1 401"));
    server.signal("TERM");
    assert_eq!(server.ended(), Some(0));
}

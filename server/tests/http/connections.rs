//! Clients that misbehave on the wire: slow, silent, deaf, too many, too long.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::support::TestServer;

const COMPLETIONS: &str = "/v1/completions";

/// A server that waits for clients a second only.
async fn impatient() -> TestServer {
    TestServer::with(|settings, _| settings.client_timeout = Some(1)).await
}

/// Sends `bytes` and reads until the server closes.
async fn exchange(address: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // The server may close before all is sent.
    let _ = stream.write_all(bytes).await;
    rest(&mut stream).await
}

async fn rest(stream: &mut TcpStream) -> String {
    let mut answer = Vec::new();
    let reading = stream.read_to_end(&mut answer);
    // A reset ends the answer as well as a close does.
    let _ = tokio::time::timeout(Duration::from_secs(10), reading).await.expect("the server closes");
    String::from_utf8_lossy(&answer).into_owned()
}

fn post(headers: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n{headers}\r\n{body}")
        .into_bytes()
}

#[tokio::test]
async fn headers_that_trickle_in_are_not_waited_for() {
    let server = impatient().await;
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    let started = Instant::now();
    // A byte now and then does not put the end off.
    for byte in b"GET /health HTTP/1.1\r\nHost: aaaaaaaaaaaaaaaaaaaaaa".chunks(1) {
        if stream.write_all(byte).await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    rest(&mut stream).await;
    assert!(started.elapsed() < Duration::from_secs(6), "{:?}", started.elapsed());
    assert_eq!(server.get("/health").await.0.as_u16(), 200);
}

#[tokio::test]
async fn a_body_that_trickles_in_is_408() {
    let server = impatient().await;
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    stream
        .write_all(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{")
        .await
        .unwrap();
    let (mut reading, mut writing) = stream.into_split();
    let trickle = tokio::spawn(async move {
        while writing.write_all(b" ").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    });
    let mut answer = vec![0; 4096];
    let length =
        tokio::time::timeout(Duration::from_secs(5), reading.read(&mut answer)).await.unwrap().unwrap();
    let answer = String::from_utf8_lossy(&answer[..length]);
    assert!(answer.starts_with("HTTP/1.1 408") && answer.contains("within 1 seconds"), "{answer}");
    trickle.abort();
}

#[tokio::test]
async fn who_reads_nothing_is_cut_off_and_its_sequences_end() {
    let server = impatient().await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stream = socket.connect(server.address()).await.unwrap();
    let body = json!({"prompt": "a", "max_tokens": 1000, "ignore_eos": true, "n": 16, "logprobs": 20, "stream": true});
    stream.write_all(&post("", &body.to_string())).await.unwrap();
    server.until("vllm:request_success_total", &["\"abort\""], 16.0).await;
    server.until("vllm:num_requests_running", &[], 0.0).await;
}

#[tokio::test]
async fn who_closes_its_sending_side_is_gone() {
    let server = TestServer::start().await;
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    let body = json!({"prompt": "a", "max_tokens": 1000, "ignore_eos": true, "n": 8});
    stream.write_all(&post("", &body.to_string())).await.unwrap();
    server.until("vllm:num_requests_running", &[], 8.0).await;
    stream.shutdown().await.unwrap();
    server.until("vllm:num_requests_running", &[], 0.0).await;
    assert_eq!(server.metric("vllm:request_success_total", &["\"abort\""]).await, Some(8.0));
}

#[tokio::test]
async fn floods_of_headers_are_431_and_nonsense_is_400() {
    let server = TestServer::start().await;
    let health = |headers: &[u8]| [b"GET /health HTTP/1.1\r\nHost: a\r\n", headers, b"\r\n"].concat();
    let many: String = (0..200).map(|index| format!("x-{index}: 1\r\n")).collect();
    let long = format!("x: {}\r\n", "y".repeat(100_000));
    let path = format!("GET /{} HTTP/1.1\r\n\r\n", "y".repeat(100_000));
    for (bytes, status) in [
        (health(many.as_bytes()), "431"),
        (health(long.as_bytes()), "431"),
        (path.into_bytes(), "4"),
        (health(b"na me: 1\r\n"), "400"),
        (health(b"\xff\xfe: 1\r\n"), "400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(), "400"),
        (b"GET /health HTTP/9.9\r\n\r\n".to_vec(), "400"),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: nine\r\n\r\n".to_vec(), "400"),
        (b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n".to_vec(), "400"),
    ] {
        let answer = exchange(server.address(), &bytes).await;
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(60)]);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{shown}: {answer}");
    }
    // Bytes that are no text are allowed in a value, and mean nothing here.
    let odd = health(b"x-request-id: \xff\xfe\r\nauthorization: \xff\r\nConnection: close\r\n");
    assert!(exchange(server.address(), &odd).await.starts_with("HTTP/1.1 200"));
    assert_eq!(server.get("/health").await.0.as_u16(), 200);
}

#[tokio::test]
async fn fifty_megabytes_are_413_without_being_read() {
    let server = TestServer::start().await;
    let bytes = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 52428800\r\n\r\n{";
    let answer = exchange(server.address(), bytes).await;
    assert!(answer.starts_with("HTTP/1.1 413") && answer.contains("33554432"), "{answer}");
}

#[tokio::test]
async fn more_connections_than_places_wait() {
    let server = TestServer::with(|settings, _| settings.max_connections = Some(1)).await;
    let request = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    let first = TcpStream::connect(server.address()).await.unwrap();
    // The place is taken when the server has accepted, which it tells nobody: an answer shows it.
    let mut second = TcpStream::connect(server.address()).await.unwrap();
    second.write_all(request).await.unwrap();
    let mut byte = [0];
    let waited = tokio::time::timeout(Duration::from_millis(300), second.read(&mut byte)).await;
    assert!(waited.is_err(), "the second connection was served beside the first");
    drop(first);
    assert!(rest(&mut second).await.contains("TTP/1.1 200"));
}

#[tokio::test]
async fn a_request_that_takes_too_long_is_ended() {
    let server = TestServer::with(|settings, _| settings.request_timeout = Some(1)).await;
    let mut body = json!({"prompt": "a", "max_tokens": 1000, "ignore_eos": true, "n": 32});
    let (status, error) = server.post(COMPLETIONS, &body).await;
    assert_eq!((status.as_u16(), &error["error"]["type"]), (504, &json!("TimeoutError")));
    body["stream"] = json!(true);
    let response = server.send(Method::POST, COMPLETIONS, body.to_string()).await;
    assert_eq!(response.status().as_u16(), 200);
    let text = response.text().await.unwrap();
    assert!(text.starts_with("data: {\"id\"") && text.ends_with("data: [DONE]\n\n"), "{text}");
    assert!(text.contains("\"code\":504"), "{text}");
    server.until("vllm:num_requests_running", &[], 0.0).await;
    // What is quick enough is not touched.
    server.complete(json!({"prompt": "a", "max_tokens": 2})).await;
}

#[tokio::test]
async fn keys_of_a_file_are_replaced_while_serving() {
    let mut keys = std::path::PathBuf::new();
    let server = TestServer::with(|settings, folder| {
        keys = folder.join("keys.txt");
        std::fs::write(&keys, "old\n").unwrap();
        settings.api_key_file = Some(keys.clone());
    })
    .await;
    let status = async |key: &str| {
        let body = json!({"prompt": "a", "max_tokens": 1});
        let header = format!("Bearer {key}");
        server.send_with(COMPLETIONS, &body, ("authorization", &header)).await.status().as_u16()
    };
    assert_eq!((status("old").await, status("new").await), (200, 401));
    std::fs::write(&keys, "new\n").unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while status("new").await != 200 {
        assert!(Instant::now() < deadline, "the new key is not taken");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(status("old").await, 401);
}

//! `mxserve bench --url` against a real server.

use std::process::{Command, Output};

use serde_json::Value;

use crate::support::TestServer;

async fn bench(url: &str, flags: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mxserve"));
    command.args(["bench", "--url", url]).args(flags);
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_request_is_answered_and_counted() {
    let server = TestServer::start().await;
    let flags =
        ["--concurrency", "3", "--num-prompts", "7", "--input-len", "5", "--output-len", "9", "-o", "json"];
    let output = bench(server.base(), &flags).await;
    assert!(output.status.success(), "{output:?}");
    let records: Value = serde_json::from_slice(&output.stdout).unwrap();
    let record = &records[0];
    assert_eq!(
        (record["requests"].as_u64(), record["output_tokens"].as_u64()),
        (Some(7), Some(63)),
        "{record}"
    );
    assert!(record["input_tokens"].as_u64() >= Some(7 * 5), "{record}");
    let counted = server.metric("vllm:generation_tokens_total", &[]).await;
    assert_eq!(counted, Some(63.0));
    let (first, seconds) = (&record["time_to_first_token_secs"]["p50"], &record["seconds"]);
    assert!(first.as_f64() > Some(0.0) && first.as_f64() < seconds.as_f64(), "{record}");

    let table = String::from_utf8(bench(server.base(), &["--output-len", "2"]).await.stdout).unwrap();
    assert_eq!(table.lines().count(), 3, "{table}");
}

#[tokio::test(flavor = "multi_thread")]
async fn prompts_that_the_server_has_are_counted() {
    let server = TestServer::start().await;
    let cached = async |requests: &str| {
        let flags = ["--num-prompts", requests, "--input-len", "40", "--output-len", "1", "-o", "json"];
        let records: Value = serde_json::from_slice(&bench(server.base(), &flags).await.stdout).unwrap();
        records[0]["cached_tokens"].as_u64().unwrap()
    };
    assert_eq!(cached("2").await, 0);
    // More requests are others, not these and some.
    assert_eq!(cached("3").await, 0);
    assert!(cached("2").await >= 2 * 32);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_refuses_is_shown() {
    let server = TestServer::start().await;
    let output = bench(server.base(), &["--served-model", "other"]).await;
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("404") && error.contains("other"), "{error}");
}

//! `/metrics` and the other endpoints for machines.

use serde_json::json;

use crate::support::TestServer;

/// Names that dashboards, routers and autoscalers read.
const NAMES: [&str; 35] = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
    "vllm:lora_requests_info",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:spec_decode_num_drafts_total",
    "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total",
    "vllm:admission_rejections_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:request_queue_time_seconds_bucket",
    "vllm:request_prefill_time_seconds_bucket",
    "vllm:request_decode_time_seconds_bucket",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
    "vllm:iteration_tokens_total_bucket",
    "mx_memory_bytes",
    "mx_weight_bytes",
    "mx_weight_bits_per_parameter",
    "mx_footprint_ratio",
    "mx_attention_info",
    "mx_linear_info",
    "vllm:e2e_request_latency_seconds_count",
    "vllm:e2e_request_latency_seconds_sum",
    "vllm:time_to_first_token_seconds_count",
    "vllm:time_to_first_token_seconds_sum",
];

/// The test model, packed.
async fn packed(format: &str) -> TestServer {
    let recipe = converter::plan::Recipe::new(format.parse().unwrap());
    TestServer::with(|settings, folder| {
        let output = folder.join("packed");
        converter::convert(&converter::Options::new(crate::support::MODEL, &output, recipe), &()).unwrap();
        settings.model = Some(output);
    })
    .await
}

#[tokio::test]
async fn every_name_is_there_with_the_models_name() {
    let server = packed("mxfp4").await;
    server.complete(json!({"prompt": "a", "max_tokens": 3, "ignore_eos": true})).await;
    for name in NAMES {
        let value = server.metric(name, &["model_name=\"packed\"", "engine=\"0\""]).await;
        assert!(value.is_some(), "{name}");
    }
}

#[tokio::test]
async fn values_are_those_of_the_requests() {
    let server = TestServer::start().await;
    let body = json!({"prompt": [5, 6, 7], "n": 2, "max_tokens": 4, "ignore_eos": true});
    server.complete(body).await;
    for (name, labels, expected) in [
        ("vllm:prompt_tokens_total", &[][..], 6.0),
        ("vllm:generation_tokens_total", &[], 8.0),
        ("vllm:request_success_total", &["\"length\""], 2.0),
        ("vllm:request_success_total", &["\"stop\""], 0.0),
        ("vllm:request_prompt_tokens_sum", &[], 6.0),
        ("vllm:request_generation_tokens_sum", &[], 8.0),
        ("vllm:e2e_request_latency_seconds_count", &[], 2.0),
        ("vllm:time_to_first_token_seconds_count", &[], 2.0),
        ("vllm:inter_token_latency_seconds_count", &[], 6.0),
        ("vllm:iteration_tokens_total_sum", &[], 12.0),
    ] {
        // Scraping twice must not count twice.
        for _ in 0..2 {
            assert_eq!(server.metric(name, labels).await, Some(expected), "{name} {labels:?}");
        }
    }
    let (_, load) = server.get("/load").await;
    assert_eq!(load, json!({"server_load": 0}));
}

#[tokio::test]
async fn the_footprint_is_that_of_the_format() {
    // Parameters of the linear layers of the six decoder layers: q, k, v, o, gate, up, down.
    let linear = 6 * (256 * 512 + 256 * 256 + 3 * 256 * 768);
    let all = 5_770_496.0; // with the embedding, tied to the head, and the norms
    for (format, bits) in [("mxfp4", 4.25), ("mxfp6", 6.25), ("mxfp8", 8.25), ("w4a6", 4.25)] {
        let server = packed(format).await;
        let gauge = async |component: &str| server.metric("mx_memory_bytes", &[component]).await.unwrap();
        let (weights, scales) = (gauge("weights").await, gauge("scales").await);
        assert_eq!((weights + scales) * 8.0 / f64::from(linear), bits, "{format}");
        assert_eq!(scales * 32.0, f64::from(linear), "{format}");
        assert_eq!(server.metric("mx_weight_bits_per_parameter", &[]).await, Some(bits));
        let ratio = server.metric("mx_footprint_ratio", &[]).await.unwrap();
        assert_eq!(ratio, all * 2.0 / (weights + scales + gauge("unquantized").await));
        assert!(ratio > 1.3, "{format}: {ratio}");
        assert!(gauge("device_used").await > weights && gauge("kv_cache").await > 0.0);
        let declared = format!("declared=\"{}\"", format.parse::<kernels::mx::Scheme>().unwrap());
        let labels = ["layer_group=\"down_proj\"", declared.as_str(), "kernel=\""];
        assert_eq!(server.metric("mx_linear_info", &labels).await, Some(1.0), "{format}");
    }
}

#[tokio::test]
async fn cards_versions_and_probes() {
    let server =
        TestServer::with(|settings, _| settings.served_model_name = Some(vec!["org/a".into(), "b".into()]))
            .await;
    let (_, list) = server.get("/v1/models").await;
    let card = &list["data"][0];
    assert_eq!(
        (&card["id"], &card["owned_by"], &card["max_model_len"]),
        (&json!("org/a"), &json!("vllm"), &json!(1024))
    );
    assert_eq!(list["data"].as_array().unwrap().len(), 2);
    let (_, one) = server.get("/v1/models/org/a").await;
    assert_eq!(one, *card);
    for name in ["org/a", "b"] {
        let answer = server.complete(json!({"model": name, "prompt": "a", "max_tokens": 1})).await;
        assert_eq!(answer["model"], name);
    }
    assert_eq!(server.get("/version").await.1, json!({"version": env!("CARGO_PKG_VERSION")}));
    for path in ["/health", "/ping"] {
        assert_eq!(server.get(path).await.0.as_u16(), 200);
    }
}

//! What loading checks, and what a loaded model reports.

use std::path::Path;

use crate::common::{Golden, Runner, with_config};
use kernels::{Component, Device, KvCacheDtype};
use models::checkpoint::Checkpoint;
use serde_json::json;

fn load_error(dir: &Path) -> String {
    let backend = kernels::open(Device::Cpu { threads: 1 }).unwrap();
    let checkpoint = Checkpoint::open(dir).unwrap();
    match models::load(&*backend, &checkpoint) {
        Ok(_) => panic!("{} loads", dir.display()),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_tensor_of_another_shape_is_named_with_both_shapes() {
    for (field, value, message) in [
        (
            "intermediate_size",
            json!(128),
            "model.layers.0.mlp.gate_proj has shape [96, 64]; config.json calls for [128, 64]",
        ),
        ("vocab_size", json!(255), "model.embed_tokens has shape [256, 64]; config.json calls for [255, 64]"),
        (
            "num_key_value_heads",
            json!(4),
            "model.layers.0.self_attn.k_proj has shape [32, 64]; config.json calls for [64, 64]",
        ),
        (
            "head_dim",
            json!(8),
            "model.layers.0.self_attn.q_proj has shape [64, 64]; config.json calls for [32, 64]",
        ),
    ] {
        let copy = with_config("llama", |config| config[field] = value);
        assert_eq!(load_error(copy.path()), message);
    }
}

#[test]
fn a_missing_tensor_is_named() {
    let layers = with_config("llama", |config| config["num_hidden_layers"] = json!(3));
    let error = load_error(layers.path());
    assert!(error.contains("model.layers.2.input_layernorm.weight is missing"), "{error}");
    let bias = with_config("llama", |config| config["attention_bias"] = json!(true));
    let error = load_error(bias.path());
    assert!(error.contains("model.layers.0.self_attn.q_proj.bias is missing"), "{error}");
    let head = with_config("qwen3", |config| config["tie_word_embeddings"] = json!(false));
    let error = load_error(head.path());
    assert!(error.contains("lm_head.weight is missing"), "{error}");
}

#[test]
fn parameters_and_bytes_are_counted() {
    let embed = 256 * 64;
    let norms = 2 * 2 * 64 + 64;
    let attention = |heads: usize, kv: usize, dim: usize| 64 * dim * (2 * heads + 2 * kv);
    let mlp = 3 * 64 * 96;
    for (case, parameters) in [
        ("llama", 2 * embed + norms + 2 * (attention(4, 2, 16) + mlp)),
        (
            "llama_biases",
            2 * embed + norms + 2 * (attention(4, 2, 16) + mlp + (64 + 32 + 32 + 64) + (96 + 96 + 64)),
        ),
        ("qwen2_window", embed + norms + 2 * (attention(4, 2, 16) + mlp + (64 + 32 + 32))),
        ("qwen3", embed + norms + 2 * (attention(4, 2, 32) + mlp + 2 * 32)),
    ] {
        let runner = Runner::load(&Golden::read(case).dir, KvCacheDtype::F32, 1);
        assert_eq!(runner.model.parameters(), parameters, "{case}");
        let linears = runner.model.linear_info();
        let groups: Vec<_> = linears.iter().map(|row| (row.group.as_str(), row.layers)).collect();
        let expected = [
            ("q_proj+k_proj+v_proj", 2),
            ("o_proj", 2),
            ("gate_proj+up_proj", 2),
            ("down_proj", 2),
            ("lm_head", 1),
        ];
        assert_eq!(groups, expected, "{case}");
        assert!(linears.iter().all(|row| row.scheme.is_none() && row.bytes == 2 * row.parameters), "{case}");
        let dim = if case == "qwen3" { 32 } else { 16 };
        let expected = [8 * dim * 64, 4 * dim * 64, 2 * 96 * 64, 96 * 64].map(|layer| 2 * layer);
        let actual: Vec<_> = linears.iter().map(|row| row.parameters).collect();
        assert_eq!(actual[..4], expected, "{case}");
        assert_eq!(actual[4], embed, "{case}");
    }
}

#[test]
fn a_tied_head_is_held_once() {
    let unquantized = |case: &str| {
        let runner = Runner::load(&Golden::read(case).dir, KvCacheDtype::F32, 1);
        runner.backend.memory().bytes(Component::Unquantized)
    };
    assert_eq!(unquantized("llama") - unquantized("llama_rope_linear"), 2 * 256 * 64, "the head, in BF16");
}

#[test]
fn the_kv_cache_takes_the_bytes_it_says() {
    let dir = Golden::read("qwen3").dir;
    for dtype in [KvCacheDtype::F32, KvCacheDtype::Bf16] {
        let runner = Runner::load(&dir, dtype, 5);
        let config = runner.model.config();
        let per_block = models::KvCache::bytes_per_block(&*runner.backend, config, dtype).unwrap();
        assert_eq!(runner.backend.memory().bytes(Component::KvCache), 5 * per_block);
    }
}

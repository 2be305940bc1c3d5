use serde_json::json;

use super::*;

/// The config of a small Llama.
pub(crate) fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "vocab_size": 256,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 2,
        "hidden_act": "silu",
    })
}

fn with(architecture: &str, changes: &[(&str, Value)]) -> Result<ModelConfig, ConfigError> {
    let mut config = llama();
    config["architectures"] = json!([architecture]);
    for (field, value) in changes {
        config[*field] = value.clone();
    }
    ModelConfig::parse(&config)
}

#[test]
fn a_llama_is_read() {
    let config = ModelConfig::parse(&llama()).unwrap();
    assert_eq!(config.architecture, "LlamaForCausalLM");
    assert_eq!((config.hidden_size, config.intermediate_size, config.vocab_size), (64, 96, 256));
    assert_eq!(config.heads, Heads { q: 4, kv: 2, dim: 16 });
    assert_eq!(config.windows, [None; 3]);
    assert_eq!(config.biases, Biases::default());
    assert_eq!((config.rms_norm_eps, config.max_model_len), (1e-5, 128));
    assert_eq!(config.eos_token_ids, [2]);
    assert!(!config.tie_word_embeddings && !config.qk_norm);
}

#[test]
fn heads_follow_from_what_is_given() {
    let heads = |architecture, changes: &[(&str, Value)]| with(architecture, changes).unwrap().heads;
    assert_eq!(heads("LlamaForCausalLM", &[("head_dim", json!(32))]).dim, 32);
    assert_eq!(heads("LlamaForCausalLM", &[("head_dim", Value::Null)]).dim, 16);
    assert_eq!(heads("LlamaForCausalLM", &[("num_key_value_heads", Value::Null)]).kv, 4);
    assert_eq!(heads("Qwen3ForCausalLM", &[]).dim, 128, "Qwen3 does not derive it");
}

#[test]
fn biases_and_head_norms_belong_to_the_architecture() {
    let parse = |architecture, field: &str| with(architecture, &[(field, json!(true))]).unwrap();
    let qkv = Biases { qkv: true, ..Biases::default() };
    let attention = Biases { output: true, ..qkv };
    assert_eq!(parse("LlamaForCausalLM", "attention_bias").biases, attention);
    assert_eq!(parse("LlamaForCausalLM", "mlp_bias").biases, Biases { mlp: true, ..Biases::default() });
    assert_eq!(parse("MistralForCausalLM", "attention_bias").biases, Biases::default());
    assert_eq!(with("Qwen2ForCausalLM", &[]).unwrap().biases, qkv);
    assert_eq!(with("Qwen3ForCausalLM", &[]).unwrap().biases, Biases::default());
    assert_eq!(parse("Qwen3ForCausalLM", "attention_bias").biases, attention);
    assert!(with("Qwen3ForCausalLM", &[]).unwrap().qk_norm);
}

#[test]
fn windows_slide_where_the_architecture_says() {
    let windows = |architecture, changes: &[(&str, Value)]| with(architecture, changes).unwrap().windows;
    let window = ("sliding_window", json!(9));
    assert_eq!(windows("LlamaForCausalLM", std::slice::from_ref(&window)), [None; 3]);
    assert_eq!(windows("MistralForCausalLM", std::slice::from_ref(&window)), [Some(9); 3]);
    assert_eq!(windows("MistralForCausalLM", &[("sliding_window", Value::Null)]), [None; 3]);
    assert_eq!(windows("MistralForCausalLM", &[]), [Some(4096); 3]);
    for qwen in ["Qwen2ForCausalLM", "Qwen3ForCausalLM"] {
        let use_it = ("use_sliding_window", json!(true));
        assert_eq!(windows(qwen, std::slice::from_ref(&window)), [None; 3]);
        assert_eq!(windows(qwen, &[window.clone(), use_it.clone()]), [None; 3], "28 layers come first");
        let first = ("max_window_layers", json!(2));
        assert_eq!(windows(qwen, &[window.clone(), use_it.clone(), first.clone()]), [None, None, Some(9)]);
        let types = ("layer_types", json!(["sliding_attention", "full_attention", "full_attention"]));
        assert_eq!(windows(qwen, &[window.clone(), use_it, first, types]), [Some(9), None, None]);
    }
}

#[test]
fn end_tokens_are_one_or_many() {
    let ids = |eos| with("LlamaForCausalLM", &[("eos_token_id", eos)]).unwrap().eos_token_ids;
    assert_eq!(ids(json!([2, 5])), [2, 5]);
    assert!(ids(Value::Null).is_empty());
}

#[test]
fn errors_name_the_field() {
    let llama = "LlamaForCausalLM";
    for (architecture, changes, message) in [
        (
            "MixtralForCausalLM",
            vec![],
            "config.json: architectures = [\"MixtralForCausalLM\"] is not supported; supported: LlamaForCausalLM, \
             MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM",
        ),
        (llama, vec![("hidden_size", Value::Null)], "config.json: hidden_size is missing"),
        (
            llama,
            vec![("vocab_size", json!(-1))],
            "config.json: vocab_size is -1, not an integer from 1 to 2097152",
        ),
        (
            llama,
            vec![("hidden_act", json!("gelu"))],
            "config.json: hidden_act = \"gelu\" is not supported; supported: silu",
        ),
        (
            llama,
            vec![("num_key_value_heads", json!(3))],
            "config.json: num_key_value_heads is 3, not a divisor of num_attention_heads = 4",
        ),
        (
            llama,
            vec![("num_attention_heads", json!(6))],
            "config.json: num_attention_heads is 6, not a divisor of hidden_size = 64",
        ),
        (llama, vec![("head_dim", json!(15))], "config.json: head_dim is 15, not even (it comes to 15)"),
        (
            llama,
            vec![("tie_word_embeddings", json!("yes"))],
            "config.json: tie_word_embeddings is \"yes\", not true or false",
        ),
        (
            llama,
            vec![("num_local_experts", json!(8))],
            "config.json: num_local_experts = 8 is not supported; supported: none",
        ),
        (
            llama,
            vec![("final_logit_softcapping", json!(30.0))],
            "config.json: final_logit_softcapping = 30.0 is not supported; supported: none",
        ),
        (
            llama,
            vec![("partial_rotary_factor", json!(0.5))],
            "config.json: partial_rotary_factor = 0.5 is not supported; supported: none",
        ),
        (
            "Qwen2ForCausalLM",
            vec![("layer_types", json!(["full_attention"]))],
            "config.json: layer_types is [\"full_attention\"], not a list of num_hidden_layers = 3",
        ),
        (
            "Qwen3ForCausalLM",
            vec![("layer_types", json!(["chunked_attention", "full_attention", "full_attention"]))],
            "config.json: layer_types = [\"chunked_attention\",\"full_attention\",\"full_attention\"] is not \
             supported; supported: full_attention, sliding_attention",
        ),
    ] {
        assert_eq!(with(architecture, &changes).unwrap_err().to_string(), message);
    }
    let error = ModelConfig::parse(&json!([])).unwrap_err().to_string();
    assert_eq!(error, "config.json: the top level is [], not an object");
}

#[test]
fn fields_that_change_nothing_are_accepted() {
    let neutral = [
        ("partial_rotary_factor", json!(1.0)),
        ("num_experts", json!(0)),
        ("final_logit_softcapping", Value::Null),
        ("rope_scaling", Value::Null),
    ];
    with("LlamaForCausalLM", &neutral).unwrap();
}

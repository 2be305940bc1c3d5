use serde_json::{Value, json};

use super::*;

fn parse(config: &Value) -> Result<Rope, ConfigError> {
    let fields = Fields::new("config.json", config).unwrap();
    let size = |field| fields.size(field).unwrap().unwrap();
    Rope::parse(&fields, size("head_dim"), size("max_position_embeddings"))
}

fn check_close(actual: &[f32], expected: &Value, what: &str) {
    let expected: Vec<f64> = serde_json::from_value(expected.clone()).unwrap();
    assert_eq!(actual.len(), expected.len(), "{what}");
    for (pair, (&actual, expected)) in actual.iter().zip(expected).enumerate() {
        let error = (f64::from(actual) - expected).abs() / expected;
        assert!(error < 1e-6, "{what}: pair {pair} turns by {actual}, Transformers has {expected}");
    }
}

#[test]
fn frequencies_are_those_of_transformers() {
    let golden = include_str!("../../../tests/golden/logits/rope.json");
    let golden: serde_json::Map<String, Value> = serde_json::from_str(golden).unwrap();
    assert!(golden.len() >= 7);
    for (name, case) in &golden {
        let rope = parse(&case["config"]).unwrap();
        check_close(&rope.inv_freq, &case["inv_freq"], name);
        let factor = case["factor"].as_f64().unwrap();
        assert!((f64::from(rope.factor) - factor).abs() < 1e-6, "{name}: factor {}", rope.factor);
    }
}

#[test]
fn both_forms_of_the_config_say_the_same() {
    let fields = json!({ "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192 });
    let (mut old, mut new) = (fields.clone(), fields);
    old["type"] = json!("llama3");
    new["rope_type"] = json!("llama3");
    new["rope_theta"] = json!(5e5);
    let sizes = json!({ "head_dim": 64, "max_position_embeddings": 131_072 });
    let (mut four, mut five) = (sizes.clone(), sizes);
    four["rope_scaling"] = old;
    four["rope_theta"] = json!(5e5);
    five["rope_parameters"] = new;
    assert_eq!(parse(&four).unwrap(), parse(&five).unwrap());
}

#[test]
fn without_scaling_the_frequencies_are_powers_of_theta() {
    let config =
        json!({ "head_dim": 4, "max_position_embeddings": 16, "rope_theta": 100.0, "rope_scaling": null });
    let rope = parse(&config).unwrap();
    assert_eq!(rope, Rope { inv_freq: vec![1.0, 0.1], factor: 1.0, max_positions: 16 });
    let config = json!({ "head_dim": 4, "max_position_embeddings": 16 });
    assert_eq!(parse(&config).unwrap().inv_freq, [1.0, 0.01]);
}

#[test]
fn yarn_extends_the_context_from_either_description() {
    let yarn = |max: usize, original: Value| {
        json!({ "head_dim": 64, "max_position_embeddings": max, "rope_scaling":
                { "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": original } })
    };
    assert_eq!(parse(&yarn(32_768, json!(32_768))).unwrap().max_positions, 131_072);
    assert_eq!(parse(&yarn(131_072, json!(32_768))).unwrap().max_positions, 131_072);
    assert_eq!(parse(&yarn(32_768, Value::Null)).unwrap().max_positions, 131_072);
}

#[test]
fn what_cannot_run_is_refused_by_field() {
    let with = |rope: Value| {
        let config = json!({ "head_dim": 64, "max_position_embeddings": 64, "rope_parameters": rope });
        parse(&config).unwrap_err().to_string()
    };
    for (rope, message) in [
        (json!({ "rope_type": "longrope" }), "rope_parameters.rope_type = \"longrope\" is not supported"),
        (json!({ "type": "su" }), "rope_parameters.type = \"su\" is not supported"),
        (json!({ "rope_type": "linear" }), "rope_parameters.factor is missing"),
        (json!({ "rope_type": "linear", "factor": 0 }), "rope_parameters.factor is 0, not a number above 0"),
        (json!({ "rope_type": "default", "partial_rotary_factor": 0.5 }), "partial_rotary_factor = 0.5"),
        (json!({ "full_attention": {} }), "rope_parameters.full_attention = {} is not supported"),
        (
            json!({ "rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4 }),
            "rope_parameters.high_freq_factor is 4, not above low_freq_factor = 4",
        ),
        (json!({ "rope_type": "yarn", "factor": 4, "rope_theta": 1 }), "rope_parameters.rope_theta is 1"),
    ] {
        let error = with(rope);
        assert!(error.contains(message), "{error}");
    }
}

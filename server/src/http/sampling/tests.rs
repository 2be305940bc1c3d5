use serde_json::{Value, json};

use super::*;

fn plan_with(fields: Value, defaults: &GenerationConfig) -> Result<SamplingPlan, ApiError> {
    let tokenizer = crate::tokenizer::tests::rustdoc();
    let tokenizer = Some(&tokenizer);
    let model = ModelFacts { vocab_size: 100, max_model_len: 64, has_priorities: false, tokenizer, defaults };
    serde_json::from_value::<SamplingFields>(fields).unwrap().plan(model)
}

fn plan(fields: Value) -> Result<SamplingPlan, ApiError> {
    plan_with(fields, &GenerationConfig { eos_token_ids: vec![2], ..GenerationConfig::default() })
}

#[test]
fn ranges_are_checked_and_the_field_is_named() {
    let cases = [
        ("n", json!(0)),
        ("best_of", json!(2)),
        ("temperature", json!(-0.1)),
        ("temperature", json!(1e39)),
        ("top_p", json!(0)),
        ("top_p", json!(1.1)),
        ("top_k", json!(-2)),
        ("min_p", json!(1.5)),
        ("presence_penalty", json!(2.5)),
        ("frequency_penalty", json!(-3)),
        ("repetition_penalty", json!(0)),
        ("logit_bias", json!({"100": 1})),
        ("logit_bias", json!({"x": 1})),
        ("logit_bias", json!({"1": 101})),
        ("allowed_token_ids", json!([])),
        ("allowed_token_ids", json!([100])),
        ("bad_words", json!([""])),
        ("bad_words", json!(["x".repeat(257)])),
        ("bad_words", json!(vec!["x"; 1025])),
        ("stop", json!("")),
        ("stop", json!(["a", ""])),
        ("stop", json!("x".repeat(4097))),
        ("stop", json!(vec!["x"; 1025])),
        ("stop_token_ids", json!([100])),
        ("prompt_logprobs", json!(21)),
        ("prompt_logprobs", json!(-1)),
        ("truncate_prompt_tokens", json!(0)),
        ("truncate_prompt_tokens", json!(65)),
        ("priority", json!(-1)),
        ("cache_salt", json!("")),
    ];
    for (field, value) in cases {
        let mut fields = json!({});
        fields[field] = value.clone();
        let error = plan(fields).unwrap_err();
        assert!(
            matches!(&error, ApiError::BadRequest { param: Some(p), .. } if p == field),
            "{field} {value}: {error}"
        );
    }
}

#[test]
fn null_is_absent_and_zero_means_off() {
    let all_null = json!({"n": null, "temperature": null, "stop": null, "seed": null, "top_k": null});
    let plan_null = plan(all_null).unwrap();
    assert_eq!((plan_null.n, plan_null.sampling.temperature, plan_null.stop_strings.len()), (1, 1.0, 0));
    for off in [-1, 0] {
        assert_eq!(plan(json!({"top_k": off})).unwrap().sampling.top_k, None);
    }
    assert_eq!(plan(json!({"temperature": 1e-6})).unwrap().sampling.temperature, 0.0);
}

#[test]
fn seeds() {
    let seeded = plan(json!({"seed": -1})).unwrap();
    assert_eq!(seeded.sampling.seed, u64::MAX);
    assert_eq!(seeded.sampling_of(0).seed, u64::MAX);
    assert_eq!(seeded.sampling_of(1).seed, 0);
    let random = [plan(json!({})).unwrap(), plan(json!({})).unwrap()];
    assert_ne!(random[0].sampling.seed, random[1].sampling.seed);
}

#[test]
fn the_models_defaults_yield_to_the_request() {
    let defaults =
        GenerationConfig { temperature: Some(0.6), top_k: Some(20), ..GenerationConfig::default() };
    let sampling = plan_with(json!({}), &defaults).unwrap().sampling;
    assert_eq!((sampling.temperature, sampling.top_k), (0.6, Some(20)));
    let sampling = plan_with(json!({"temperature": 0, "top_k": -1}), &defaults).unwrap().sampling;
    assert_eq!((sampling.temperature, sampling.top_k), (0.0, None));
}

#[test]
fn ends() {
    assert_eq!(plan(json!({})).unwrap().stop.eos_token_ids, [2]);
    let ignoring = plan(json!({"ignore_eos": true, "stop_token_ids": [5], "stop": "x"})).unwrap();
    assert!(ignoring.stop.eos_token_ids.is_empty());
    assert_eq!((ignoring.stop.stop_token_ids, ignoring.stop_strings), (vec![5], vec!["x".to_owned()]));
}

#[test]
fn the_context_bounds_the_answer() {
    let plan = plan(json!({"min_tokens": 2})).unwrap();
    assert_eq!(plan.stop_for("prompt", 60, Some(16), 64).unwrap().max_tokens, 4);
    assert_eq!(plan.stop_for("prompt", 60, None, 64).unwrap().max_tokens, 4);
    let param = |result: Result<StopConditions, ApiError>| match result.unwrap_err() {
        ApiError::BadRequest { param, .. } => param.unwrap(),
        other => panic!("{other:?}"),
    };
    assert_eq!(param(plan.stop_for("prompt", 64, Some(16), 64)), "prompt");
    assert_eq!(param(plan.stop_for("prompt", 64, None, 64)), "prompt");
    assert_eq!(param(plan.stop_for("messages", 65, Some(0), 64)), "messages");
    assert_eq!(param(plan.stop_for("prompt", 10, Some(1), 64)), "min_tokens");
}

#[test]
fn a_full_context_can_be_scored() {
    let plan = plan(json!({})).unwrap();
    assert_eq!(plan.stop_for("prompt", 64, Some(0), 64).unwrap().max_tokens, 0);
}

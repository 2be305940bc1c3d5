//! Perplexity as a client measures it, of every scheme that the reference has, against the reference.

use converter::plan::Recipe;
use kernels::mx::{ScaleRounding, Scheme};
use serde_json::{Value, json};

use crate::common::{Server, block_on, converted, data, heldout_windows, rustdoc};

/// The two windows are enough to notice a wrong scheme: they differ from the reference by less than 0.1 %.
const WINDOWS: usize = 2;

/// Summed negative log-likelihood of tokens 1.. of a window, asked for as lm-eval does.
async fn nll(server: &Server, window: &[u32]) -> f64 {
    let answer = server
        .post(
            "/v1/completions",
            &json!({"model": "model", "prompt": [window], "max_tokens": 1, "temperature": 0, "logprobs": 1,
                    "echo": true, "seed": 1234}),
        )
        .await;
    let logprobs = answer["choices"][0]["logprobs"]["token_logprobs"].as_array().expect("log-probabilities");
    assert_eq!(logprobs.len(), window.len() + 1);
    assert!(logprobs[0].is_null());
    -logprobs[1..window.len()].iter().map(|l| l.as_f64().expect("a number")).sum::<f64>()
}

/// The reference's summed nll of the same windows.
fn reference(weight: Option<&str>, activation: Option<&str>, rounding: Option<&str>) -> f64 {
    let text = std::fs::read_to_string(data("golden/ppl_rustdoc_6m.json")).expect("the reference");
    let file: Value = serde_json::from_str(&text).expect("JSON");
    let row = file["schemes"]
        .as_array()
        .expect("schemes")
        .iter()
        .find(|row| {
            row["weight"].as_str() == weight
                && row["activation"].as_str() == activation
                && row["scale_rounding"].as_str() == rounding
        })
        .unwrap_or_else(|| panic!("no reference for {weight:?} {activation:?} {rounding:?}"));
    row["nll"].as_array().expect("nll")[..WINDOWS].iter().map(|v| v.as_f64().expect("a number")).sum()
}

#[track_caller]
fn check(server: &Server, name: &str, expected: f64, tolerance: f64) {
    let windows = heldout_windows(WINDOWS);
    let actual: f64 = block_on(async {
        let mut sum = 0.0;
        for window in &windows {
            sum += nll(server, window).await;
        }
        sum
    });
    let tokens = (WINDOWS * 511) as f64;
    let (actual, expected) = ((actual / tokens).exp(), (expected / tokens).exp());
    let error = (actual / expected - 1.0).abs();
    assert!(error < tolerance, "{name}: perplexity {actual:.3}, reference {expected:.3}");
}

#[test]
fn bf16_is_the_reference() {
    let server = Server::start(&rustdoc(), |_| ());
    check(&server, "bf16", reference(None, None, None), 0.001);
}

#[test]
fn every_scheme_is_within_its_tolerance_of_the_reference() {
    for (name, tolerance) in [
        ("mxint8", 0.002),
        ("mxfp8", 0.002),
        ("mxfp6", 0.002),
        ("mxfp6_e3m2", 0.002),
        ("mxfp4", 0.002),
        ("mxint8:mxint8", 0.01),
        ("w8a8", 0.01),
        ("w6a6", 0.01),
        ("w4a8", 0.01),
        ("w4a6", 0.01),
        ("w4a4", 0.02),
    ] {
        let rounding =
            if name == "mxfp8" || name == "w8a8" { ScaleRounding::Rceil } else { ScaleRounding::Even };
        let scheme: Scheme = name.parse().expect("a scheme");
        let recipe = Recipe { scale_rounding: Some(rounding), ..Recipe::new(scheme) };
        let (_folder, model) = converted(recipe);
        let server = Server::start(&model, |_| ());
        let weight = scheme.weight.format.to_string();
        let activation = scheme.activation.map(|a| a.format.to_string());
        let expected = reference(Some(&weight), activation.as_deref(), Some(rounding.name()));
        check(&server, name, expected, tolerance);
    }
}

//! Perplexity of a real model against the reference of `tests/golden/ppl_rustdoc_6m.json`.

use std::fs;

use crate::common::{Runner, blocks, data};
use kernels::Dtype;
use serde_json::Value;
use tokenizers::Tokenizer;

const WINDOWS: usize = 10;
const WINDOW: usize = 512;

/// The tokens of the first windows of the held-out text.
fn tokens() -> Vec<u32> {
    let tokenizer = Tokenizer::from_file(data("models/rustdoc-6m/tokenizer.json")).unwrap();
    let text = fs::read_to_string(data("models/rustdoc-6m/heldout.txt")).unwrap();
    let mut ids = tokenizer.encode(text, false).unwrap().get_ids().to_vec();
    ids.truncate(WINDOWS * WINDOW);
    assert_eq!(ids.len(), WINDOWS * WINDOW);
    ids
}

/// Summed negative log-likelihood of tokens 1.. of a window.
fn nll(runner: &mut Runner, window: &[u32]) -> f64 {
    let vocab = runner.model.config().vocab_size;
    let logits = runner.sequence(window, WINDOW, &blocks(WINDOW));
    let rows = logits.chunks_exact(vocab).zip(&window[1..]);
    rows.map(|(row, &target)| {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|&x| f64::from(x - max).exp()).sum();
        sum.ln() - f64::from(row[target as usize] - max)
    })
    .sum()
}

#[test]
fn bf16_perplexity_is_the_reference() {
    let golden = fs::read_to_string(data("golden/ppl_rustdoc_6m.json")).unwrap();
    let golden: Value = serde_json::from_str(&golden).unwrap();
    let reference = &golden["schemes"][0];
    assert!(reference["weight"].is_null(), "the first row is BF16");

    let mut runner = Runner::load(&data("models/rustdoc-6m"), Dtype::F32, blocks(WINDOW).len());
    let mut total = 0.0;
    for (window, expected) in tokens().chunks(WINDOW).zip(reference["nll"].as_array().unwrap()) {
        let (actual, expected) = (nll(&mut runner, window), expected.as_f64().unwrap());
        assert!((actual - expected).abs() < 0.01, "window: {actual} nats, reference {expected}");
        total += actual;
    }
    let perplexity = (total / (WINDOWS * (WINDOW - 1)) as f64).exp();
    let expected = reference["perplexity"].as_f64().unwrap();
    assert!((perplexity / expected - 1.0).abs() < 0.002, "perplexity {perplexity}, reference {expected}");
}

//! Perplexity of a real model against the reference of `tests/golden/ppl_rustdoc_6m.json`.

use std::fs;

use kernels::KvCacheDtype;
use kernels::mx::{Cast, ElementType, MxFormat, Scheme};
use serde::Deserialize;
use tokenizers::Tokenizer;

use crate::common::{Runner, blocks, data};
use crate::quantized::{in_a_layer, quantize};

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

/// A row of the reference.
#[derive(Debug, Deserialize)]
struct Reference {
    weight: Option<String>,
    activation: Option<String>,
    scale_rounding: Option<String>,
    perplexity: f64,
    /// Of each window.
    nll: Vec<f64>,
}

impl Reference {
    fn read() -> Vec<Self> {
        #[derive(Deserialize)]
        struct File {
            schemes: Vec<Reference>,
        }
        let text = fs::read_to_string(data("golden/ppl_rustdoc_6m.json")).unwrap();
        serde_json::from_str::<File>(&text).unwrap().schemes
    }

    /// `None` for the unquantized model.
    fn scheme(&self) -> Option<Scheme> {
        let cast = |name: &String| Cast {
            format: name.parse::<MxFormat>().unwrap(),
            scale_rounding: self.scale_rounding.as_ref().unwrap().parse().unwrap(),
        };
        Some(Scheme {
            weight: self.weight.as_ref().map(cast)?,
            activation: self.activation.as_ref().map(cast),
            rotation: None,
        })
    }
}

fn perplexity(nll: &[f64]) -> f64 {
    (nll.iter().sum::<f64>() / (nll.len() * (WINDOW - 1)) as f64).exp()
}

#[test]
fn bf16_perplexity_is_the_reference() {
    let reference = Reference::read().remove(0);
    assert_eq!(reference.scheme(), None);
    let mut runner = Runner::load(&data("models/rustdoc-6m"), KvCacheDtype::F32, blocks(WINDOW).len());
    let actual: Vec<_> = tokens().chunks(WINDOW).map(|window| nll(&mut runner, window)).collect();
    for (actual, expected) in actual.iter().zip(&reference.nll) {
        assert!((actual - expected).abs() < 0.01, "window: {actual} nats, reference {expected}");
    }
    let (actual, expected) = (perplexity(&actual), reference.perplexity);
    assert!((actual / expected - 1.0).abs() < 1e-4, "perplexity {actual}, reference {expected}");
}

#[test]
fn quantized_perplexities_are_the_reference() {
    /// Windows per scheme, so that the whole table takes seconds.
    const SOME: usize = 3;
    let tokens = tokens();
    let mut schemes = 0;
    for reference in Reference::read() {
        let Some(scheme) = reference.scheme() else { continue };
        let dir = quantize(&data("models/rustdoc-6m"), |module| in_a_layer(module).then_some(scheme));
        let mut runner = Runner::load(dir.path(), KvCacheDtype::F32, blocks(WINDOW).len());
        let actual: Vec<_> =
            tokens.chunks(WINDOW).take(SOME).map(|window| nll(&mut runner, window)).collect();
        let off = perplexity(&actual) / perplexity(&reference.nll[..SOME]) - 1.0;
        // Without a declared format activations are rounded to 16-bit block fixed point, if at all. Rounding to the grid of
        // an element turns such differences into its steps.
        let tolerance = match scheme.activation {
            None => 2e-5,
            Some(cast) if cast.format.element == ElementType::E2m1 => 0.01,
            Some(_) => 0.005,
        };
        assert!(off.abs() < tolerance, "{scheme}, {:?}: off by {off}", reference.scale_rounding);
        schemes += 1;
    }
    assert_eq!(schemes, 36);
}

//! Perplexity of windows of a text.

use std::num::NonZeroUsize;

use kernels::{Backend, KvCacheDtype};
use models::Model;
use serde::Serialize;

use super::Windows;
use super::runner::{Group, Runner, Scored};
use super::scores::score;

/// How well a model foretells a text: each window alone, from position 0; every token but the first is scored.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Perplexity {
    /// exp of the mean negative log-likelihood.
    pub perplexity: f64,
    /// The same over the second half of each window alone, where every token has half a window of context or more
    /// (llama.cpp's convention).
    pub perplexity_second_half: f64,
    /// Negative log-likelihood of each window, summed over its scored tokens, in nats.
    pub nll: Vec<f64>,
    /// The same over the second half.
    pub nll_second_half: Vec<f64>,
    /// Tokens scored.
    pub tokens: usize,
}

/// Sums of negative log-likelihoods in the making.
#[derive(Debug)]
pub(super) struct Sums {
    /// From this position on, tokens count for the second half: their logits are all of it.
    half: usize,
    nll: Vec<f64>,
    nll_second_half: Vec<f64>,
    tokens: usize,
    tokens_second_half: usize,
}

impl Sums {
    pub(super) fn new(windows: &Windows) -> Self {
        let zeros = vec![0.0; windows.count()];
        Self {
            half: (windows.length() / 2 + 1).min(windows.length() - 1),
            nll: zeros.clone(),
            nll_second_half: zeros,
            tokens: 0,
            tokens_second_half: 0,
        }
    }

    pub(super) fn add(&mut self, scored: Scored, nll: f64) {
        self.nll[scored.sequence] += nll;
        self.tokens += 1;
        if scored.position >= self.half {
            self.nll_second_half[scored.sequence] += nll;
            self.tokens_second_half += 1;
        }
    }

    pub(super) fn finish(self) -> Perplexity {
        let mean = |nll: &[f64], tokens: usize| (nll.iter().sum::<f64>() / tokens as f64).exp();
        Perplexity {
            perplexity: mean(&self.nll, self.tokens),
            perplexity_second_half: mean(&self.nll_second_half, self.tokens_second_half),
            nll: self.nll,
            nll_second_half: self.nll_second_half,
            tokens: self.tokens,
        }
    }
}

/// Perplexity of `windows` under a loaded model, with keys and values in `kv_cache` and the scores computed on
/// `threads` threads.
///
/// # Errors
/// Out of memory, or a KV cache that the device does not have.
///
/// # Panics
/// A token is beyond the model's vocabulary, or a window longer than its context.
pub fn perplexity(
    backend: &dyn Backend,
    model: &dyn Model,
    windows: &Windows,
    kv_cache: KvCacheDtype,
    threads: NonZeroUsize,
) -> kernels::Result<Perplexity> {
    let groups: Vec<_> = windows.iter().map(Group::alone).collect();
    let mut sums = Sums::new(windows);
    Runner::new(backend, model, kv_cache, &groups)?.run(&groups, &mut |chunk| {
        for (scored, score) in chunk.scored.iter().zip(score(chunk, None, threads)) {
            sums.add(*scored, score.nll);
        }
    });
    Ok(sums.finish())
}

//! How far a model's next-token distributions are from the unquantized model's.

use std::num::NonZeroUsize;

use kernels::{Backend, KvCacheDtype};
use models::Model;
use serde::Serialize;

use super::Windows;
use super::perplexity::{Perplexity, Sums};
use super::runner::{Chunk, Group, LOGIT_ROWS, Runner};
use super::scores::score;

/// Distance of a model's next-token distributions from the baseline's, over all scored tokens.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Divergence {
    /// Mean Kullback-Leibler divergence from the baseline's distribution to the model's, in nats.
    pub kl_mean: f64,
    /// What 99 % of the tokens' divergences do not exceed, in nats.
    pub kl_99th_percentile: f64,
    /// Share of tokens whose most likely successor is the baseline's.
    pub top1_agreement: f64,
}

impl Divergence {
    /// Of the divergences of all tokens, and the number of them with the same most likely successor.
    fn new(mut kl: Vec<f64>, same_top: usize) -> Self {
        let tokens = kl.len() as f64;
        kl.sort_by(f64::total_cmp);
        let rank = (kl.len() * 99).div_ceil(100).saturating_sub(1);
        Self {
            kl_mean: kl.iter().sum::<f64>() / tokens,
            kl_99th_percentile: kl.get(rank).copied().unwrap_or(f64::NAN),
            top1_agreement: same_top as f64 / tokens,
        }
    }
}

/// The model that others are compared with, and its final hidden states for all scored tokens of a text: 4 bytes times
/// the hidden size for each token. Its logits, which take the size of the vocabulary, are made again when needed.
pub struct Baseline<'a> {
    runner: Runner<'a>,
    hidden: Vec<f32>,
}

impl std::fmt::Debug for Baseline<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Baseline").field("tokens", &self.tokens()).finish_non_exhaustive()
    }
}

impl<'a> Baseline<'a> {
    /// Runs the unquantized model over `windows`, with an F32 KV cache.
    ///
    /// # Errors
    /// Out of memory.
    pub fn measure(
        backend: &'a dyn Backend,
        model: &'a dyn Model,
        windows: &Windows,
        threads: NonZeroUsize,
    ) -> kernels::Result<(Self, Perplexity)> {
        let groups: Vec<_> = windows.iter().map(Group::alone).collect();
        let mut runner = Runner::new(backend, model, KvCacheDtype::F32, &groups)?;
        let (scored, hidden) = runner.hidden(&groups);
        let width = runner.hidden_size();
        let mut sums = Sums::new(windows);
        let rows = scored.chunks(LOGIT_ROWS).zip(hidden.chunks(LOGIT_ROWS * width));
        for (index, (scored, hidden)) in rows.enumerate() {
            let logits = runner.logits_of(hidden);
            let chunk = Chunk { first: index * LOGIT_ROWS, scored, logits };
            for (scored, score) in scored.iter().zip(score(&chunk, None, threads)) {
                sums.add(*scored, score.nll);
            }
        }
        Ok((Self { runner, hidden }, sums.finish()))
    }

    /// Number of scored tokens.
    fn tokens(&self) -> usize {
        self.hidden.len() / self.runner.hidden_size()
    }

    /// The logits of `count` scored tokens from `first` on.
    fn logits(&mut self, first: usize, count: usize) -> &[f32] {
        let width = self.runner.hidden_size();
        self.runner.logits_of(&self.hidden[first * width..][..count * width])
    }
}

/// Perplexity of `windows` under a loaded model with keys and values in `kv_cache`, and its distance from `baseline`,
/// which was measured on the same windows.
///
/// # Errors
/// Out of memory, or a KV cache that the device does not have.
///
/// # Panics
/// The baseline has other windows or another vocabulary, a token is beyond it, or a window longer than the context.
pub fn divergence(
    backend: &dyn Backend,
    model: &dyn Model,
    windows: &Windows,
    kv_cache: KvCacheDtype,
    baseline: &mut Baseline<'_>,
    threads: NonZeroUsize,
) -> kernels::Result<(Perplexity, Divergence)> {
    let groups: Vec<_> = windows.iter().map(Group::alone).collect();
    let mut sums = Sums::new(windows);
    let (mut kl, mut same_top) = (Vec::new(), 0);
    assert_eq!(baseline.tokens(), windows.count() * (windows.length() - 1), "the baseline has other windows");
    Runner::new(backend, model, kv_cache, &groups)?.run(&groups, &mut |chunk| {
        let theirs = baseline.logits(chunk.first, chunk.scored.len());
        assert_eq!(theirs.len(), chunk.logits.len(), "the baseline has another vocabulary");
        for (scored, score) in chunk.scored.iter().zip(score(chunk, Some(theirs), threads)) {
            sums.add(*scored, score.nll);
            if let Some(distance) = score.distance {
                kl.push(distance.kl);
                same_top += usize::from(distance.same_top);
            }
        }
    });
    Ok((sums.finish(), Divergence::new(kl, same_top)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_the_nearest_rank() {
        let divergence = Divergence::new((1..=200).rev().map(f64::from).collect(), 50);
        assert_eq!((divergence.kl_mean, divergence.kl_99th_percentile), (100.5, 198.0));
        assert_eq!(divergence.top1_agreement, 0.25);
        assert_eq!(Divergence::new(vec![3.0], 1).kl_99th_percentile, 3.0);
    }
}

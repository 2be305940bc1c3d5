//! Runs one test on a loaded model.

use std::time::Instant;

use super::plan::Test;
use crate::engine::OfflineBatch;

/// The seconds that each repetition of `test` took. A test that is warmed up runs once before, generations only for
/// one token.
pub(super) fn repeat(offline: &mut OfflineBatch, test: Test, repetitions: usize, warmup: bool) -> Vec<f64> {
    if warmup {
        run(offline, Test { generated: test.generated.min(1), ..test });
    }
    (0..repetitions).map(|_| run(offline, test)).collect()
}

/// Seconds of one run.
fn run(offline: &mut OfflineBatch, test: Test) -> f64 {
    let Test { batch, depth, prompt, generated } = test;
    let vocab = offline.model().config().vocab_size;
    // With no prompt, generation begins with one known token.
    let known = depth + prompt.max(1);
    offline.start(&prompts(batch, known, vocab));
    offline.prefill(depth);
    let start = Instant::now();
    if prompt > 0 {
        offline.prefill(known);
    }
    (0..generated).for_each(|_| offline.decode());
    start.elapsed().as_secs_f64()
}

/// Random prompts, the same in every repetition.
fn prompts(count: usize, tokens: usize, vocab: usize) -> Vec<Vec<u32>> {
    let mut random = fastrand::Rng::with_seed(tokens as u64);
    let prompt = |_| (0..tokens).map(|_| random.u32(..vocab as u32)).collect();
    (0..count).map(prompt).collect()
}

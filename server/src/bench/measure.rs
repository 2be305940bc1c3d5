//! Runs one test on a loaded model.

use std::time::Instant;

use kernels::PlainRead;

use super::plan::Test;
use crate::engine::OfflineBatch;

/// What the repetitions of a test took.
#[derive(Debug, Default)]
pub(super) struct Runs {
    pub(super) seconds: Vec<f64>,
    /// Bytes per second of plain reads, one before the first run and one after each.
    pub(super) reads: Vec<f64>,
}

/// Runs `test`, `repetitions` times; where it only generates, with plain reads between the runs: what memory gives on a
/// shared machine is not the same every minute. A test that is warmed up runs once before, generations only for one token.
pub(super) fn repeat(
    offline: &mut OfflineBatch,
    test: Test,
    repetitions: usize,
    warmup: bool,
    plain_read: Option<&PlainRead>,
) -> Runs {
    if warmup {
        run(offline, Test { generated: test.generated.min(1), ..test });
    }
    let plain_read = plain_read.filter(|_| test.only_generates());
    let mut runs = Runs::default();
    runs.reads.extend(plain_read.map(PlainRead::bytes_per_sec));
    for _ in 0..repetitions {
        runs.seconds.push(run(offline, test));
        runs.reads.extend(plain_read.map(PlainRead::bytes_per_sec));
    }
    runs
}

/// Seconds of one run.
fn run(offline: &mut OfflineBatch, test: Test) -> f64 {
    let Test { batch, depth, prompt, generated } = test;
    let vocab = offline.model().config().vocab_size;
    // With no prompt, generation begins with one known token.
    let known = depth + prompt.max(1);
    offline.start(&prompts(batch, known, vocab));
    offline.prefill(depth);
    // A device may still be at it.
    offline.wait();
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

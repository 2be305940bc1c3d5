//! Drawing tokens, log-probabilities.

use kernels::{Backend, Component, Dtype, SampleParams};

use crate::common::{Devices, Random, assert_close, floats};

const GREEDY: SampleParams =
    SampleParams { temperature: 0.0, top_k: None, top_p: 1.0, min_p: 0.0, seed: 0, draw: 0 };

fn sample(backend: &dyn Backend, logits: &[f32], width: usize, params: &[SampleParams]) -> Vec<u32> {
    let logits = floats(backend, Dtype::F32, logits);
    let mut out = backend.alloc(Dtype::U32, params.len(), Component::Workspace).expect("memory");
    backend.write_u32(&mut out, 0, &vec![u32::MAX; params.len()]);
    backend.sample(&logits, width, params, &mut out);
    let mut tokens = vec![0; params.len()];
    backend.read_u32(&out, 0, &mut tokens);
    tokens
}

/// Logits with a tail, of several kinds: plain, with many equals, with masked tokens, all equal.
fn logits(random: &mut Random, kind: usize, len: usize) -> Vec<f32> {
    let mut one = || {
        let x = (random.next() + random.next() + random.next()) * 4.0;
        match kind {
            0 => x,
            1 => x.round(),
            2 if random.below(4) == 0 => f32::NEG_INFINITY,
            2 if random.below(100) == 0 => f32::NAN,
            2 => x,
            _ => 0.25,
        }
    };
    (0..len).map(|_| one()).collect()
}

#[test]
fn draws_are_those_of_the_cpu() {
    let Some(Devices { gpu, cpu }) = Devices::open() else { return };
    let mut random = Random(11);
    let (mut drawn, mut different) = (0, 0);
    for width in [1, 2, 31, 257, 1000, 49_152, 128_256, 151_936] {
        for kind in 0..4 {
            let rows = if width < 50_000 { 32 } else { 8 };
            let logits = logits(&mut random, kind, rows * width);
            let params: Vec<SampleParams> = (0..rows)
                .map(|_| SampleParams {
                    temperature: random.pick(&[0.0, 0.3, 0.7, 1.0, 2.5]),
                    top_k: random.pick(&[None, Some(1), Some(5), Some(50), Some(200_000)]),
                    top_p: random.pick(&[1.0, 0.95, 0.5, 0.01]),
                    min_p: random.pick(&[0.0, 0.0, 0.05]),
                    seed: random.bits(),
                    draw: random.bits() % 1000,
                })
                .collect();
            let (expected, actual) =
                (sample(&*cpu, &logits, width, &params), sample(&*gpu, &logits, width, &params));
            assert_eq!(actual, sample(&*gpu, &logits, width, &params), "twice the same");
            let middle = rows / 2;
            let alone = sample(&*gpu, &logits[middle * width..][..width], width, &params[middle..=middle]);
            assert_eq!(alone[0], actual[middle], "a row alone, {width} tokens");
            drawn += rows;
            different += expected.iter().zip(&actual).filter(|(e, a)| e != a).count();
            for ((e, a), p) in expected.iter().zip(&actual).zip(&params) {
                assert!(p.temperature > 0.0 || e == a, "greedy takes {e}, not {a}");
            }
        }
    }
    // The last bit of an exponential may put a token on the other side of a threshold.
    assert!(different * 300 <= drawn, "{different} of {drawn} draws differ");
}

#[test]
fn the_lowest_id_wins_and_nan_never() {
    let Some(Devices { gpu, .. }) = Devices::open() else { return };
    let width = 128_256;
    let mut rows = vec![-1.0; 5 * width];
    let [a, b, c, d, e] = [0, 1, 2, 3, 4].map(|row| row * width);
    (rows[a + 70_000], rows[a + 100_000]) = (3.0, 3.0);
    (rows[b + 5], rows[b + 6]) = (f32::NAN, 9.0);
    rows[c..d].fill(f32::NAN);
    (rows[d + 9], rows[d + 8]) = (f32::INFINITY, 1.0);
    rows[e..].fill(f32::NEG_INFINITY);
    assert_eq!(sample(&*gpu, &rows, width, &[GREEDY; 5]), [70_000, 6, 0, 9, 0]);
}

#[test]
fn kept_tokens_are_drawn_as_often_as_they_are_likely() {
    let Some(Devices { gpu, .. }) = Devices::open() else { return };
    let probabilities = [0.1_f32, 0.4, 0.05, 0.25, 0.2];
    let draws = 4000;
    let logits: Vec<f32> = (0..draws).flat_map(|_| probabilities.map(f32::ln)).collect();
    let params: Vec<SampleParams> = (0..draws as u64)
        .map(|draw| SampleParams { temperature: 1.0, top_p: 0.8, seed: 5, draw, ..GREEDY })
        .collect();
    let mut counts = [0_u32; 5];
    for token in sample(&*gpu, &logits, 5, &params) {
        counts[token as usize] += 1;
    }
    assert_eq!((counts[0], counts[2]), (0, 0), "0.4 + 0.25 + 0.2 are enough");
    for (token, expected) in [(1, 0.4 / 0.85), (3, 0.25 / 0.85), (4, 0.2 / 0.85)] {
        let share = counts[token] as f32 / draws as f32;
        assert!((share - expected).abs() < 0.03, "token {token}: {share}, not {expected}");
    }
}

#[test]
fn logprobs_are_those_of_the_cpu() {
    let Some(Devices { gpu, cpu }) = Devices::open() else { return };
    let mut random = Random(12);
    for (width, top) in [(1, 3), (31, 5), (1000, 0), (49_152, 20), (128_256, 5)] {
        for kind in [0, 1, 3] {
            let logits = logits(&mut random, kind, 6 * width);
            let rows = [0, 5, 5, 2];
            let targets: Vec<u32> = rows.iter().map(|_| random.below(width) as u32).collect();
            let run = |backend: &dyn Backend| {
                backend.logprobs(&floats(backend, Dtype::F32, &logits), width, &rows, &targets, top)
            };
            for (actual, expected) in run(&*gpu).into_iter().zip(run(&*cpu)) {
                assert_eq!(actual.rank, expected.rank, "{width} tokens");
                let ids = |top: &[(u32, f32)]| -> Vec<u32> { top.iter().map(|&(id, _)| id).collect() };
                assert_eq!(ids(&actual.top), ids(&expected.top), "{width} tokens");
                let values = |top: &[(u32, f32)]| -> Vec<f32> { top.iter().map(|&(_, x)| x).collect() };
                assert_close(&values(&actual.top), &values(&expected.top), 1e-5, 1e-5, "top");
                assert_close(&[actual.logprob], &[expected.logprob], 1e-5, 1e-5, "target");
            }
        }
    }
    let logits = floats(&*gpu, Dtype::F32, &[0.0, f32::NAN, 1.0]);
    assert!(gpu.logprobs(&logits, 3, &[0], &[2], 0)[0].logprob.is_nan(), "NaN is passed on");
}

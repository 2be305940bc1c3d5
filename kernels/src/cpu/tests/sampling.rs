//! Draws and log-probabilities.

use super::*;
use crate::cpu::sampling::{exp_of, uniform};

#[test]
fn log_probabilities_equal_their_definition() {
    for backend in backends() {
        for width in [5, 16, 1000] {
            let logits: Vec<f32> = Random(7).vec(2 * width).iter().map(|v| v * 12.0).collect();
            let buffer = upload_f32(&backend, &logits);
            let targets = [3, width as u32 - 1];
            let out = backend.logprobs(&buffer, width, &[1, 0], &targets, 3);
            for (row, (actual, target)) in [1, 0].into_iter().zip(out.iter().zip(targets)) {
                let expected = reference::log_softmax(&logits[row * width..][..width]);
                let own = expected[target as usize];
                assert!((actual.logprob - own).abs() < 2e-5, "{} is not {own}", actual.logprob);
                let mut order: Vec<usize> = (0..width).collect();
                order.sort_by(|&a, &b| expected[b].total_cmp(&expected[a]));
                assert_eq!(order[actual.rank as usize - 1], target as usize);
                assert_eq!(actual.top.len(), 3);
                for ((id, logprob), &best) in actual.top.iter().zip(&order) {
                    assert_eq!(*id as usize, best);
                    assert!((logprob - expected[best]).abs() < 2e-5);
                }
            }
        }
    }
}

fn draw(backend: &CpuBackend, logits: &[f32], params: SampleParams) -> u32 {
    let mut out = backend.alloc(Dtype::U32, 1, Component::Workspace).unwrap();
    backend.sample(&upload_f32(backend, logits), logits.len(), &[params], &mut out);
    let mut token = [0];
    backend.read_u32(&out, 0, &mut token);
    token[0]
}

const PLAIN: SampleParams =
    SampleParams { temperature: 1.0, top_k: None, top_p: 1.0, min_p: 0.0, seed: 1, draw: 0 };

#[test]
fn sampling_follows_the_distribution_and_its_restrictions() {
    let probabilities = [0.05_f32, 0.4, 0.2, 0.3, 0.04, 0.01];
    let logits: Vec<f32> = probabilities.iter().map(|p| p.ln()).collect();
    for backend in backends() {
        let count = |params: SampleParams| {
            let mut counts = [0_usize; 6];
            for draw_index in 0..4000 {
                counts[draw(&backend, &logits, SampleParams { draw: draw_index, ..params }) as usize] += 1;
            }
            counts
        };
        let free = count(PLAIN);
        for (c, p) in free.iter().zip(probabilities) {
            let sd = (4000.0 * p * (1.0 - p)).sqrt();
            assert!((*c as f32 - 4000.0 * p).abs() < 5.0 * sd, "{free:?}");
        }
        for temperature in [0.5_f32, 2.0] {
            let weights = probabilities.map(|p| p.powf(1.0 / temperature));
            let total: f32 = weights.iter().sum();
            for (c, w) in count(SampleParams { temperature, ..PLAIN }).iter().zip(weights) {
                let p = w / total;
                let sd = (4000.0 * p * (1.0 - p)).sqrt();
                assert!((*c as f32 - 4000.0 * p).abs() < 5.0 * sd, "temperature {temperature}");
            }
        }
        let kept = |params| count(params).map(|c| c > 0);
        assert_eq!(kept(SampleParams { top_k: Some(2), ..PLAIN }), [false, true, false, true, false, false]);
        assert_eq!(kept(SampleParams { top_p: 0.65, ..PLAIN }), [false, true, false, true, false, false]);
        assert_eq!(kept(SampleParams { top_p: 0.75, ..PLAIN }), [false, true, true, true, false, false]);
        assert_eq!(kept(SampleParams { min_p: 0.45, ..PLAIN }), [false, true, true, true, false, false]);
        assert_eq!(
            kept(SampleParams { top_k: Some(3), top_p: 0.7, ..PLAIN }),
            [false, true, false, true, false, false]
        );
        assert_eq!(draw(&backend, &logits, SampleParams { temperature: 0.0, ..PLAIN }), 1);
        assert_eq!(draw(&backend, &[2.0, 5.0, 5.0], SampleParams { temperature: 0.0, ..PLAIN }), 1);
        let masked = [f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY];
        assert!((0..200).all(|d| draw(&backend, &masked, SampleParams { draw: d, ..PLAIN }) == 1));
        assert_eq!(draw(&backend, &logits, PLAIN), draw(&backend, &logits, PLAIN));
    }
}

/// The definition of a draw: weights as integers, restrictions one after the other over the sorted tokens.
fn defined_draw(logits: &[f32], params: SampleParams) -> u32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut weights = vec![0.0; logits.len()];
    // SAFETY: plain Rust is always available.
    unsafe { exp_of(Isa::Portable, logits, max, 1.0 / params.temperature, &mut weights) };
    let mut tokens: Vec<(f32, usize)> = weights.into_iter().zip(0..).collect();
    tokens.retain(|&(_, id)| logits[id] > f32::NEG_INFINITY);
    tokens.sort_by(|a, b| b.0.total_cmp(&a.0));
    tokens.truncate(params.top_k.unwrap_or(u32::MAX) as usize);
    let units = |weight: f32| (f64::from(weight) * 2.0_f64.powi(44)).round_ties_even() as u64;
    let total = |tokens: &[(f32, usize)]| tokens.iter().map(|t| units(t.0)).sum::<u64>();
    if params.top_p < 1.0 {
        let enough = (f64::from(params.top_p) * total(&tokens) as f64).ceil() as u64;
        let count = (1..=tokens.len()).find(|&n| total(&tokens[..n]) >= enough.max(1));
        tokens.truncate(count.unwrap_or(tokens.len()));
    }
    tokens.retain(|t| t.0 >= params.min_p);
    tokens.sort_by_key(|t| t.1);
    let target = (uniform(params.seed, params.draw) * total(&tokens) as f64) as u64;
    let drawn = (1..=tokens.len()).find(|&n| total(&tokens[..n]) > target);
    tokens[drawn.expect("the target is below the total") - 1].1 as u32
}

#[test]
fn draws_are_those_of_the_definition_on_every_instruction_set() {
    let mut random = Random(11);
    for width in [1, 7, 256, 257, 1003] {
        let mut logits: Vec<f32> = random.vec(width).iter().map(|v| (v * 40.0).round() * 0.25).collect();
        if width > 7 {
            logits[3] = f32::NEG_INFINITY;
            logits[5] = f32::NAN;
        }
        for (i, (top_k, top_p, min_p)) in [
            (None, 1.0, 0.0),
            (None, 1.0, 0.1),
            (Some(1), 1.0, 0.0),
            (Some(40), 1.0, 0.0),
            (Some(40), 0.8, 0.05),
            (None, 0.9, 0.0),
            (None, 1e-6, 0.0),
            (None, 0.999_999, 0.0),
        ]
        .into_iter()
        .enumerate()
        {
            for draw_index in 0..12 {
                let temperature = [0.3, 1.0, 5.0][draw_index % 3];
                let params = SampleParams {
                    temperature,
                    top_k,
                    top_p,
                    min_p,
                    seed: i as u64,
                    draw: draw_index as u64,
                };
                let defined = defined_draw(&logits, params);
                for backend in backends() {
                    assert_eq!(draw(&backend, &logits, params), defined, "{width} tokens, {params:?}");
                }
            }
        }
    }
}

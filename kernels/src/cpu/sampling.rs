//! Drawing tokens and log-probabilities from logits.

use super::simd::{LANES, Lanes, dispatch};
use crate::backend::{SampleParams, TokenLogprobs};
use crate::isa::Isa;

/// Sum of e^(x - max) over the row: lanes in order, then as a tree.
#[inline(always)]
unsafe fn sum_exp_row<L: Lanes>(row: &[f32], max: f32) -> f32 {
    // SAFETY: whole vectors are inside the row.
    unsafe {
        let mut sum = L::splat(0.0);
        let (vectors, rest) = row.as_chunks::<LANES>();
        for v in vectors {
            sum = sum.add(L::load(v.as_ptr()).sub(L::splat(max)).exp());
        }
        if !rest.is_empty() {
            let mut padded = [0.0; LANES];
            padded[..rest.len()].copy_from_slice(rest);
            let v = L::load(padded.as_ptr()).sub(L::splat(max)).exp();
            sum = sum.add(v.keep(0, rest.len(), 0.0));
        }
        sum.reduce_add()
    }
}

/// `weights[i] = e^((row[i] - max) * inverse_temperature)`.
#[inline(always)]
unsafe fn exp_row<L: Lanes>(row: &[f32], max: f32, inverse_temperature: f32, weights: &mut [f32]) {
    // SAFETY: vectors are copied through arrays of their size.
    unsafe {
        for (x, out) in row.chunks(LANES).zip(weights.chunks_mut(LANES)) {
            let mut padded = [f32::NEG_INFINITY; LANES];
            padded[..x.len()].copy_from_slice(x);
            let v = L::load(padded.as_ptr()).sub(L::splat(max)).mul(L::splat(inverse_temperature)).exp();
            out.copy_from_slice(&v.to_array()[..x.len()]);
        }
    }
}

#[inline(always)]
unsafe fn max_row<L: Lanes>(row: &[f32]) -> f32 {
    // SAFETY: whole vectors are inside the row.
    unsafe {
        let (vectors, rest) = row.as_chunks::<LANES>();
        let mut max = L::splat(f32::NEG_INFINITY);
        for v in vectors {
            max = L::load(v.as_ptr()).max(max);
        }
        rest.iter().fold(max.reduce_max(), |a, &b| a.max(b))
    }
}

dispatch! {
    /// Sum of e^(x - max).
    fn sum_exp(row: &[f32], max: f32) -> f32 = sum_exp_row
}
dispatch! {
    /// e^((x - max) / temperature) of every logit.
    fn exp_all(row: &[f32], max: f32, inverse_temperature: f32, weights: &mut [f32]) = exp_row
}
dispatch! {
    /// Largest logit that is a number; negative infinity if there is none.
    fn max_of(row: &[f32]) -> f32 = max_row
}

/// A uniform number in [0, 1) that depends on (seed, draw) alone: two rounds of SplitMix64's finalizer.
fn uniform(seed: u64, draw: u64) -> f64 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    let z =
        mix(mix(seed.wrapping_add(0x9E37_79B9_7F4A_7C15))
            .wrapping_add(draw.wrapping_mul(0x9E37_79B9_7F4A_7C15)));
    (z >> 11) as f64 / (1_u64 << 53) as f64
}

/// Lowest index of the largest value; NaN is no value.
fn argmax(isa: Isa, row: &[f32]) -> u32 {
    // SAFETY: `isa` is available.
    let max = unsafe { max_of(isa, row) };
    row.iter().position(|&x| x == max).unwrap_or(0) as u32
}

/// Draws tokens; holds the memory that this takes.
#[derive(Debug, Default)]
pub(crate) struct Sampler {
    /// e^((logit - max) / temperature), zero for tokens that are dropped.
    weights: Vec<f32>,
    /// Tokens that may be kept.
    candidates: Vec<(f32, u32)>,
}

impl Sampler {
    /// Draws a token from one row of logits.
    ///
    /// Tokens are kept by top-k, then top-p, then min-p, most likely first and lower ids first among equals; the draw
    /// runs over the kept tokens in order of id.
    pub(crate) fn sample(&mut self, isa: Isa, row: &[f32], params: &SampleParams) -> u32 {
        if params.temperature <= 0.0 {
            return argmax(isa, row);
        }
        self.weights.resize(row.len(), 0.0);
        // SAFETY: `isa` is available.
        unsafe {
            let max = max_of(isa, row);
            if !max.is_finite() {
                return argmax(isa, row);
            }
            exp_all(isa, row, max, 1.0 / params.temperature, &mut self.weights);
        }
        // A masked logit is -inf: never drawn, where the exponential's clamp would leave it a trace.
        for (weight, &x) in self.weights.iter_mut().zip(row) {
            if x == f32::NEG_INFINITY || x.is_nan() {
                *weight = 0.0;
            }
        }
        self.restrict(params);
        let total: f64 = self.weights.iter().map(|&w| f64::from(w)).sum();
        let target = uniform(params.seed, params.draw) * total;
        let mut cumulative = 0.0;
        let mut last = 0;
        for (id, &weight) in self.weights.iter().enumerate() {
            if weight > 0.0 {
                cumulative += f64::from(weight);
                last = id;
                if cumulative > target {
                    break;
                }
            }
        }
        last as u32
    }

    /// Sets the weights of tokens that top-k, top-p and min-p drop to zero. The largest weight is 1.
    fn restrict(&mut self, params: &SampleParams) {
        let Self { weights, candidates: kept } = self;
        let vocabulary = weights.len();
        let top_k = params.top_k.map_or(vocabulary, |k| k as usize);
        if top_k >= vocabulary && params.top_p >= 1.0 {
            weights.iter_mut().filter(|w| **w < params.min_p).for_each(|w| *w = 0.0);
            return;
        }
        // Tokens below (1 - top_p) / V of the total add up to less than 1 - top_p: top-p never needs them.
        let total: f64 = weights.iter().map(|&w| f64::from(w)).sum();
        let unneeded = if top_k >= vocabulary {
            ((1.0 - f64::from(params.top_p)) * total / vocabulary as f64) as f32
        } else {
            0.0
        };
        kept.clear();
        kept.extend(
            (0..).zip(weights.iter()).filter(|&(_, &w)| w > 0.0 && w >= unneeded).map(|(id, &w)| (w, id)),
        );
        let order = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if top_k < kept.len() {
            kept.select_nth_unstable_by(top_k, order);
            kept.truncate(top_k);
        }
        kept.sort_unstable_by(order);
        if params.top_p < 1.0 {
            // Top-p is of the probability that top-k left.
            let total: f64 =
                if top_k < vocabulary { kept.iter().map(|&(w, _)| f64::from(w)).sum() } else { total };
            let enough = f64::from(params.top_p) * total;
            let mut sum = 0.0;
            let last = kept.iter().position(|&(w, _)| {
                sum += f64::from(w);
                sum >= enough
            });
            kept.truncate(last.map_or(kept.len(), |last| last + 1));
        }
        weights.fill(0.0);
        for &(w, id) in kept.iter().filter(|&&(w, _)| w >= params.min_p) {
            weights[id as usize] = w;
        }
    }
}

/// Log-probabilities of `target` and of the `top` most likely tokens.
pub(crate) fn logprobs(isa: Isa, row: &[f32], target: u32, top: usize) -> TokenLogprobs {
    // SAFETY: `isa` is available.
    let log_sum = unsafe {
        let max = max_of(isa, row);
        max + sum_exp(isa, row, max).ln()
    };
    let own = row[target as usize];
    let better = |id: usize, x: f32| x > own || (x == own && id < target as usize);
    let rank = row.iter().enumerate().filter(|&(id, &x)| better(id, x)).count() as u32 + 1;
    // A short sorted list: `top` is at most a few dozen.
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(top + 1);
    for (id, &x) in row.iter().enumerate() {
        if best.len() < top || best.last().is_some_and(|&(_, worst)| x > worst) {
            let at = best.partition_point(|&(_, b)| b >= x);
            best.insert(at, (id as u32, x));
            best.truncate(top);
        }
    }
    best.iter_mut().for_each(|(_, x)| *x -= log_sum);
    TokenLogprobs { logprob: own - log_sum, rank, top: best }
}

#[cfg(test)]
dispatch! {
    /// e^(x - max) of a row, for tests of the exponential.
    pub(crate) fn exp_of(row: &[f32], max: f32, inverse_temperature: f32, out: &mut [f32]) = exp_row
}

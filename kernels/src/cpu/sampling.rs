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

/// `weights[i] = e^((row[i] - max) * inverse_temperature)`, 0 where the logit is NaN or negative infinity: the
/// exponential's clamp would leave a masked token a trace.
#[inline(always)]
unsafe fn exp_row<L: Lanes>(row: &[f32], max: f32, inverse_temperature: f32, weights: &mut [f32]) {
    // SAFETY: vectors are copied through arrays of their size.
    unsafe {
        for (x, out) in row.chunks(LANES).zip(weights.chunks_mut(LANES)) {
            let mut padded = [f32::NEG_INFINITY; LANES];
            padded[..x.len()].copy_from_slice(x);
            let v = L::load(padded.as_ptr()).sub(L::splat(max)).mul(L::splat(inverse_temperature)).exp();
            for (out, (weight, &x)) in out.iter_mut().zip(v.to_array().into_iter().zip(x)) {
                *out = if x > f32::NEG_INFINITY { weight } else { 0.0 };
            }
        }
    }
}

/// A weight in [0, 1] in units of 2^-44, ties to even: sums of integers need no order, and those of 2^19 tokens fit.
#[inline(always)]
fn units(weight: f32) -> u64 {
    /// Its last bit is a unit.
    const MAGIC: f64 = 384.0;
    (f64::from(weight) + MAGIC).to_bits() - MAGIC.to_bits()
}

/// Sum of the weights' units; plain code, compiled for each instruction set.
#[inline(always)]
unsafe fn sum_units_row<L: Lanes>(weights: &[f32]) -> u64 {
    weights.iter().map(|&weight| units(weight)).fold(0, u64::wrapping_add)
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
    /// Sum of the weights' [`units`].
    fn sum_units(weights: &[f32]) -> u64 = sum_units_row
}
dispatch! {
    /// Largest logit that is a number; negative infinity if there is none.
    fn max_of(row: &[f32]) -> f32 = max_row
}

/// A uniform number in [0, 1) that depends on (seed, draw) alone: two rounds of SplitMix64's finalizer.
pub(crate) fn uniform(seed: u64, draw: u64) -> f64 {
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

/// Tokens that [`Sampler::draw`] skips at once.
const CHUNK: usize = 256;

/// Draws tokens; holds the memory that this takes.
#[derive(Debug, Default)]
pub(crate) struct Sampler {
    /// e^((logit - max) / temperature), zero for tokens that are masked.
    weights: Vec<f32>,
    /// Tokens that top-k and top-p keep.
    kept: Vec<(f32, u32)>,
}

impl Sampler {
    /// Draws a token from one row of logits.
    ///
    /// Tokens are kept by top-k, then top-p, then min-p, most likely first and lower ids first among equals; the draw
    /// runs over the kept tokens in order of id.
    pub(crate) fn sample(&mut self, isa: Isa, row: &[f32], params: &SampleParams) -> u32 {
        // SAFETY: `isa` is available.
        let max = unsafe { max_of(isa, row) };
        if params.temperature <= 0.0 || !max.is_finite() {
            return argmax(isa, row);
        }
        self.weights.resize(row.len(), 0.0);
        // SAFETY: `isa` is available.
        unsafe { exp_all(isa, row, max, 1.0 / params.temperature, &mut self.weights) };
        let top_k = params.top_k.map_or(row.len(), |k| k as usize);
        if top_k < row.len() || params.top_p < 1.0 {
            self.keep(isa, top_k, params.top_p);
            self.kept.retain(|&(weight, _)| weight >= params.min_p);
            self.kept.sort_unstable_by_key(|&(_, id)| id);
            return self.draw_kept(params);
        }
        if params.min_p > 0.0 {
            self.weights.iter_mut().for_each(|w| *w = if *w < params.min_p { 0.0 } else { *w });
        }
        self.draw(isa, params)
    }

    /// Fills `kept` with the `top_k` most likely tokens, and of these with the shortest run that has `top_p` of their
    /// probability.
    fn keep(&mut self, isa: Isa, top_k: usize, top_p: f32) {
        let Self { weights, kept } = self;
        let all = top_k >= weights.len();
        // SAFETY: `isa` is available.
        let total = if all { unsafe { sum_units(isa, weights) } } else { 0 };
        // Tokens below (1 - top_p) / V of the total add up to less than 1 - top_p: top-p never needs them. Half of it, for
        // what is rounded.
        let unneeded = 0.5 * (1.0 - f64::from(top_p)) * total as f64 / weights.len() as f64;
        let unneeded = (unneeded / (1_u64 << 44) as f64) as f32;
        kept.clear();
        kept.extend(
            (0..).zip(weights.iter()).filter(|&(_, &w)| w > 0.0 && w >= unneeded).map(|(id, &w)| (w, id)),
        );
        let order = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if top_k < kept.len() {
            kept.select_nth_unstable_by(top_k, order);
            kept.truncate(top_k);
        }
        if top_p < 1.0 {
            kept.sort_unstable_by(order);
            let total = if all { total } else { kept.iter().map(|&(w, _)| units(w)).sum() };
            let enough = ((f64::from(top_p) * total as f64).ceil() as u64).max(1);
            let mut sum = 0;
            let last = kept.iter().position(|&(w, _)| {
                sum += units(w);
                sum >= enough
            });
            kept.truncate(last.map_or(kept.len(), |last| last + 1));
        }
    }

    /// Draws one of the kept tokens, which are in order of id.
    fn draw_kept(&self, params: &SampleParams) -> u32 {
        let target = target(params, self.kept.iter().map(|&(w, _)| units(w)).sum());
        let mut sum = 0;
        let drawn = self.kept.iter().find(|&&(w, _)| {
            sum += units(w);
            sum > target
        });
        drawn.map_or(0, |&(_, id)| id)
    }

    /// Draws one of all tokens.
    fn draw(&self, isa: Isa, params: &SampleParams) -> u32 {
        // SAFETY: `isa` is available.
        let sum_of = |weights: &[f32]| unsafe { sum_units(isa, weights) };
        let target = target(params, sum_of(&self.weights));
        let mut sum = 0;
        for (chunk, weights) in self.weights.chunks(CHUNK).enumerate() {
            let chunk_sum = sum_of(weights);
            if sum + chunk_sum <= target {
                sum += chunk_sum;
                continue;
            }
            let drawn = weights.iter().position(|&w| {
                sum += units(w);
                sum > target
            });
            return (chunk * CHUNK + drawn.unwrap_or(0)) as u32;
        }
        0
    }
}

/// Where in a total of `total` units the draw of `params` falls: below it, unless it is 0.
fn target(params: &SampleParams, total: u64) -> u64 {
    ((uniform(params.seed, params.draw) * total as f64) as u64).min(total.saturating_sub(1))
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

//! Every operator as a plain loop: what the backends are held to.
//!
//! Matrices are row-major slices. Sums run in the order in which the loops read; a fused multiply-add is written
//! `mul_add`. Backends may order sums otherwise and say so; the CPU backend's `linear` follows this one bit for bit.

use half::bf16;

use crate::backend::Heads;
use crate::kv_cache_dtype::KvCacheDtype;
use crate::mx::{E8m0, quantize_block};

/// How the products of a block of 32 along K are summed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockSum {
    /// In F32, in order: `s = fma(w[k], x[k], s)`. For weights that are no integers: MXFP8, E3M2, dense ones.
    Chained,
    /// Exactly, then rounded to F32 once. For weights whose elements are integers times a power of two, with activations
    /// that are such integers too: those of a declared MX format, or [`block_fixed_point`].
    Exact,
}

/// `out[m, n] = sum_k x[m, k] * w[n, k] + bias[n]` of `[M, K]` and `[N, K]`: in blocks of 32 along K, elements first
/// and one scale per block (`scales` `[N, K / 32]`), or without scales for a dense weight.
pub fn linear(
    sum: BlockSum,
    x: &[f32],
    elements: &[f32],
    scales: Option<&[f32]>,
    bias: Option<&[f32]>,
    [rows, cols]: [usize; 2],
) -> Vec<f32> {
    let blocks = cols.div_ceil(32);
    let mut out = Vec::with_capacity(x.len() / cols * rows);
    for x in x.chunks_exact(cols) {
        for (n, w) in elements.chunks_exact(cols).enumerate() {
            let mut total = 0.0_f32;
            for (b, (w, x)) in w.chunks(32).zip(x.chunks(32)).enumerate() {
                let pairs = w.iter().zip(x);
                let s = match sum {
                    BlockSum::Chained => pairs.fold(0.0, |s, (w, x)| w.mul_add(*x, s)),
                    // 8 and 16 bits, 32 products: F64 holds every partial sum.
                    BlockSum::Exact => pairs.fold(0.0, |s, (w, x)| s + f64::from(*w) * f64::from(*x)) as f32,
                };
                total = match scales {
                    Some(scales) => s.mul_add(scales[n * blocks + b], total),
                    None => total + s,
                };
            }
            out.push(bias.map_or(total, |bias| total + bias[n]));
        }
    }
    out
}

/// Activations in 16-bit block fixed point: per block of 32 the values are integers times 2^e, rounded to nearest, ties
/// to even, where 2^e is the smallest power of two, but at least 2^-126, with `max |x| < 32639 * 2^e`. Lengths are whole
/// blocks. The error is at most 2^(e - 1): below 2^-15 of the block's largest magnitude. A block with a magnitude of
/// 2^100 or more, an infinity or NaN is NaN.
pub fn block_fixed_point(x: &[f32]) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for x in x.chunks_exact(32) {
        if x.iter().any(|x| x.is_nan() || x.abs() >= 2.0_f32.powi(100)) {
            out.extend([f32::NAN; 32]);
            continue;
        }
        let max = x.iter().fold(0.0_f64, |max, x| max.max(f64::from(x.abs())));
        let mut step = 2.0_f64.powi(-126);
        while max >= 32639.0 * step {
            step *= 2.0;
        }
        out.extend(x.iter().map(|x| ((f64::from(*x) / step).round_ties_even() * step) as f32));
    }
    out
}

/// `x / sqrt(mean(x^2) + eps) * weight` of one row.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mean_square = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
    let scale = 1.0 / (mean_square + eps).sqrt();
    x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
}

/// `silu(gate) * up` of one row `[gate | up]`.
pub fn silu_mul(gate_up: &[f32]) -> Vec<f32> {
    let (gate, up) = gate_up.split_at(gate_up.len() / 2);
    gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
}

/// Rotates the pairs (i, i + dim / 2) of one head by `position * inv_freq[i]`.
pub fn rope(head: &mut [f32], position: u32, inv_freq: &[f32], factor: f32) {
    let half = inv_freq.len();
    for i in 0..half {
        let (s, c) = (position as f32 * inv_freq[i]).sin_cos();
        let (s, c) = (s * factor, c * factor);
        let (a, b) = (head[i], head[i + half]);
        head[i] = a * c - b * s;
        head[i + half] = b * c + a * s;
    }
}

/// Attention of one row's `q` `[heads.q, dim]` over `keys` and `values` `[T, heads.kv, dim]`, all of which it sees.
pub fn attention(q: &[f32], keys: &[f32], values: &[f32], heads: Heads, scale: f32) -> Vec<f32> {
    let Heads { q: q_heads, kv, dim } = heads;
    let tokens = keys.len() / (kv * dim);
    let mut out = vec![0.0; q_heads * dim];
    for (h, (q, out)) in q.chunks_exact(dim).zip(out.chunks_exact_mut(dim)).enumerate() {
        let at = |t: usize| (t * kv + h * kv / q_heads) * dim;
        let score = |t: usize| scale * q.iter().zip(&keys[at(t)..]).map(|(q, k)| q * k).sum::<f32>();
        let scores: Vec<f32> = (0..tokens).map(score).collect();
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<f32> = scores.iter().map(|s| (s - max).exp()).collect();
        let sum: f32 = weights.iter().sum();
        for (t, weight) in weights.iter().enumerate() {
            for (out, v) in out.iter_mut().zip(&values[at(t)..]) {
                *out += weight / sum * v;
            }
        }
    }
    out
}

/// What a KV cache holds of one head's key or value `x`: MX blocks of a scale below 2^-60, and bfloat16 below 2^-72, are
/// zero.
pub fn stored_in_cache(x: &[f32], dtype: KvCacheDtype) -> Vec<f32> {
    match dtype.cast() {
        None if dtype == KvCacheDtype::F32 => x.to_vec(),
        None => x.iter().map(|&x| stored_in_bf16(x)).collect(),
        Some(cast) => (x.chunks_exact(cast.format.block.size()))
            .flat_map(|x| {
                let mut codes = vec![0; x.len()];
                let scale = quantize_block(cast, x, &mut codes);
                let value = move |code| {
                    let zero = scale.0 < E8m0::ONE.0 - 60;
                    if zero { 0.0 } else { cast.format.element.decode(code) * scale.to_f32() }
                };
                codes.into_iter().map(value).collect::<Vec<_>>()
            })
            .collect(),
    }
}

fn stored_in_bf16(x: f32) -> f32 {
    if x.abs() < 2.0_f32.powi(-72) { 0.0 } else { bf16::from_f32(x).to_f32() }
}

/// 2^x for x <= 0, 0 below -40: Cephes' `exp2f`.
fn exp2(x: f32) -> f32 {
    if x < -40.0 {
        return 0.0;
    }
    let n = x.round_ties_even();
    let r = x - n;
    let coefficients = [1.339_887_4e-3, 9.618_438e-3, 5.550_332_5e-2, 2.402_264_8e-1, 6.931_472e-1, 1.0];
    let y = coefficients.into_iter().fold(1.535_336_2e-4_f32, |p, c| p.mul_add(r, c));
    y * 2.0_f32.powi(n as i32)
}

/// `sum + a . b`: in order, or (for bfloat16) pairs at even positions with their second product before the first.
/// `first` is the position of the first element.
fn add_products(sum: f32, a: &[f32], b: &[f32], first: usize, in_pairs: bool) -> f32 {
    let mut order: Vec<usize> = (0..a.len()).collect();
    if in_pairs {
        order.sort_by_key(|i| ((first + i) / 2, std::cmp::Reverse((first + i) % 2)));
    }
    order.into_iter().fold(sum, |sum, i| a[i].mul_add(b[i], sum))
}

/// [`attention`] in the order of the CPU backend, bit for bit: keys and values as the cache holds them
/// ([`stored_in_cache`]), the first of them at position `from`. The order is that of `kernels/src/cpu/attention`.
pub fn attention_in_ranges(
    q: &[f32],
    keys: &[f32],
    values: &[f32],
    heads: Heads,
    scale: f32,
    from: usize,
    dtype: KvCacheDtype,
) -> Vec<f32> {
    const RANGE: usize = 256;
    let Heads { q: q_heads, kv, dim } = heads;
    let in_bf16 = dtype != KvCacheDtype::F32;
    let round = |x: f32| if in_bf16 { stored_in_bf16(x) } else { x };
    let to = from + keys.len() / (kv * dim);
    let mut all = Vec::with_capacity(q.len());
    for (h, q) in q.chunks_exact(dim).enumerate() {
        let q: Vec<f32> = q.iter().map(|&q| round(q)).collect();
        let at = |t: usize| ((t - from) * kv + h * kv / q_heads) * dim;
        let (mut total_max, mut total_sum, mut out) = (f32::NEG_INFINITY, 0.0_f32, vec![0.0_f32; dim]);
        for range in from / RANGE..to.div_ceil(RANGE) {
            let seen = from.max(range * RANGE)..to.min((range + 1) * RANGE);
            let score = |t| add_products(0.0, &q, &keys[at(t)..][..dim], 0, in_bf16);
            let scores: Vec<f32> =
                seen.clone().map(|t| score(t) * (scale * std::f32::consts::LOG2_E)).collect();
            let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let p: Vec<f32> = scores.iter().map(|s| exp2(s - max)).collect();
            let mut lanes = [0.0_f32; 16];
            for (t, p) in seen.clone().zip(&p) {
                lanes[t % 16] += p;
            }
            for width in [8, 4, 2, 1] {
                for i in 0..width {
                    lanes[i] += lanes[i + width];
                }
            }
            let p: Vec<f32> = p.into_iter().map(round).collect();
            let new_max = total_max.max(max);
            let (total_factor, factor) = (exp2(total_max - new_max), exp2(max - new_max));
            total_sum = lanes[0].mul_add(factor, total_sum * total_factor);
            for (d, out) in out.iter_mut().enumerate() {
                let v: Vec<f32> = seen.clone().map(|t| values[at(t) + d]).collect();
                let sum = add_products(0.0, &p, &v, seen.start, in_bf16);
                *out = sum.mul_add(factor, *out * total_factor);
            }
            total_max = new_max;
        }
        let factor = 1.0 / total_sum;
        all.extend(out.into_iter().map(|out| out * factor));
    }
    all
}

/// Log-probabilities of one row of logits.
pub fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - max).exp()).sum();
    logits.iter().map(|&x| (f64::from(x - max) - sum.ln()) as f32).collect()
}

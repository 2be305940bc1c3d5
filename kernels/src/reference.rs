//! Every operator as a plain loop: what the backends are held to.
//!
//! Matrices are row-major slices. Sums run in the order in which the loops read; a fused multiply-add is written
//! `mul_add`. Backends may order sums otherwise and say so; the CPU backend's `linear` follows this one bit for bit.

use crate::backend::Heads;

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

/// Log-probabilities of one row of logits.
pub fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - max).exp()).sum();
    logits.iter().map(|&x| (f64::from(x - max) - sum.ln()) as f32).collect()
}

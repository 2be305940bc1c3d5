//! Weights that make up for what went wrong before them: the least squares solution for the outputs that are wanted
//! from the inputs that there are (as in Qronos, Zhang et al., arXiv 2505.11695, and GPTAQ, Li et al., arXiv 2504.02692).

use rayon::prelude::*;

use super::cholesky::UpperFactor;

/// Right-hand sides that are solved together.
const LANES: usize = 8;

/// `W + R' (H + damping)^-1` for W `[N, K]`, H `[K, K]` the sum of `x x'`, and R `[K, N]` the sum of `x d'`, d what
/// `W x` lacks to the wanted output. Damping, a share of the mean of H's diagonal, holds the result near W.
pub fn retarget(weight: &[f32], cols: usize, hessian: &[f32], missing: &[f32], damping: f64) -> Vec<f32> {
    let rows = weight.len() / cols;
    // The factor is that of the matrix read backwards.
    let order: Vec<u32> = (0..cols as u32).collect();
    let factor = UpperFactor::new(hessian, &order, damping);
    let lower = factor.reversed_lower();
    let mut result = weight.to_vec();
    result.par_chunks_mut(LANES * cols).enumerate().for_each(|(group, result)| {
        let first = group * LANES;
        let mut x = vec![[0.0; LANES]; cols];
        for (t, x) in x.iter_mut().rev().enumerate() {
            let missing = &missing[t * rows..][first..(first + LANES).min(rows)];
            x.iter_mut().zip(missing).for_each(|(x, m)| *x = f64::from(*m));
        }
        solve(lower, &mut x);
        for (lane, row) in result.chunks_exact_mut(cols).enumerate() {
            row.iter_mut().zip(x.iter().rev()).for_each(|(w, x)| *w += x[lane] as f32);
        }
    });
    result
}

/// Replaces x by the solution y of `L L' y = x`.
fn solve(lower: &[f64], x: &mut [[f64; LANES]]) {
    let n = x.len();
    for t in 0..n {
        let (done, rest) = x.split_at_mut(t);
        let row = &lower[t * n..][..=t];
        let mut sum = rest[0];
        for (l, y) in row.iter().zip(&*done) {
            sum.iter_mut().zip(y).for_each(|(sum, y)| *sum -= l * y);
        }
        rest[0] = sum.map(|sum| sum / row[t]);
    }
    for t in (0..n).rev() {
        let (above, rest) = x.split_at_mut(t);
        let row = &lower[t * n..][..=t];
        rest[0] = rest[0].map(|y| y / row[t]);
        for (l, y) in row.iter().zip(above) {
            y.iter_mut().zip(&rest[0]).for_each(|(y, own)| *y -= l * own);
        }
    }
}

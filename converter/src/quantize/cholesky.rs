//! The upper triangular Cholesky factor of a damped Hessian.

use candle_core::{Device, Tensor};

/// Columns that are factored together.
const PANEL: usize = 64;

/// M, upper triangular, with `M M' = P H P' + damping`, P the order of the columns.
///
/// It is the usual lower factor of the matrix read backwards: `M[s, t] = L[n-1-s, n-1-t]`.
#[derive(Debug)]
pub(super) struct UpperFactor {
    n: usize,
    /// L `[n, n]`; above the diagonal, nothing of use.
    lower: Vec<f64>,
}

impl UpperFactor {
    /// Factors H `[n, n]`, rows and columns in `order`, with `damping` times the mean of the diagonal added to it: ten
    /// times as much each time that rounding errors make the matrix indefinite. Inputs that are always zero count as 1.
    pub(super) fn new(hessian: &[f32], order: &[u32], damping: f64) -> Self {
        let n = order.len();
        let entry = |s: usize, t: usize| {
            let (s, t) = (order[n - 1 - s] as usize, order[n - 1 - t] as usize);
            let value = f64::from(hessian[s * n + t]);
            if s == t && value == 0.0 { 1.0 } else { value }
        };
        let mean = (0..n).map(|t| entry(t, t)).sum::<f64>() / n as f64;
        let mut damping = damping * mean;
        loop {
            let mut lower = vec![0.0; n * n];
            for s in 0..n {
                (0..=s).for_each(|t| lower[s * n + t] = entry(s, t));
                lower[s * n + s] += damping;
            }
            // A positive diagonal is dominant once the damping is large enough, so this ends.
            if factor(&mut lower, n) {
                return Self { n, lower };
            }
            damping *= 10.0;
        }
    }

    /// `[n, n]`, lower triangle: entry `[t, s]`, s < t, is `M[s, t] / M[t, t]`.
    pub(super) fn shares(&self) -> Vec<f32> {
        let n = self.n;
        let mut shares = vec![0.0; n * n];
        for t in 0..n {
            let column = n - 1 - t;
            let own = self.lower[column * n + column];
            for s in 0..t {
                shares[t * n + s] = (self.lower[(n - 1 - s) * n + column] / own) as f32;
            }
        }
        shares
    }
}

impl UpperFactor {
    /// The lower factor of the matrix read backwards.
    pub(super) fn reversed_lower(&self) -> &[f64] {
        &self.lower
    }
}

/// Replaces the lower triangle of a symmetric matrix `[n, n]` by its Cholesky factor, panel by panel; false if it is
/// not positive definite.
fn factor(a: &mut [f64], n: usize) -> bool {
    for start in (0..n).step_by(PANEL) {
        let end = (start + PANEL).min(n);
        for column in start..end {
            let (above, below) = a.split_at_mut((column + 1) * n);
            let own_row = &mut above[column * n..];
            let pivot = own_row[column] - dot(&own_row[start..column], &own_row[start..column]);
            if pivot.is_nan() || pivot <= 0.0 {
                return false;
            }
            let pivot = pivot.sqrt();
            own_row[column] = pivot;
            for row in below.chunks_exact_mut(n) {
                row[column] = (row[column] - dot(&row[start..column], &own_row[start..column])) / pivot;
            }
        }
        subtract_outer(a, n, start, end);
    }
    true
}

/// Subtracts the product of panel `start..end` and its transpose from the lower triangle right of the panel.
fn subtract_outer(a: &mut [f64], n: usize, start: usize, end: usize) {
    /// Columns of one product: less wasted above the diagonal than with more of them, larger products than with fewer.
    const WIDTH: usize = 256;
    if end == n {
        return;
    }
    let panel: Vec<f64> = a.chunks_exact(n).skip(end).flat_map(|row| &row[start..end]).copied().collect();
    let width = end - start;
    for first in (end..n).step_by(WIDTH) {
        let last = (first + WIDTH).min(n);
        let rows = &panel[(first - end) * width..];
        let product = multiply_transposed(rows, &rows[..(last - first) * width], width);
        for (row, product) in a.chunks_exact_mut(n).skip(first).zip(product.chunks_exact(last - first)) {
            row[first..last].iter_mut().zip(product).for_each(|(a, p)| *a -= p);
        }
    }
}

/// `a b'` of `[_, k]` matrices, row-major.
fn multiply_transposed(a: &[f64], b: &[f64], k: usize) -> Vec<f64> {
    let tensor = |values: &[f64]| Tensor::from_slice(values, (values.len() / k, k), &Device::Cpu);
    let product = tensor(a).and_then(|a| a.matmul(&tensor(b)?.t()?)?.flatten_all()?.to_vec1());
    product.expect("sizes agree")
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    // Four chains of additions: one would wait for itself.
    let mut sums = [0.0; 4];
    let (a, a_rest) = a.as_chunks::<4>();
    let (b, b_rest) = b.as_chunks::<4>();
    for (a, b) in a.iter().zip(b) {
        sums.iter_mut().zip(a).zip(b).for_each(|((sum, a), b)| *sum += a * b);
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    (sums[0] + sums[1]) + (sums[2] + sums[3]) + rest
}

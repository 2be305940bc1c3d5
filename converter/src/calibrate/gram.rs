//! Sums of products over calibration inputs.

use candle_core::{Device, Tensor};

/// Columns of one product: narrow enough that little is computed above the diagonal, wide enough to be fast.
const WIDTH: usize = 384;

/// `X'X` of inputs that come window by window.
#[derive(Debug)]
pub(super) struct Gram {
    cols: usize,
    /// `[K, K]`; above the diagonal blocks, zeros until [`finish`](Self::finish).
    sum: Vec<f32>,
}

impl Gram {
    pub(super) fn new(cols: usize) -> Self {
        Self { cols, sum: vec![0.0; cols * cols] }
    }

    /// Adds the inputs `[rows, K]`.
    pub(super) fn add(&mut self, inputs: &[f32]) {
        let cols = self.cols;
        let rows = inputs.len() / cols;
        let inputs = tensor(inputs, rows, cols);
        for first in (0..cols).step_by(WIDTH) {
            let width = WIDTH.min(cols - first);
            let product = narrow(&inputs, first, cols - first)
                .and_then(|a| a.t()?.matmul(&narrow(&inputs, first, width)?)?.flatten_all()?.to_vec1::<f32>())
                .expect("sizes agree");
            let rows = self.sum.chunks_exact_mut(cols).skip(first).zip(product.chunks_exact(width));
            rows.for_each(|(sum, product)| {
                sum[first..first + width].iter_mut().zip(product).for_each(|(sum, p)| *sum += p);
            });
        }
    }

    /// The symmetric matrix `[K, K]`.
    pub(super) fn finish(mut self) -> Vec<f32> {
        for row in 0..self.cols {
            for col in row + 1..self.cols {
                self.sum[row * self.cols + col] = self.sum[col * self.cols + row];
            }
        }
        self.sum
    }
}

/// `sum += a' b` of `[rows, a_cols]` and `[rows, b_cols]`.
pub(super) fn add_transposed_product(a: &[f32], a_cols: usize, b: &[f32], b_cols: usize, sum: &mut [f32]) {
    let rows = a.len() / a_cols;
    let (a, b) = (tensor(a, rows, a_cols), tensor(b, rows, b_cols));
    let product = a.t().and_then(|a| a.matmul(&b)?.flatten_all()?.to_vec1::<f32>()).expect("sizes agree");
    sum.iter_mut().zip(&product).for_each(|(sum, p)| *sum += p);
}

/// `a b` of `[rows, inner]` and `[inner, cols]`.
pub(super) fn product(a: &[f32], inner: usize, b: &[f32]) -> Vec<f32> {
    let (rows, cols) = (a.len() / inner, b.len() / inner);
    let product = tensor(a, rows, inner).matmul(&tensor(b, inner, cols));
    product.and_then(|p| p.flatten_all()?.to_vec1()).expect("sizes agree")
}

/// `a b'` of `[rows, inner]` and `[cols, inner]`.
pub(crate) fn product_transposed(a: &[f32], inner: usize, b: &[f32]) -> Vec<f32> {
    let (rows, cols) = (a.len() / inner, b.len() / inner);
    let b = tensor(b, cols, inner).t();
    let product = b.and_then(|b| tensor(a, rows, inner).matmul(&b)?.flatten_all()?.to_vec1());
    product.expect("sizes agree")
}

fn tensor(values: &[f32], rows: usize, cols: usize) -> Tensor {
    Tensor::from_slice(values, (rows, cols), &Device::Cpu).expect("as many values as rows times columns")
}

fn narrow(matrix: &Tensor, first: usize, width: usize) -> candle_core::Result<Tensor> {
    matrix.narrow(1, first, width)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_those_of_the_definition() {
        let cols = WIDTH + 40;
        let value = |i: usize| ((i * 7919 + 13) % 101) as f32 / 101.0 - 0.5;
        let windows: Vec<Vec<f32>> = (0..3).map(|w| (0..5 * cols).map(|i| value(i + w)).collect()).collect();
        let mut gram = Gram::new(cols);
        windows.iter().for_each(|window| gram.add(window));
        let gram = gram.finish();
        for (a, b) in [(0, 0), (3, WIDTH + 1), (WIDTH + 1, 3), (WIDTH + 39, WIDTH + 2), (17, 200)] {
            let rows = windows.iter().flat_map(|window| window.chunks_exact(cols));
            let expected: f32 = rows.map(|x| x[a] * x[b]).sum();
            assert!((gram[a * cols + b] - expected).abs() < 1e-5, "{a} {b}");
        }
    }
}

//! What a method needs to know of a stage's inputs, summed over windows.

use kernels::mx::{Scheme, quantize_dequantize};

use rayon::prelude::*;

use super::gram::{Gram, add_transposed_product, product, product_transposed};

/// Tokens of one task.
const TOKENS_AT_A_TIME: usize = 32;

/// The inputs x of a stage, as its products see them, each divided by its length: tokens count alike. Attention sinks,
/// the first token above all, have inputs tens of times larger than others, and would decide everything.
#[derive(Debug)]
pub(crate) struct Inputs {
    /// `[tokens, K]`.
    pub(crate) values: Vec<f32>,
    /// What each token was multiplied by.
    factors: Vec<f32>,
    scheme: Option<Scheme>,
}

impl Inputs {
    /// Of inputs `[tokens, K]` that are rotated and quantized by `scheme` at run time; `None` leaves them as they are.
    pub(crate) fn new(inputs: &[f32], cols: usize, scheme: Option<Scheme>) -> Self {
        let mut values = inputs.to_vec();
        let tokens = values.par_chunks_exact_mut(cols).with_min_len(TOKENS_AT_A_TIME);
        let factors = tokens.map(|token| {
            rotate(scheme, token);
            if let Some(cast) = scheme.and_then(|scheme| scheme.activation) {
                let before = token.to_vec();
                quantize_dequantize(cast, &before, token);
            }
            let square: f64 = token.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            let factor = if square > 0.0 { square.sqrt().recip() as f32 } else { 0.0 };
            token.iter_mut().for_each(|x| *x *= factor);
            factor
        });
        Self { factors: factors.collect(), values, scheme }
    }

    /// Other inputs `[tokens, K]` of the same tokens, rotated and multiplied as these were.
    fn weigh(&self, inputs: &[f32], cols: usize) -> Vec<f32> {
        let mut values = inputs.to_vec();
        let tokens = values.par_chunks_exact_mut(cols).with_min_len(TOKENS_AT_A_TIME);
        tokens.zip(&self.factors).for_each(|(token, factor)| {
            rotate(self.scheme, token);
            token.iter_mut().for_each(|value| *value *= factor);
        });
        values
    }
}

fn rotate(scheme: Option<Scheme>, token: &mut [f32]) {
    if let Some(scheme) = scheme {
        scheme.rotate(token);
    }
}

/// Tokens that are summed in one product.
const BATCH: usize = 2048;

/// Sums over windows of the inputs x that a stage has, and, where drift is corrected, of what they lack to the inputs z
/// that it should have: those of the unquantized model.
#[derive(Debug)]
pub(crate) struct Sums {
    cols: usize,
    gram: Gram,
    tokens: usize,
    /// `[_, K]`, to be summed.
    pending: Vec<f32>,
    drift: Option<DriftSums>,
}

/// Over those windows whose wanted inputs are known.
#[derive(Debug)]
struct DriftSums {
    /// `x (z - x)'` `[K, K]`.
    cross: Vec<f32>,
    tokens: usize,
    /// x and `z - x`, `[_, K]`, to be summed.
    pending: (Vec<f32>, Vec<f32>),
    /// `z z'`.
    wanted: Option<Gram>,
}

impl Sums {
    /// For inputs of width K = `cols`, with their drift if `corrects`; `measured` sums can tell [errors](Finished::error).
    pub(crate) fn new(cols: usize, corrects: bool, measured: bool) -> Self {
        let drift = corrects.then(|| DriftSums {
            cross: vec![0.0; cols * cols],
            tokens: 0,
            pending: (Vec::new(), Vec::new()),
            wanted: measured.then(|| Gram::new(cols)),
        });
        Self { cols, gram: Gram::new(cols), tokens: 0, pending: Vec::new(), drift }
    }

    /// Adds a window; `wanted` `[tokens, K]` where it is known. Those that are [measured](Self::new) know it of all windows.
    pub(crate) fn add(&mut self, inputs: &Inputs, wanted: Option<&[f32]>) {
        let tokens = inputs.values.len() / self.cols;
        self.tokens += tokens;
        self.pending.extend_from_slice(&inputs.values);
        if let Some((drift, wanted)) = self.drift.as_mut().zip(wanted) {
            let wanted = inputs.weigh(wanted, self.cols);
            if let Some(gram) = &mut drift.wanted {
                gram.add(&wanted);
            }
            drift.tokens += tokens;
            drift.pending.0.extend_from_slice(&inputs.values);
            drift.pending.1.extend(wanted.iter().zip(&inputs.values).map(|(z, x)| z - x));
        }
        if self.pending.len() >= BATCH * self.cols {
            self.flush();
        }
    }

    fn flush(&mut self) {
        if !self.pending.is_empty() {
            self.gram.add(&self.pending);
            self.pending.clear();
        }
        if let Some(DriftSums { cross, pending: (x, lacking), .. }) = &mut self.drift
            && !x.is_empty()
        {
            add_transposed_product(x, self.cols, lacking, self.cols, cross);
            x.clear();
            lacking.clear();
        }
    }

    /// No more windows.
    pub(crate) fn finish(mut self) -> Finished {
        self.flush();
        let (cross, wanted_gram) = match self.drift {
            None => (None, None),
            Some(DriftSums { mut cross, tokens, wanted, .. }) => {
                // As if all windows had been seen.
                let factor = self.tokens as f32 / tokens.max(1) as f32;
                cross.iter_mut().for_each(|sum| *sum *= factor);
                (Some(cross), wanted.map(Gram::finish))
            }
        };
        Finished { cols: self.cols, hessian: self.gram.finish(), cross, wanted_gram }
    }
}

/// Sums over all windows.
#[derive(Debug)]
pub(crate) struct Finished {
    cols: usize,
    /// `[K, K]`.
    pub(crate) hessian: Vec<f32>,
    /// `x (z - x)'` `[K, K]`, with drift correction.
    cross: Option<Vec<f32>>,
    wanted_gram: Option<Vec<f32>>,
}

impl Finished {
    /// Whether all sums are numbers.
    pub(crate) fn is_finite(&self) -> bool {
        self.hessian.iter().chain(self.cross.iter().flatten()).all(|value| value.is_finite())
    }

    /// The sum of `x (W z - W x)'`, `[K, N]`: what the module W `[N, K]` lacks to the wanted outputs; `None` without
    /// drift correction.
    pub(crate) fn missing(&self, weight: &[f32]) -> Option<Vec<f32>> {
        Some(product_transposed(self.cross.as_ref()?, self.cols, weight))
    }

    /// Summed squares of the wanted outputs of W, and of what the outputs of `quantized`, both `[N, K]`, lack to them.
    pub(crate) fn error(&self, weight: &[f32], quantized: &[f32]) -> OutputError {
        let form = |a: &[f32], gram: &[f32]| inner(&product(a, self.cols, gram), a);
        let (power, error) = match (&self.cross, &self.wanted_gram) {
            (Some(cross), Some(gram)) => {
                let power = form(weight, gram);
                let cross: Vec<f32> =
                    cross.iter().zip(&self.hessian).map(|(lacking, own)| lacking + own).collect();
                // `x (W z)'` `[K, N]`.
                let cross = product_transposed(&cross, self.cols, weight);
                let rows = weight.len() / self.cols;
                let mut both = 0.0;
                for (n, row) in quantized.chunks_exact(self.cols).enumerate() {
                    for (k, &q) in row.iter().enumerate() {
                        both += f64::from(q) * f64::from(cross[k * rows + n]);
                    }
                }
                (power, power - 2.0 * both + form(quantized, &self.hessian))
            }
            _ => {
                let difference: Vec<f32> = weight.iter().zip(quantized).map(|(w, q)| w - q).collect();
                (form(weight, &self.hessian), form(&difference, &self.hessian))
            }
        };
        OutputError { power, error: error.max(0.0) }
    }
}

/// Summed squares of outputs.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct OutputError {
    pub(crate) power: f64,
    pub(crate) error: f64,
}

impl OutputError {
    /// Of two modules with the same inputs.
    pub(crate) fn plus(self, other: Self) -> Self {
        Self { power: self.power + other.power, error: self.error + other.error }
    }

    /// `10 log10(error / power)`, above a floor that stands for no error.
    pub(crate) fn decibels(self) -> f64 {
        const FLOOR: f64 = 1e-20;
        if self.power > 0.0 { 10.0 * (self.error / self.power).max(FLOOR).log10() } else { 0.0 }
    }
}

fn inner(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLS: usize = 32;
    const ROWS: usize = 3;

    fn values(seed: usize, len: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7919 + seed * 104_729 + 13) % 211) as f32 / 211.0 - 0.5).collect()
    }

    /// The product of rows `[_, K]` and of W' `[K, N]`.
    fn outputs(inputs: &[f32], weight: &[f32]) -> Vec<f64> {
        let rows = inputs.chunks_exact(COLS).flat_map(|x| {
            weight
                .chunks_exact(COLS)
                .map(|w| x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum())
        });
        rows.collect()
    }

    fn near(actual: f64, expected: f64) {
        assert!((actual - expected).abs() <= 2e-5 * expected.abs().max(1.0), "{actual}, not {expected}");
    }

    /// Of windows longer than what is summed at a time, in both kinds of sums.
    #[test]
    fn errors_are_those_of_the_outputs_that_are_wanted() {
        let scheme: Scheme = "mxfp4".parse().unwrap();
        let (weight, quantized) = (values(1, ROWS * COLS), values(2, ROWS * COLS));
        for corrects in [false, true] {
            let mut sums = Sums::new(COLS, corrects, true);
            let (mut power, mut error) = (0.0, 0.0);
            for window in 0..5 {
                let (x, z) = (values(window, 900 * COLS), values(window + 9, 900 * COLS));
                let inputs = Inputs::new(&x, COLS, Some(scheme));
                sums.add(&inputs, corrects.then_some(&z));
                let wanted = if corrects { inputs.weigh(&z, COLS) } else { inputs.values.clone() };
                let wanted = outputs(&wanted, &weight);
                let have = outputs(&inputs.values, &quantized);
                power += wanted.iter().map(|y| y * y).sum::<f64>();
                error += wanted.iter().zip(&have).map(|(y, q)| (y - q) * (y - q)).sum::<f64>();
            }
            let actual = sums.finish().error(&weight, &quantized);
            near(actual.power, power);
            near(actual.error, error);
        }
    }

    /// Windows without wanted inputs count as if theirs lacked what the others lack.
    #[test]
    fn drift_of_some_windows_stands_for_that_of_all() {
        let scheme: Scheme = "mxfp4".parse().unwrap();
        let weight = values(1, ROWS * COLS);
        let (x, z) = (values(3, 200 * COLS), values(4, 200 * COLS));
        let inputs = Inputs::new(&x, COLS, Some(scheme));
        let mut sums = Sums::new(COLS, true, false);
        sums.add(&inputs, Some(&z));
        let alone = sums.finish().missing(&weight).unwrap();
        let lacking: Vec<f32> =
            inputs.weigh(&z, COLS).iter().zip(&inputs.values).map(|(z, x)| z - x).collect();
        let outputs = outputs(&lacking, &weight);
        for (k, row) in alone.chunks_exact(ROWS).enumerate() {
            for (n, actual) in row.iter().enumerate() {
                let pairs = inputs.values.chunks_exact(COLS).zip(outputs.chunks_exact(ROWS));
                near(f64::from(*actual), pairs.map(|(x, y)| f64::from(x[k]) * y[n]).sum());
            }
        }

        let mut sums = Sums::new(COLS, true, false);
        sums.add(&inputs, Some(&z));
        sums.add(&inputs, None);
        let both = sums.finish().missing(&weight).unwrap();
        alone.iter().zip(&both).for_each(|(alone, both)| near(f64::from(*both), 2.0 * f64::from(*alone)));
    }

    #[test]
    fn inputs_are_rotated_and_as_long_as_each_other() {
        let rotated =
            Scheme { rotation: Some(kernels::mx::Rotation::BlockHadamard), .."mxfp4".parse().unwrap() };
        let x = values(3, 4 * COLS);
        let inputs = Inputs::new(&x, COLS, Some(rotated));
        let mut expected = x.clone();
        rotated.rotate(&mut expected);
        for (actual, expected) in inputs.values.chunks_exact(COLS).zip(expected.chunks_exact(COLS)) {
            let length = expected.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
            let pairs = actual.iter().zip(expected);
            pairs.for_each(|(actual, expected)| near(f64::from(*actual), f64::from(*expected) / length));
        }
        assert_eq!(inputs.weigh(&x, COLS), inputs.values);
    }
}

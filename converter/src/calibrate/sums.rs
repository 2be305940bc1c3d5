//! What a method needs to know of a stage's inputs, summed over windows.

use kernels::mx::{Cast, quantize_dequantize};

use super::gram::{Gram, add_transposed_product, product, product_transposed};

/// The inputs x of a stage, as its products see them, each divided by its length: tokens count alike. Attention sinks,
/// the first token above all, have inputs tens of times larger than others, and would decide everything.
#[derive(Debug)]
pub(crate) struct Inputs {
    /// `[tokens, K]`.
    pub(crate) values: Vec<f32>,
    /// What each token was multiplied by.
    factors: Vec<f32>,
}

impl Inputs {
    /// Of inputs `[tokens, K]` that are quantized by `cast` at run time.
    pub(crate) fn new(inputs: &[f32], cols: usize, cast: Option<Cast>) -> Self {
        let mut values = vec![0.0; inputs.len()];
        match cast {
            Some(cast) => quantize_dequantize(cast, inputs, &mut values),
            None => values.copy_from_slice(inputs),
        }
        let mut factors = Vec::with_capacity(values.len() / cols);
        for token in values.chunks_exact_mut(cols) {
            let square: f64 = token.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            let factor = if square > 0.0 { square.sqrt().recip() as f32 } else { 0.0 };
            token.iter_mut().for_each(|x| *x *= factor);
            factors.push(factor);
        }
        Self { values, factors }
    }

    /// Multiplies each token of `[tokens, width]` as the inputs were.
    pub(crate) fn weigh(&self, values: &mut [f32], width: usize) {
        for (token, factor) in values.chunks_exact_mut(width).zip(&self.factors) {
            token.iter_mut().for_each(|value| *value *= factor);
        }
    }
}

/// Sums over windows of the inputs x that a stage has, and, where drift is corrected, of the inputs z that it should
/// have: those of the unquantized model.
#[derive(Debug)]
pub(crate) struct Sums {
    cols: usize,
    gram: Gram,
    wanted: Option<WantedSums>,
}

#[derive(Debug)]
struct WantedSums {
    /// `x z'` `[K, K]`.
    cross: Vec<f32>,
    /// `z z'`.
    gram: Option<Gram>,
}

impl Sums {
    /// For inputs of width K = `cols`, with those wanted if `corrects`; `measured` sums can tell [errors](Finished::error).
    pub(crate) fn new(cols: usize, corrects: bool, measured: bool) -> Self {
        let wanted = corrects
            .then(|| WantedSums { cross: vec![0.0; cols * cols], gram: measured.then(|| Gram::new(cols)) });
        Self { cols, gram: Gram::new(cols), wanted }
    }

    /// Adds a window; `wanted` `[tokens, K]` if there are sums of it.
    pub(crate) fn add(&mut self, inputs: &Inputs, wanted: Option<&[f32]>) {
        self.gram.add(&inputs.values);
        let Some((sums, values)) = self.wanted.as_mut().zip(wanted) else { return };
        let mut weighed = values.to_vec();
        inputs.weigh(&mut weighed, self.cols);
        add_transposed_product(&inputs.values, self.cols, &weighed, self.cols, &mut sums.cross);
        if let Some(gram) = &mut sums.gram {
            gram.add(&weighed);
        }
    }

    /// No more windows.
    pub(crate) fn finish(self) -> Finished {
        let (cross, wanted_gram) = match self.wanted {
            Some(sums) => (Some(sums.cross), sums.gram.map(Gram::finish)),
            None => (None, None),
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
    /// `[K, K]`, with drift correction.
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
        let difference: Vec<f32> =
            self.cross.as_ref()?.iter().zip(&self.hessian).map(|(cross, own)| cross - own).collect();
        Some(product_transposed(&difference, self.cols, weight))
    }

    /// Summed squares of the wanted outputs of W, and of what the outputs of `quantized`, both `[N, K]`, lack to them.
    pub(crate) fn error(&self, weight: &[f32], quantized: &[f32]) -> OutputError {
        let form = |a: &[f32], gram: &[f32]| inner(&product(a, self.cols, gram), a);
        let (power, error) = match (&self.cross, &self.wanted_gram) {
            (Some(cross), Some(gram)) => {
                let power = form(weight, gram);
                // `x (W z)'` `[K, N]`.
                let cross = product_transposed(cross, self.cols, weight);
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

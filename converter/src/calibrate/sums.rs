//! What a method needs to know of a stage's inputs, summed over windows.

use kernels::mx::{Cast, quantize_dequantize};

use super::gram::{Gram, add_transposed_product, product, product_transposed};

/// The inputs x of a stage, as its products see them, each divided by its length: tokens count alike. Attention sinks,
/// the first token above all, have inputs tens of times larger than others, and would decide everything.
#[derive(Debug)]
pub(super) struct Inputs {
    /// `[tokens, K]`.
    pub(super) values: Vec<f32>,
    /// What each token was multiplied by.
    factors: Vec<f32>,
}

impl Inputs {
    /// Of inputs `[tokens, K]` that are quantized by `cast` at run time.
    pub(super) fn new(inputs: &[f32], cols: usize, cast: Option<Cast>) -> Self {
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
    pub(super) fn weigh(&self, values: &mut [f32], width: usize) {
        for (token, factor) in values.chunks_exact_mut(width).zip(&self.factors) {
            token.iter_mut().for_each(|value| *value *= factor);
        }
    }
}

/// What a stage's output should be, token by token.
#[derive(Debug, Clone, Copy)]
pub(super) enum Wanted<'a> {
    /// The unquantized product of the same inputs.
    Same,
    /// The unquantized product of these inputs `[tokens, K]`.
    OfInputs(&'a [f32]),
    /// These values `[tokens, N]`.
    Outputs(&'a [f32], usize),
}

/// Sums over windows.
#[derive(Debug)]
pub(super) struct Sums {
    cols: usize,
    gram: Gram,
    /// `x z'` `[K, width]`, z what [`Wanted`] has.
    cross: Vec<f32>,
    /// Of z, where it is inputs.
    wanted_gram: Option<Gram>,
    /// Summed squares of z, where it is outputs.
    wanted_power: f64,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Same,
    OfInputs,
    Outputs,
}

impl Sums {
    /// For inputs of width K = `cols`; `measured` sums can tell [errors](Finished::error).
    pub(super) fn new(cols: usize, measured: bool) -> Self {
        Self {
            cols,
            gram: Gram::new(cols),
            cross: Vec::new(),
            wanted_gram: measured.then(|| Gram::new(cols)),
            wanted_power: 0.0,
            kind: Kind::Same,
        }
    }

    /// Adds a window.
    pub(super) fn add(&mut self, inputs: &Inputs, wanted: Wanted<'_>) {
        self.gram.add(&inputs.values);
        let (values, width) = match wanted {
            Wanted::Same => return,
            Wanted::OfInputs(values) => {
                self.kind = Kind::OfInputs;
                (values, self.cols)
            }
            Wanted::Outputs(values, width) => {
                self.kind = Kind::Outputs;
                (values, width)
            }
        };
        let mut weighed = values.to_vec();
        inputs.weigh(&mut weighed, width);
        self.cross.resize(self.cols * width, 0.0);
        add_transposed_product(&inputs.values, self.cols, &weighed, width, &mut self.cross);
        match (self.kind, &mut self.wanted_gram) {
            (Kind::OfInputs, Some(gram)) => gram.add(&weighed),
            _ => self.wanted_power += weighed.iter().map(|&z| f64::from(z) * f64::from(z)).sum::<f64>(),
        }
    }

    /// No more windows.
    pub(super) fn finish(self) -> Finished {
        let wanted_gram = self.wanted_gram.filter(|_| self.kind == Kind::OfInputs).map(Gram::finish);
        Finished {
            cols: self.cols,
            hessian: self.gram.finish(),
            cross: self.cross,
            wanted_gram,
            wanted_power: self.wanted_power,
            kind: self.kind,
        }
    }
}

/// Sums over all windows.
#[derive(Debug)]
pub(super) struct Finished {
    cols: usize,
    /// `[K, K]`.
    pub(super) hessian: Vec<f32>,
    cross: Vec<f32>,
    wanted_gram: Option<Vec<f32>>,
    wanted_power: f64,
    kind: Kind,
}

impl Finished {
    /// Whether all sums are numbers.
    pub(super) fn is_finite(&self) -> bool {
        self.hessian.iter().chain(&self.cross).all(|value| value.is_finite())
    }

    /// The sum of `x (z - W x)'`, `[K, N]`: what the module W `[N, K]` lacks to the wanted outputs; `None` where it
    /// lacks nothing.
    pub(super) fn missing(&self, weight: &[f32]) -> Option<Vec<f32>> {
        let gram_product = |gram: &[f32]| product_transposed(gram, self.cols, weight);
        match self.kind {
            Kind::Same => None,
            Kind::OfInputs => {
                let difference: Vec<f32> = self
                    .cross
                    .chunks_exact(self.cols)
                    .zip(self.hessian.chunks_exact(self.cols))
                    .flat_map(|(c, h)| c.iter().zip(h).map(|(c, h)| c - h))
                    .collect();
                Some(gram_product(&difference))
            }
            Kind::Outputs => {
                let have = gram_product(&self.hessian);
                Some(self.cross.iter().zip(&have).map(|(wanted, have)| wanted - have).collect())
            }
        }
    }

    /// Summed squares of the wanted outputs of W, and of what the outputs of `quantized`, both `[N, K]`, lack to them.
    pub(super) fn error(&self, weight: &[f32], quantized: &[f32]) -> OutputError {
        let form = |a: &[f32], gram: &[f32]| inner(&product(a, self.cols, gram), a);
        let wanted = |cross: &[f32]| -> f64 {
            let rows = weight.len() / self.cols;
            let mut sum = 0.0;
            for (n, row) in quantized.chunks_exact(self.cols).enumerate() {
                for (k, &q) in row.iter().enumerate() {
                    sum += f64::from(q) * f64::from(cross[k * rows + n]);
                }
            }
            sum
        };
        let (power, error) = match (self.kind, &self.wanted_gram) {
            (Kind::OfInputs, Some(gram)) => {
                let power = form(weight, gram);
                let cross = product_transposed(&self.cross, self.cols, weight);
                (power, power - 2.0 * wanted(&cross) + form(quantized, &self.hessian))
            }
            (Kind::Outputs, _) => {
                let power = self.wanted_power;
                (power, power - 2.0 * wanted(&self.cross) + form(quantized, &self.hessian))
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
pub(super) struct OutputError {
    pub(super) power: f64,
    pub(super) error: f64,
}

impl OutputError {
    /// Of two modules with the same inputs.
    pub(super) fn plus(self, other: Self) -> Self {
        Self { power: self.power + other.power, error: self.error + other.error }
    }

    /// `10 log10(error / power)`, above a floor that stands for no error.
    pub(super) fn decibels(self) -> f64 {
        const FLOOR: f64 = 1e-20;
        if self.power > 0.0 { 10.0 * (self.error / self.power).max(FLOOR).log10() } else { 0.0 }
    }
}

fn inner(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

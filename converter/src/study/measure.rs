//! What each design costs each sample, and what that comes to.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;

use super::design::Design;
use super::quantizer::Matrix;
use super::sample::Group;

/// Of a weight panel, every so many rows are multiplied out.
const WEIGHT_ROW_STEP: usize = 4;

/// Of a panel of activations.
const TOKEN_STEP: usize = 2;

/// Ratios above, up to no error at all, count as this, in dB.
const LOSSLESS_DB: f64 = 150.0;

/// The two factors of a matrix product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Operand {
    /// The weight `[N, K]`.
    Weight,
    /// The activations `[M, K]`.
    Activation,
}

/// A matrix to quantize, and what it is multiplied with.
pub(super) struct Sample<'a> {
    pub(super) operand: Operand,
    /// Name of the module; of activations, names of those that read them.
    pub(super) kind: String,
    pub(super) matrix: &'a Matrix,
    /// Rows of the matrix that are multiplied.
    step: usize,
    /// Rows of the other factor.
    other: Vec<&'a [f32]>,
}

impl<'a> Sample<'a> {
    /// Every weight and every input of `groups`.
    pub(super) fn all(groups: &'a [Group]) -> Vec<Self> {
        let mut samples = Vec::new();
        for group in groups {
            let tokens = group.input.iter();
            let tokens = tokens.flat_map(|x| (0..x.rows).step_by(TOKEN_STEP).map(|row| x.row(row)));
            let tokens: Vec<&[f32]> = tokens.collect();
            for module in &group.modules {
                samples.push(Self {
                    operand: Operand::Weight,
                    kind: module.kind.clone(),
                    matrix: &module.weight,
                    step: WEIGHT_ROW_STEP,
                    other: tokens.clone(),
                });
            }
            if let Some(input) = &group.input {
                let kinds: Vec<_> = group.modules.iter().map(|module| module.kind.as_str()).collect();
                let rows = group.modules.iter().map(|module| &module.weight);
                let rows = rows.flat_map(|w| (0..w.rows).step_by(WEIGHT_ROW_STEP).map(|row| w.row(row)));
                samples.push(Self {
                    operand: Operand::Activation,
                    kind: kinds.join(", "),
                    matrix: input,
                    step: TOKEN_STEP,
                    other: rows.collect(),
                });
            }
        }
        samples
    }

    /// Energy of `matrix`, and of its product with the other factor.
    fn energies(&self, matrix: &Matrix) -> Energies {
        let own = matrix.values.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        let rows = (0..matrix.rows).step_by(self.step).map(|row| matrix.row(row));
        let output = rows.flat_map(|row| self.other.iter().map(move |other| dot(row, other).powi(2))).sum();
        Energies { own, output }
    }

    /// Errors of every design.
    fn measure(&self, designs: &[Design], seed: u64) -> Vec<Energies> {
        let error = |design: &Design| {
            let mut error = self.matrix.quantized(design, seed);
            error.values.iter_mut().zip(&self.matrix.values).for_each(|(q, x)| *q -= x);
            self.energies(&error)
        };
        designs.iter().map(error).collect()
    }
}

/// Sum of products: F32 in 16 lanes, then F64.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let (a, a_rest) = a.as_chunks::<16>();
    let (b, b_rest) = b.as_chunks::<16>();
    let mut lanes = [0.0_f32; 16];
    for (a, b) in a.iter().zip(b) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    lanes.iter().map(|&lane| f64::from(lane)).sum::<f64>() + f64::from(rest)
}

/// Sums of squares.
#[derive(Debug, Clone, Copy, Default)]
struct Energies {
    own: f64,
    /// 0 without another factor.
    output: f64,
}

/// The error of a design on weights or on activations.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Errors {
    /// Root of the mean squared error over all elements.
    pub rmse: f64,
    /// Signal to quantization noise ratio in dB, mean over tensors.
    pub sqnr_db: f64,
    /// The same of the products with the other, unquantized factor; absent where there were no activations.
    pub output_sqnr_db: Option<f64>,
}

/// The errors of every design on the samples of `operand`; `None` without such samples.
pub(super) struct Measurements {
    pub(super) weights: Vec<Errors>,
    pub(super) activations: Option<Vec<Errors>>,
}

/// Measures every design on every sample, samples in parallel; `tell` hears of each that is done.
pub(super) fn measure(
    samples: &[Sample<'_>],
    designs: &[Design],
    threads: NonZeroUsize,
    tell: &(dyn Fn(usize) + Sync),
) -> Measurements {
    let results: Mutex<Vec<(usize, Vec<Energies>)>> = Mutex::new(Vec::new());
    let next = AtomicUsize::new(0);
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(sample) = samples.get(index) else { return };
            let measured = sample.measure(designs, index as u64);
            let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
            results.push((index, measured));
            tell(results.len());
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.get() {
            scope.spawn(work);
        }
        work();
    });
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_by_key(|(index, _)| *index);
    let of = |operand: Operand| {
        let noise = || results.iter().filter(|(index, _)| samples[*index].operand == operand);
        let signal: Vec<_> =
            noise().map(|(index, _)| samples[*index].energies(samples[*index].matrix)).collect();
        let elements: usize = noise().map(|(index, _)| samples[*index].matrix.values.len()).sum();
        let errors = |design: usize| {
            let noise: Vec<_> = noise().map(|(_, energies)| energies[design]).collect();
            Errors::of(&signal, &noise, elements)
        };
        (0..designs.len()).map(errors).collect::<Option<Vec<_>>>()
    };
    Measurements { weights: of(Operand::Weight).unwrap_or_default(), activations: of(Operand::Activation) }
}

impl Errors {
    /// `None` without samples.
    fn of(signal: &[Energies], noise: &[Energies], elements: usize) -> Option<Self> {
        if signal.is_empty() {
            return None;
        }
        let mean_db = |energy: fn(&Energies) -> f64| {
            let ratios = signal.iter().zip(noise).filter(|(signal, _)| energy(signal) > 0.0);
            let db: Vec<_> =
                ratios.map(|(s, n)| (10.0 * (energy(s) / energy(n)).log10()).min(LOSSLESS_DB)).collect();
            (!db.is_empty()).then(|| db.iter().sum::<f64>() / db.len() as f64)
        };
        Some(Self {
            rmse: (noise.iter().map(|noise| noise.own).sum::<f64>() / elements as f64).sqrt(),
            sqnr_db: mean_db(|energies| energies.own).unwrap_or(LOSSLESS_DB),
            output_sqnr_db: mean_db(|energies| energies.output),
        })
    }
}

#[cfg(test)]
mod tests {
    use kernels::mx::ElementType;

    use super::super::sample::Module;
    use super::*;

    fn matrix(rows: usize, cols: usize, seed: u64) -> Matrix {
        // Neighbouring seeds have streams that are alike.
        let mut rng = fastrand::Rng::with_seed(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        // Box-Muller.
        let mut normal =
            || (-2.0 * (1.0 - rng.f64()).ln()).sqrt() * (std::f64::consts::TAU * rng.f64()).cos();
        let values = (0..rows * cols).map(|_| normal() as f32).collect();
        Matrix { rows, cols, values }
    }

    #[test]
    fn normal_values_have_the_ratios_that_are_known_of_them() {
        let module = |kind: &str, seed| Module { kind: kind.to_owned(), weight: matrix(128, 1024, seed) };
        let groups =
            [Group { modules: vec![module("a", 1), module("b", 2)], input: Some(matrix(64, 1024, 3)) }];
        let samples = Sample::all(&groups);
        let operands: Vec<_> = samples.iter().map(|sample| (sample.operand, sample.kind.as_str())).collect();
        assert_eq!(operands, [(Operand::Weight, "a"), (Operand::Weight, "b"), (Operand::Activation, "a, b")]);
        let designs = [ElementType::E2m1, ElementType::E2m3, ElementType::Int8].map(Design::ocp);
        let measured = measure(&samples, &designs, NonZeroUsize::new(2).unwrap(), &|_| ());
        // tests/golden/sqnr.csv: normal, blocks of 32, default rules.
        for (index, expected) in [19.027, 30.984, 41.671].into_iter().enumerate() {
            for errors in [measured.weights[index], measured.activations.as_ref().unwrap()[index]] {
                assert!((errors.sqnr_db - expected).abs() < 0.15, "{errors:?}, {expected}");
                // Errors of independent elements add up as the elements do.
                assert!((errors.output_sqnr_db.unwrap() - expected).abs() < 0.5, "{errors:?}, {expected}");
                // The values have unit variance.
                assert!((-20.0 * errors.rmse.log10() - expected).abs() < 0.15, "{errors:?}, {expected}");
            }
        }
    }

    #[test]
    fn weights_alone_have_no_products() {
        let groups =
            [Group { modules: vec![Module { kind: "a".to_owned(), weight: matrix(8, 64, 1) }], input: None }];
        let measured =
            measure(&Sample::all(&groups), &[Design::ocp(ElementType::E2m1)], NonZeroUsize::MIN, &|_| ());
        assert_eq!(measured.weights[0].output_sqnr_db, None);
        assert!(measured.activations.is_none());
    }
}

//! The calibrated methods against reference results in double precision (`tests/golden/ptq_public.safetensors`), and
//! against their own definitions.

use std::path::Path;

use kernels::mx::{Cast, MxFormat, ScaleRounding};
use safetensors::SafeTensors;

use super::*;

/// A layer with correlated inputs, and what its reference quantizations are.
struct Golden {
    bytes: Vec<u8>,
    weight: Vec<f32>,
    /// `[tokens, K]`.
    inputs: Vec<f32>,
    hessian: Vec<f32>,
    cols: usize,
}

impl Golden {
    fn read() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/ptq_public.safetensors");
        let bytes = std::fs::read(path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let floats = |name: &str| -> Vec<f32> {
            let data = file.tensor(name).unwrap().data().as_chunks::<4>().0;
            data.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
        };
        let cols = file.tensor("weight").unwrap().shape()[1];
        let (weight, inputs) = (floats("weight"), floats("x"));
        let mut hessian = vec![0.0_f64; cols * cols];
        for x in inputs.chunks_exact(cols) {
            for (row, &a) in hessian.chunks_exact_mut(cols).zip(x) {
                row.iter_mut().zip(x).for_each(|(h, &b)| *h += f64::from(a) * f64::from(b));
            }
        }
        let hessian = hessian.into_iter().map(|h| h as f32).collect();
        Self { weight, inputs, hessian, cols, bytes }
    }

    fn problem(&self, format: &str, scale_rounding: ScaleRounding) -> Problem<'_> {
        let format: MxFormat = format.parse().unwrap();
        let cast = Cast { format, scale_rounding };
        Problem { weight: &self.weight, cols: self.cols, hessian: &self.hessian, cast }
    }

    /// Output error relative to the output's power, in dB.
    fn decibels(&self, quantized: &Quantized) -> f64 {
        let values = quantized.dequantize();
        let (mut error, mut power) = (0.0, 0.0);
        for x in self.inputs.chunks_exact(self.cols) {
            for (w, q) in self.weight.chunks_exact(self.cols).zip(values.chunks_exact(self.cols)) {
                let product =
                    |w: &[f32]| -> f64 { w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum() };
                let exact = product(w);
                power += exact * exact;
                error += (exact - product(q)).powi(2);
            }
        }
        10.0 * (error / power).log10()
    }

    fn check(&self, format: &str, name: &str, quantized: &Quantized) {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let key =
            |part: &str| format!("{}.{name}.{part}", if format == "mxfp4" { "mxfp4_e2m1" } else { format });
        let codes = file.tensor(&key("code")).unwrap().data().to_vec();
        // Zeros of either sign are one value.
        let values = quantized.cast.format.element.values();
        let equal = quantized
            .codes
            .iter()
            .zip(&codes)
            .filter(|(a, b)| values[usize::from(**a)] == values[usize::from(**b)]);
        let share = equal.count() as f64 / codes.len() as f64;
        assert!(share >= 0.995, "{format} {name}: {share} of the codes are equal");
        assert_eq!(quantized.scale_bytes(), file.tensor(&key("scale")).unwrap().data(), "{format} {name}");
        let db = file.tensor(&key("db")).unwrap();
        let expected = f64::from_le_bytes(db.data().try_into().unwrap());
        let actual = self.decibels(quantized);
        assert!((actual - expected).abs() < 0.05, "{format} {name}: {actual} dB, reference {expected}");
    }
}

const FORMATS: [&str; 3] = ["mxfp4", "mxfp6_e2m3", "mxint8"];

#[test]
fn methods_are_the_reference_implementations() {
    let golden = Golden::read();
    for format in FORMATS {
        let problem = golden.problem(format, ScaleRounding::Even);
        golden.check(format, "rtn_even", &Quantized::nearest(&golden.weight, golden.cols, problem.cast));
        golden.check(format, "gpfq_even", &error_diffusion(&problem));
        golden.check(format, "gptq_even_static", &gptq(&problem, ColumnOrder::Storage, 0));
    }
}

/// Each refinement earns its place on inputs that are correlated and have large channels.
#[test]
fn scale_search_order_and_descent_lower_the_error() {
    let golden = Golden::read();
    for format in FORMATS {
        let even = golden.problem(format, ScaleRounding::Even);
        let searched = golden.problem(format, ScaleRounding::Mse);
        let errors = [
            golden.decibels(&Quantized::nearest(&golden.weight, golden.cols, even.cast)),
            golden.decibels(&error_diffusion(&even)),
            golden.decibels(&gptq(&even, ColumnOrder::Storage, 0)),
            golden.decibels(&gptq(&searched, ColumnOrder::Importance, 0)),
            golden.decibels(&gptq(&searched, ColumnOrder::Importance, 2)),
        ];
        assert!(errors.is_sorted_by(|a, b| a > b), "{format}: {errors:?}");
    }
}

#[test]
fn inputs_that_are_always_zero_do_no_harm() {
    let golden = Golden::read();
    let mut hessian = golden.hessian.clone();
    for i in 0..golden.cols {
        hessian[3 * golden.cols + i] = 0.0;
        hessian[i * golden.cols + 3] = 0.0;
    }
    let problem = Problem { hessian: &hessian, ..golden.problem("mxfp4", ScaleRounding::Mse) };
    for quantized in [error_diffusion(&problem), gptq(&problem, ColumnOrder::Importance, 0)] {
        assert!(quantized.dequantize().iter().all(|value| value.is_finite()));
    }
    let nothing = vec![0.0; hessian.len()];
    let problem = Problem { hessian: &nothing, ..problem };
    let cast = Cast { scale_rounding: ScaleRounding::Even, ..problem.cast };
    let nearest = Quantized::nearest(&golden.weight, golden.cols, cast);
    assert_eq!(gptq(&problem, ColumnOrder::Importance, 0).codes, nearest.codes);
}

/// With the outputs of other weights as the target, the best weights are those.
#[test]
fn retargeting_finds_the_weights_behind_the_wanted_outputs() {
    let golden = Golden::read();
    let (cols, rows) = (golden.cols, golden.weight.len() / golden.cols);
    let wanted: Vec<f32> = golden.weight.iter().enumerate().map(|(i, w)| w + 0.01 * (i % 7) as f32).collect();
    let mut cross = vec![0.0_f64; cols * rows];
    for (row, (wanted, weight)) in wanted.chunks_exact(cols).zip(golden.weight.chunks_exact(cols)).enumerate()
    {
        for (t, h) in golden.hessian.chunks_exact(cols).enumerate() {
            let missing = wanted.iter().zip(weight).map(|(a, b)| f64::from(a - b));
            cross[t * rows + row] = h.iter().zip(missing).map(|(&h, d)| f64::from(h) * d).sum();
        }
    }
    let cross: Vec<f32> = cross.into_iter().map(|c| c as f32).collect();
    let found = retarget(&golden.weight, cols, &golden.hessian, &cross, 1e-6);
    let worst = found.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 2e-3, "{worst}");
}

//! Operators on rows.

use super::*;
use crate::cpu::sampling::exp_of;
use crate::input_form::InputForm;

#[test]
fn row_operators_equal_their_definition() {
    for width in [64, 100, 576] {
        for rows in [1, 40] {
            let (x, delta) = (Random(1).vec(rows * width), Random(2).vec(rows * width));
            let weight = Random(3).vec(width);
            let sum: Vec<f32> = x.iter().zip(&delta).map(|(a, b)| a + b).collect();
            let norm = |x: &[f32]| -> Vec<f32> {
                x.chunks_exact(width).flat_map(|row| reference::rms_norm(row, &weight, 1e-5)).collect()
            };
            for backend in backends() {
                let what = format!("{rows} x {width} on {}", backend.description());
                let w = upload_f32(&backend, &weight);
                let mut out = poison(&backend, rows * width);
                backend.rms_norm(&upload_f32(&backend, &x), &w, 1e-5, rows, InputForm::Plain, &mut out);
                assert_close(&read(&backend, &out), &norm(&x), 1e-6, &what);

                let mut residual = upload_f32(&backend, &x);
                let delta = upload_f32(&backend, &delta);
                backend.add_rms_norm(&delta, &mut residual, &w, 1e-5, rows, InputForm::Plain, &mut out);
                assert_bits(&read(&backend, &residual), &sum, &what);
                assert_close(&read(&backend, &out), &norm(&sum), 1e-6, &what);

                let gate_up: Vec<f32> = Random(8).vec(rows * 2 * width).iter().map(|v| v * 30.0).collect();
                let expected: Vec<f32> =
                    gate_up.chunks_exact(2 * width).flat_map(reference::silu_mul).collect();
                backend.silu_mul(&upload_f32(&backend, &gate_up), rows, width, &mut out);
                assert_close(&read(&backend, &out), &expected, 1e-6, &what);
            }
        }
    }
}

#[test]
fn exp_is_within_two_ulp_on_every_instruction_set_and_keeps_nan() {
    let xs: Vec<f32> = (-87_000..88_000).map(|i| i as f32 * 1e-3 + 3e-4).collect();
    let mut first: Option<Vec<f32>> = None;
    for isa in Isa::ALL.iter().copied().filter(|isa| isa.is_available()) {
        let mut out = vec![0.0; xs.len()];
        // SAFETY: `isa` is available.
        unsafe { exp_of(isa, &xs, 0.0, 1.0, &mut out) };
        for (x, y) in xs.iter().zip(&out) {
            let exact = f64::from(*x).exp();
            let ulp = f64::from(f32::from_bits(y.to_bits() + 1)) - f64::from(*y);
            assert!((f64::from(*y) - exact).abs() <= 2.0 * ulp, "e^{x} is {exact}, not {y} ({isa:?})");
        }
        assert_bits(&out, first.get_or_insert_with(|| out.clone()), "e^x");
    }
    let mut nan = vec![1.0; 16];
    nan[3] = f32::NAN;
    for backend in backends() {
        let mut out = poison(&backend, 8);
        backend.silu_mul(&upload_f32(&backend, &nan), 1, 8, &mut out);
        let out = read(&backend, &out);
        assert!(out[3].is_nan() && out[2].is_finite());
    }
}

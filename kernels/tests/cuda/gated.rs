//! Gated products against SwiGLU of sums in F64, by the kernels for few and for many rows.

use kernels::mx::{Cast, ElementType, MxFormat, quantize_dequantize};
use kernels::{Backend, Component, Dtype, InputForm, Weight};

use crate::gpu;
use crate::prefill::{Matrix, Random};

/// The result for `x` on `backend`, poisoned before.
fn gated(backend: &dyn Backend, x: &[f32], weight: &Weight) -> Vec<f32> {
    let [n, k] = weight.shape();
    let rows = x.len() / k;
    let alloc = |len| backend.alloc(Dtype::Bf16, len, Component::Workspace).unwrap();
    let (mut input, mut scratch, mut out) = (alloc(x.len()), alloc(rows * n), alloc(rows * n / 2));
    backend.write_f32(&mut input, 0, x);
    backend.write_f32(&mut out, 0, &vec![f32::NAN; rows * n / 2]);
    backend.gated_linear(&input, rows, weight, &mut scratch, InputForm::Plain, &mut out);
    let mut back = vec![0.0; rows * n / 2];
    backend.read_f32(&out, 0, &mut back);
    back
}

/// silu(gate) * up of row `x`, and how far from it rounding may lead.
fn expected(x: &[f32], [gate, up]: [&[f32]; 2], bias: [f32; 2]) -> (f64, f64) {
    let dot = |w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>();
    let (gate, up) = (dot(gate) + f64::from(bias[0]), dot(up) + f64::from(bias[1]));
    let result = gate / (1.0 + (-gate).exp()) * up;
    (result, result.abs() / 200.0 + 1e-3 * (1.0 + gate.abs() + up.abs()))
}

#[test]
fn gates_and_what_they_gate_are_multiplied_at_once() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(21);
    let int8 = Some(Cast::from(MxFormat::new(ElementType::Int8)));
    let e2m3 = Some(Cast::from(MxFormat::new(ElementType::E2m3)));
    for (element, activation) in [
        (ElementType::E2m1, None),
        (ElementType::E3m2, None),
        (ElementType::E4m3, None),
        (ElementType::Int8, int8),
        (ElementType::E2m1, e2m3),
    ] {
        // The last one runs in E4M3 where activations allow it; some halves are no multiple of eight.
        for (m, half, k) in [
            (1, 24, 96),
            (3, 1000, 352),
            (8, 13, 64),
            (9, 40, 128),
            (64, 500, 1184),
            (150, 77, 96),
            (2050, 520, 4160),
        ] {
            let scale = 1.0 / (k as f32).sqrt();
            let values: Vec<f32> = random.normals(2 * half * k).into_iter().map(|w| w * scale).collect();
            let weight = Matrix::new(element, [2 * half, k], &values);
            let (x, bias) = (random.normals(m * k), random.normals(2 * half));
            let uploaded = gpu.upload_gated(&[weight.source(activation)], Some(&bias)).unwrap();
            let actual = gated(&*gpu, &x, &uploaded);
            let mut seen = x.clone();
            if let Some(cast) = activation {
                quantize_dequantize(cast, &x, &mut seen);
            }
            for row in (0..m).step_by(m.div_ceil(9)) {
                for i in 0..half {
                    let w = |at: usize| &weight.values[at * k..][..k];
                    let pair = [w(i), w(half + i)];
                    let (expected, bound) = expected(&seen[row * k..][..k], pair, [bias[i], bias[half + i]]);
                    let got = f64::from(actual[row * half + i]);
                    let what = format!("{element:?}, {activation:?}, {m} x {half} x {k}");
                    assert!((got - expected).abs() <= bound, "{what}: [{row}, {i}] is {got}, not {expected}");
                }
            }
        }
    }
}

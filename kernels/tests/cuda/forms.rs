//! Operators that leave activations as products take them, against products that prepare them on their own: to the bit.

use std::iter::once;
use std::panic::{AssertUnwindSafe, catch_unwind};

use kernels::mx::{Cast, ElementType, MxFormat, Rotation};
use kernels::{Backend, Component, Device, Dtype, InputForm, Weight};

use crate::gpu;
use crate::prefill::{Matrix, Random, activations, multiply};

/// What weights declare, of every kind: element type of activations, and whether they are rotated.
const DECLARED: [(Option<ElementType>, bool); 8] = [
    (Some(ElementType::Int8), false),
    (Some(ElementType::E4m3), false),
    (Some(ElementType::E5m2), true),
    (Some(ElementType::E2m3), false),
    (Some(ElementType::E3m2), false),
    (Some(ElementType::E2m1), true),
    (Some(ElementType::E2m1), false),
    (None, true),
];

/// A weight `[n, k]` in E2M1 that declares this.
fn weight(
    gpu: &dyn Backend,
    [n, k]: [usize; 2],
    (activation, is_rotated): (Option<ElementType>, bool),
) -> Weight {
    let matrix = Matrix::new(ElementType::E2m1, [n, k], &Random(41).normals(n * k));
    let activation = activation.map(|element| Cast::from(MxFormat::new(element)));
    let rotation = is_rotated.then_some(Rotation::BlockHadamard);
    gpu.upload(&[matrix.source_of(activation, rotation)], None).unwrap()
}

/// Weights of a few rows and `k` columns, a multiple of 32, that declare all there is.
pub(crate) fn declaring(gpu: &dyn Backend, k: usize) -> Vec<Weight> {
    DECLARED.map(|declared| weight(gpu, [24, k], declared)).into()
}

/// The same bits, NaN or not.
fn assert_bits(actual: &[f32], expected: &[f32], what: &str) {
    for (i, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        assert!(actual.to_bits() == expected.to_bits(), "{what}, element {i}: {actual} for {expected}");
    }
}

/// Kinds of forms that were seen.
#[derive(Default)]
struct Seen {
    prepared: usize,
    e4m3: usize,
    /// Results that were compared and are numbers.
    finite: usize,
}

impl Seen {
    fn add(&mut self, form: InputForm) {
        match form {
            InputForm::Plain => {}
            InputForm::Prepared(_) => self.prepared += 1,
            InputForm::E4m3(_) => self.e4m3 += 1,
        }
    }
}

#[test]
fn norms_leave_rows_as_products_take_them() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(42);
    let mut seen = Seen::default();
    for [n, k] in [[40, 32], [40, 96], [40, 4096], [520, 4160], [520, 9216]] {
        for (kind, declared) in DECLARED.into_iter().enumerate() {
            let weight = weight(&*gpu, [n, k], declared);
            for rows in [1, 7, 20, 150, 2050] {
                // Long rows in E4M3 and not: a few of the kinds suffice.
                if rows * k > 1 << 20 && kind % 3 != 1 {
                    continue;
                }
                let alloc = |dtype, len| gpu.alloc(dtype, len, Component::Workspace).unwrap();
                let mut delta = alloc(Dtype::Bf16, rows * k);
                gpu.write_f32(&mut delta, 0, &activations(&mut random, rows, k));
                let mut norm = alloc(Dtype::F32, k);
                gpu.write_f32(&mut norm, 0, &random.normals(k));
                let form = gpu.input_form(&mut once(&weight), rows);
                seen.add(form);
                let results = [InputForm::Plain, form].map(|form| {
                    let mut out = alloc(Dtype::Bf16, rows * k);
                    gpu.write_f32(&mut out, 0, &vec![f32::NAN; rows * k]);
                    let mut residual = alloc(Dtype::F32, rows * k);
                    gpu.rms_norm(&delta, &norm, 1e-5, rows, form, &mut out);
                    assert!(out.form() == form, "norms can leave every form");
                    let alone = multiply(&*gpu, &out, rows, &weight, Dtype::F32);
                    gpu.add_rms_norm(&delta, &mut residual, &norm, 1e-5, rows, form, &mut out);
                    [alone, multiply(&*gpu, &out, rows, &weight, Dtype::F32)]
                });
                let [[plain, plain_sum], [left, left_sum]] = &results;
                let what = format!("{rows} x {k}, {declared:?}");
                assert_bits(left, plain, &what);
                assert_bits(left_sum, plain_sum, &format!("{what}, added"));
                seen.finite += plain_sum.iter().filter(|x| x.is_finite() && **x != 0.0).count();
            }
        }
    }
    assert!(seen.finite > 100_000, "some rows have NaN, but most have not");
    assert!(seen.prepared > 0 && seen.e4m3 > 0, "both forms are tried");
}

#[test]
fn gated_products_leave_rows_as_products_take_them() {
    let strict = Device::Cuda { ordinal: 0, strict: true };
    let (Some(_), Ok(gpu)) = (gpu(), kernels::open(strict)) else { return };
    let mut random = Random(43);
    let mut seen = Seen::default();
    for (half, k) in [(32, 96), (96, 160), (512, 64), (1056, 320)] {
        let normals = random.normals(2 * half * k);
        let gates = Matrix::new(ElementType::E2m1, [2 * half, k], &normals);
        let gates = gpu.upload_gated(&[gates.source(None)], None).unwrap();
        for declared in DECLARED {
            let down = weight(&*gpu, [40, half], declared);
            for rows in [1, 16, 17, 64, 150, 700] {
                let alloc = |len| gpu.alloc(Dtype::Bf16, len, Component::Workspace).unwrap();
                let mut x = alloc(rows * k);
                gpu.write_f32(&mut x, 0, &random.normals(rows * k));
                let form = gpu.input_form(&mut once(&down), rows);
                let [plain, left] = [InputForm::Plain, form].map(|form| {
                    let (mut scratch, mut out) = (alloc(0), alloc(rows * half));
                    gpu.write_f32(&mut out, 0, &vec![f32::NAN; rows * half]);
                    gpu.gated_linear(&x, rows, &gates, &mut scratch, form, &mut out);
                    if form != InputForm::Plain {
                        seen.add(out.form());
                    }
                    multiply(&*gpu, &out, rows, &down, Dtype::F32)
                });
                let what = format!("{rows} x {half}, {declared:?}");
                assert_bits(&left, &plain, &what);
                assert!(plain.iter().any(|x| x.is_finite() && *x != 0.0), "{what}: nothing is compared");
            }
        }
    }
    assert!(seen.prepared > 0, "the form is tried");
}

#[test]
fn other_products_do_not_take_what_was_left_for_one() {
    let Some(gpu) = gpu() else { return };
    let [first, second] = [DECLARED[0], DECLARED[1]].map(|declared| weight(&*gpu, [24, 64], declared));
    let mut x = gpu.alloc(Dtype::Bf16, 128, Component::Workspace).unwrap();
    let mut norm = gpu.alloc(Dtype::F32, 64, Component::Workspace).unwrap();
    gpu.write_f32(&mut norm, 0, &[1.0; 64]);
    let mut out = gpu.alloc(Dtype::Bf16, 128, Component::Workspace).unwrap();
    gpu.write_f32(&mut x, 0, &[1.0; 128]);
    gpu.rms_norm(&x, &norm, 1e-5, 2, gpu.input_form(&mut once(&first), 2), &mut out);
    let multiplied = catch_unwind(AssertUnwindSafe(|| multiply(&*gpu, &out, 2, &second, Dtype::F32)));
    assert!(multiplied.is_err(), "wrong numbers would come of it");
}

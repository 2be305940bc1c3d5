//! Operators that work row by row.

use kernels::mx::{Cast, ElementRounding, ElementType, MxFormat, MxTensor, Values, quantize_rows};
use kernels::{Backend, Buffer, DenseDtype, Dtype, InputForm, WeightSource};

use crate::common::{
    Devices, Random, activations, assert_close, assert_same, floats, integers, poisoned, read, to_bf16,
};

/// Half a unit in the last place of BF16, and what FP32 arithmetic in another order adds.
const ROUNDED: f32 = 1.0 / 256.0 + 1e-5;

#[test]
fn embed_reads_every_format() {
    let Some(Devices { gpu, cpu }) = Devices::open() else { return };
    let mut random = Random(1);
    for (rows, cols) in [(1, 32), (17, 64), (100, 96), (37, 576), (300, 1056)] {
        let table = random.f32(rows * cols, 2.0);
        let bytes: Vec<u8> = table.iter().flat_map(|x| x.to_le_bytes()).collect();
        let mut tokens: Vec<u32> = (0..40).map(|_| random.below(rows) as u32).collect();
        tokens.extend([0, rows as u32 - 1]);
        let check = |source: WeightSource<'_>, what: &str| {
            let run = |backend: &dyn Backend, dtype: Dtype| {
                let table = backend.upload(&[source], None).expect("memory");
                let mut out = floats(backend, dtype, &vec![f32::NAN; tokens.len() * cols]);
                backend.embed(&table, &integers(backend, &tokens), tokens.len(), &mut out);
                read(backend, &out)
            };
            let expected = run(&*cpu, Dtype::F32);
            let rounded: Vec<f32> = expected.iter().map(|&x| to_bf16(x)).collect();
            assert_same(&run(&*gpu, Dtype::Bf16), &rounded, what);
            // Dense tables are kept in BF16.
            let exact = if source.scheme().is_some() { &expected } else { &rounded };
            assert_same(&run(&*gpu, Dtype::F32), exact, what);
        };
        for element in ElementType::ALL {
            let format = MxFormat::new(element);
            let mut codes = vec![0; rows * format.code_bytes(cols)];
            let mut scales = vec![0; rows * format.scale_bytes(cols)];
            let cast = Cast::from(format);
            let values = Values::F32(&bytes);
            quantize_rows(cast, ElementRounding::NearestEven, values, 0, &mut codes, &mut scales)
                .expect("finite values");
            let tensor = MxTensor::new(format, [rows, cols], &codes, &scales).expect("a whole tensor");
            let scale_rounding = cast.scale_rounding;
            check(
                WeightSource::Mx { tensor, scale_rounding, activation: None, rotation: None },
                &format!("{format} [{rows}, {cols}]"),
            );
        }
        let halves = |bits: fn(f32) -> u16| -> Vec<u8> {
            table.iter().flat_map(|&x| bits(to_bf16(x)).to_le_bytes()).collect()
        };
        let bf16 = halves(|x| half::bf16::from_f32(x).to_bits());
        let shape = [rows, cols];
        check(WeightSource::Dense { dtype: DenseDtype::Bf16, shape, bytes: &bf16 }, "bf16");
        check(WeightSource::Dense { dtype: DenseDtype::F32, shape, bytes: &bytes }, "f32");
    }
}

#[test]
fn gather_moves_rows() {
    let Some(Devices { gpu, .. }) = Devices::open() else { return };
    let mut random = Random(2);
    for width in [1, 7, 8, 576, 4096] {
        let x = random.bf16(23 * width, 4.0);
        let indices: Vec<u32> = (0..31).map(|_| random.below(23) as u32).collect();
        let mut out = poisoned(&*gpu, indices.len() * width);
        gpu.gather_rows(&activations(&*gpu, &x), &integers(&*gpu, &indices), indices.len(), width, &mut out);
        let expected: Vec<f32> =
            indices.iter().flat_map(|&i| &x[i as usize * width..][..width]).copied().collect();
        assert_same(&read(&*gpu, &out), &expected, &format!("width {width}"));
    }
}

/// The norm of `x`, on one device.
fn norm(backend: &dyn Backend, x: &Buffer, weight: &[f32], rows: usize) -> Vec<f32> {
    let mut out = poisoned(backend, rows * weight.len());
    backend.rms_norm(x, &floats(backend, Dtype::F32, weight), 1e-5, rows, InputForm::Plain, &mut out);
    read(backend, &out)
}

#[test]
fn norms_of_every_width() {
    let Some(Devices { gpu, cpu }) = Devices::open() else { return };
    let mut random = Random(3);
    for width in [1, 7, 8, 64, 100, 576, 1000, 2048, 4096, 4104, 5120, 8192, 16384] {
        for (rows, dtype) in [(1, Dtype::F32), (5, Dtype::Bf16), (33, Dtype::F32)] {
            let what = format!("{rows} rows of {width}, {dtype:?}");
            let (x, delta) = (random.bf16(rows * width, 3.0), random.bf16(rows * width, 1.0));
            let weight = random.f32(width, 1.5);
            let expected = norm(&*cpu, &activations(&*cpu, &x), &weight, rows);
            let actual = norm(&*gpu, &floats(&*gpu, dtype, &x), &weight, rows);
            assert_close(&actual, &expected, ROUNDED, 1e-6, &what);
            // A row by itself has the same bits.
            let last = (rows - 1) * width;
            let alone = norm(&*gpu, &floats(&*gpu, dtype, &x[last..]), &weight, 1);
            assert_same(&alone, &actual[last..], &what);

            let add = |backend: &dyn Backend, dtype: Dtype| {
                let mut residual = floats(backend, dtype, &x);
                let mut out = poisoned(backend, rows * width);
                let weight = floats(backend, Dtype::F32, &weight);
                let delta = activations(backend, &delta);
                backend.add_rms_norm(&delta, &mut residual, &weight, 1e-5, rows, InputForm::Plain, &mut out);
                (read(backend, &residual), read(backend, &out))
            };
            let ((sum, out), (gpu_sum, gpu_out)) = (add(&*cpu, Dtype::F32), add(&*gpu, dtype));
            if dtype == Dtype::F32 {
                assert_same(&gpu_sum, &sum, &what);
                assert_close(&gpu_out, &out, ROUNDED, 1e-6, &what);
            } else {
                let rounded: Vec<f32> = sum.iter().map(|&x| to_bf16(x)).collect();
                assert_same(&gpu_sum, &rounded, &what);
                assert_close(&gpu_out, &out, 3.0 * ROUNDED, 1e-4, &what);
            }
        }
    }
}

#[test]
fn a_nan_spoils_its_row_alone() {
    let Some(Devices { gpu, .. }) = Devices::open() else { return };
    let width = 2304;
    let mut x = Random(4).bf16(3 * width, 1.0);
    x[width + 77] = f32::NAN;
    let out = norm(&*gpu, &activations(&*gpu, &x), &vec![1.0; width], 3);
    for (row, values) in out.chunks(width).enumerate() {
        assert!(values.iter().all(|v| v.is_nan() == (row == 1)), "row {row}");
    }
}

#[test]
fn silu_mul_of_every_width() {
    let Some(Devices { gpu, cpu }) = Devices::open() else { return };
    let mut random = Random(5);
    for (rows, width) in [(1, 1), (3, 30), (2, 768), (9, 1536), (1, 14336)] {
        let gate_up = random.bf16(rows * 2 * width, 20.0);
        let run = |backend: &dyn Backend| {
            let mut out = poisoned(backend, rows * width);
            backend.silu_mul(&activations(backend, &gate_up), rows, width, &mut out);
            read(backend, &out)
        };
        assert_close(&run(&*gpu), &run(&*cpu), ROUNDED, 1e-7, &format!("{rows} x {width}"));
    }
}

#[test]
fn rope_tables_hold_at_large_positions() {
    let Some(Devices { gpu, cpu }) = Devices::open() else { return };
    for (half, theta) in [(8, 1e4_f32), (32, 5e5), (64, 1e6), (128, 1e4)] {
        let inv_freq: Vec<f32> = (0..half).map(|i| theta.powf(-(i as f32) / half as f32)).collect();
        let positions = [0, 1, 2, 100, 4095, 65_537, 131_071, 1_000_003];
        let run = |backend: &dyn Backend| {
            let mut out = floats(backend, Dtype::F32, &vec![f32::NAN; positions.len() * 2 * half]);
            let inv_freq = floats(backend, Dtype::F32, &inv_freq);
            backend.rope_table(&integers(backend, &positions), &inv_freq, 1.25, positions.len(), &mut out);
            read(backend, &out)
        };
        assert_close(&run(&*gpu), &run(&*cpu), 0.0, 4e-7, &format!("half {half}"));
    }
}

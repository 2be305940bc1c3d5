//! Products of many rows: every weight format and every activation format against sums in F64, at odd shapes.

use half::bf16;
use kernels::mx::{
    Cast, ElementRounding, ElementType, MxFormat, MxTensor, Rotation, ScaleRounding, Values,
    quantize_dequantize, quantize_rows,
};
use kernels::{Backend, Buffer, Component, DenseDtype, Device, Dtype, InputForm, Weight, WeightSource};

use crate::gpu;

/// xorshift64*.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, n: u64) -> u64 {
        ((self.next() >> 32) * n) >> 32
    }

    /// Roughly normal, exactly BF16.
    fn normal(&mut self) -> f32 {
        let sum: f32 = (0..4).map(|_| self.below(1 << 16) as f32 / 65_536.0 - 0.5).sum();
        bf16::from_f32(sum * 1.7).to_f32()
    }

    pub(crate) fn normals(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.normal()).collect()
    }
}

/// An MX tensor `[rows, cols]`, and the values it decodes to.
pub(crate) struct Matrix {
    format: MxFormat,
    shape: [usize; 2],
    codes: Vec<u8>,
    scales: Vec<u8>,
    pub(crate) values: Vec<f32>,
}

impl Matrix {
    pub(crate) fn new(element: ElementType, shape: [usize; 2], values: &[f32]) -> Self {
        let format = MxFormat::new(element);
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let mut codes = vec![0; format.code_bytes(values.len())];
        let mut scales = vec![0; format.scale_bytes(values.len())];
        let rounding = ElementRounding::NearestEven;
        let cast = Cast::from(format);
        quantize_rows(cast, rounding, Values::F32(&bytes), 0, &mut codes, &mut scales).unwrap();
        let mut matrix = Self { format, shape, codes, scales, values: vec![0.0; values.len()] };
        let mut decoded = vec![0.0; values.len()];
        for (row, out) in decoded.chunks_exact_mut(shape[1]).enumerate() {
            matrix.tensor().dequantize_row(row, out);
        }
        matrix.values = decoded;
        matrix
    }

    pub(crate) fn format(&self) -> MxFormat {
        self.format
    }

    fn tensor(&self) -> MxTensor<'_> {
        MxTensor::new(self.format, self.shape, &self.codes, &self.scales).unwrap()
    }

    pub(crate) fn source(&self, activation: Option<Cast>) -> WeightSource<'_> {
        self.source_of(activation, None)
    }

    pub(crate) fn source_of(&self, activation: Option<Cast>, rotation: Option<Rotation>) -> WeightSource<'_> {
        let (tensor, scale_rounding) = (self.tensor(), ScaleRounding::Even);
        WeightSource::Mx { tensor, scale_rounding, activation, rotation }
    }
}

/// A product on `backend`, its output poisoned before, between two columns that must stay as they are.
pub(crate) fn product(backend: &dyn Backend, x: &[f32], weight: &Weight, dtype: Dtype) -> Vec<f32> {
    let mut input = backend.alloc(Dtype::Bf16, x.len(), Component::Workspace).unwrap();
    backend.write_f32(&mut input, 0, x);
    multiply(backend, &input, x.len() / weight.shape()[1], weight, dtype)
}

/// As [`product`], of `rows` rows that are on the device.
pub(crate) fn multiply(
    backend: &dyn Backend,
    input: &Buffer,
    rows: usize,
    weight: &Weight,
    dtype: Dtype,
) -> Vec<f32> {
    let n = weight.shape()[0];
    let (width, column) = (n + 16, 8);
    let mut out = backend.alloc(dtype, rows * width, Component::Workspace).unwrap();
    backend.write_f32(&mut out, 0, &vec![f32::from_bits(0x7FC1_0000); rows * width]);
    backend.linear(input, rows, weight, &mut out, width, column);
    let mut back = vec![0.0; rows * width];
    backend.read_f32(&out, 0, &mut back);
    let outside = |row: &[f32]| row[..column].iter().chain(&row[column + n..]).all(|x| x.is_nan());
    assert!(back.chunks_exact(width).all(outside), "columns of others are left alone");
    back.chunks_exact(width).flat_map(|row| row[column..column + n].iter().copied()).collect()
}

/// Holds `rows` of `actual` `[M, N]` to sums in F64 of `[M, K]` and `[N, K]`, K being `k`: within the rounding of the output,
/// and `bound` times the sum of magnitudes.
pub(crate) fn check(
    what: &str,
    actual: &[f32],
    [x, w]: [&[f32]; 2],
    bias: &[f32],
    k: usize,
    rows: &[usize],
    bound: f64,
) {
    let n = w.len() / k;
    for &m in rows {
        let x = &x[m * k..][..k];
        for (j, w) in w.chunks_exact(k).enumerate() {
            let (mut sum, mut magnitude) = (f64::from(bias[j]), 0.0);
            for (x, w) in x.iter().zip(w) {
                let term = f64::from(*x) * f64::from(*w);
                sum += term;
                magnitude += term.abs();
            }
            let (got, limit) = (f64::from(actual[m * n + j]), sum.abs() / 256.0 + bound * magnitude + 1e-30);
            assert!((got - sum).abs() <= limit, "{what}, row {m}, column {j}: {got} for {sum}");
        }
    }
}

#[test]
fn weights_of_every_format_multiply_at_odd_shapes() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(5);
    for (i, element) in ElementType::ALL.into_iter().enumerate() {
        for (m, n, k) in [(65, 8, 32), (130, 136, 96), (257, 400, 192), (300 + i, 1000 + 8 * i, 32 * (9 + i))]
        {
            let weight = Matrix::new(element, [n, k], &random.normals(n * k));
            let (x, bias) = (random.normals(m * k), random.normals(n));
            let uploaded = gpu.upload(&[weight.source(None)], Some(&bias)).unwrap();
            let rows: Vec<usize> = (0..m).collect();
            for dtype in [Dtype::Bf16, Dtype::F32] {
                let actual = product(&*gpu, &x, &uploaded, dtype);
                let what = format!("{element:?} {m} x {n} x {k}, {dtype:?}");
                check(&what, &actual, [&x, &weight.values], &bias, k, &rows, 1e-6);
            }
        }
    }
}

#[test]
fn dense_weights_multiply_with_columns_in_any_number() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(6);
    for (m, n, k) in [(70, 13, 40), (129, 77, 104), (600, 259, 8 * 41)] {
        let (w, x) = (random.normals(n * k), random.normals(m * k));
        let bytes: Vec<u8> = w.iter().flat_map(|w| bf16::from_f32(*w).to_le_bytes()).collect();
        let source = WeightSource::Dense { dtype: DenseDtype::Bf16, shape: [n, k], bytes: &bytes };
        let uploaded = gpu.upload(&[source], None).unwrap();
        let actual = product(&*gpu, &x, &uploaded, Dtype::Bf16);
        let rows: Vec<usize> = (0..m).collect();
        check(&format!("{m} x {n} x {k}"), &actual, [&x, &w], &vec![0.0; n], k, &rows, 1e-6);
    }
}

/// Blocks of very different sizes, zeros, subnormals, and values at the borders of scales.
pub(crate) fn activations(random: &mut Random, rows: usize, cols: usize) -> Vec<f32> {
    let mut x = random.normals(rows * cols);
    for block in x.chunks_exact_mut(32) {
        let factor = match random.below(12) {
            0 => 0.0,
            1 => 2.0_f32.powi(-120),
            2 => 2.0_f32.powi(100),
            _ => 2.0_f32.powi(random.below(12) as i32 - 6),
        };
        block.iter_mut().for_each(|x| *x = bf16::from_f32(*x * factor).to_f32());
        if random.below(4) == 0 {
            block[7] = factor * (1.0 + random.below(128) as f32 / 128.0);
        }
    }
    x
}

#[test]
fn activations_are_quantized_as_the_definition_says() {
    let strict = Device::Cuda { ordinal: 0, strict: true };
    let (Some(_), Ok(gpu)) = (gpu(), kernels::open(strict)) else { return };
    let (m, k) = (150, 256);
    let mut random = Random(7);
    // Through the identity, a product is its input.
    let identity: Vec<f32> = (0..k * k).map(|i| if i / k == i % k { 1.0 } else { 0.0 }).collect();
    let identity = Matrix::new(ElementType::E4m3, [k, k], &identity);
    for element in ElementType::ALL {
        for scale_rounding in ScaleRounding::ALL {
            let cast = Cast { format: MxFormat::new(element), scale_rounding };
            let refused = scale_rounding == ScaleRounding::Mse || element == ElementType::E3m0;
            let Ok(weight) = gpu.upload(&[identity.source(Some(cast))], None) else {
                assert!(refused, "{cast:?} is refused");
                continue;
            };
            assert!(!refused, "{cast:?} has no kernel");
            let x = activations(&mut random, m, k);
            let mut expected = vec![0.0; x.len()];
            quantize_dequantize(cast, &x, &mut expected);
            let actual = product(&*gpu, &x, &weight, Dtype::F32);
            for (i, (actual, expected)) in actual.iter().zip(&expected).enumerate() {
                let expected = bf16::from_f32(*expected).to_f32();
                assert!(*actual == expected, "{cast:?}, element {i}: {actual} for {expected}");
            }
        }
    }
}

/// Weight and activation formats that run as E4M3 when there is enough to do.
const E4M3_FORMATS: [ElementType; 4] =
    [ElementType::E2m1, ElementType::E2m3, ElementType::E3m2, ElementType::E4m3];

#[test]
fn products_in_e4m3_are_those_of_the_declared_formats() {
    let Some(gpu) = gpu() else { return };
    // An odd number of tiles along K, rows that fill no block.
    let (m, n, k) = (2050, 1016, 4160);
    let mut random = Random(8);
    let (x, w) = (random.normals(m * k), random.normals(n * k));
    let rows = [0, 1, 127, 128, 255, 256, 1000, 2047, 2048, 2049];
    for weight in E4M3_FORMATS {
        let weight = Matrix::new(weight, [n, k], &w);
        for element in E4M3_FORMATS {
            let cast = Cast::from(MxFormat::new(element));
            let uploaded = gpu.upload(&[weight.source(Some(cast))], None).unwrap();
            let before = gpu.rounded_tokens();
            let actual = product(&*gpu, &x, &uploaded, Dtype::Bf16);
            let mut quantized = vec![0.0; x.len()];
            quantize_dequantize(cast, &x, &mut quantized);
            let what = format!("{} x {element:?}", weight.format);
            // The tensor core adds E4M3 products with 14 bits, within 128 of K. Over all of K that would be 3e-5.
            check(&what, &actual, [&quantized, &weight.values], &vec![0.0; n], k, &rows, 1e-5);
            // That E4M3's are counted shows that the product did run in E4M3.
            let counted = gpu.rounded_tokens() > before;
            assert!(counted == (element == ElementType::E4m3), "{what}: {counted}");
        }
    }
}

/// FP4 `[n, k]` of any codes, whose blocks are up to `most` binades apart, or zero.
fn fp4_blocks(random: &mut Random, [n, k]: [usize; 2], most: u64) -> Matrix {
    const MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let mut values = vec![0.0; n * k];
    for block in values.chunks_exact_mut(32) {
        let distance = random.below(most + 2);
        if distance > most {
            continue;
        }
        let scale = 2.0_f32.powi(-(distance as i32));
        for value in block.iter_mut() {
            let sign = if random.below(2) == 0 { scale } else { -scale };
            *value = sign * MAGNITUDES[random.below(8) as usize];
        }
        // The largest number there is, so that the block's scale is this one.
        block[random.below(32) as usize] = 6.0 * scale;
    }
    let matrix = Matrix::new(ElementType::E2m1, [n, k], &values);
    assert!(matrix.values == values, "FP4 has all of them");
    matrix
}

/// The shapes' plans are tested in `plan.rs`.
#[test]
fn packed_weights_multiply_in_e4m3() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(12);
    let cast = Cast::from(MxFormat::new(ElementType::E2m3));
    // All codes at all distances from a row's largest scale that E4M3 allows. Through the identity, a product is its weights.
    let (n, k) = (20_000, 256);
    let weight = fp4_blocks(&mut random, [n, k], 14);
    let identity: Vec<f32> = (0..k * k).map(|i| if i / k == i % k { 1.0 } else { 0.0 }).collect();
    let uploaded = gpu.upload(&[weight.source(Some(cast))], None).unwrap();
    assert!(matches!(gpu.input_form(&mut std::iter::once(&uploaded), k), InputForm::E4m3(_)));
    let actual = product(&*gpu, &identity, &uploaded, Dtype::F32);
    for (i, actual) in actual.iter().enumerate() {
        let expected = weight.values[i % n * k + i / n];
        assert!(*actual == expected, "column {}, row {}: {actual} for {expected}", i % n, i / n);
    }

    // Sums that lose no bit in the tensor core's 14, of 128 products of at most 12 in steps of 1/4: blocks of tokens and rows that
    // are not full, half a stage, K in parts.
    for (m, n, k) in [(250, 20_008, 352), (200, 4096, 8256)] {
        let weight = fp4_blocks(&mut random, [n, k], 1);
        let x: Vec<f32> = (0..m * k).map(|_| random.below(5) as f32 - 2.0).collect();
        let bias: Vec<f32> = (0..n).map(|i| i as f32).collect();
        let uploaded = gpu.upload(&[weight.source(Some(cast))], Some(&bias)).unwrap();
        let actual = product(&*gpu, &x, &uploaded, Dtype::F32);
        for row in [0, 1, 127, 128, 199] {
            for (j, w) in weight.values.chunks_exact(k).enumerate() {
                let sum: f32 = x[row * k..][..k].iter().zip(w).map(|(x, w)| x * w).sum();
                let (got, expected) = (actual[row * n + j], sum + bias[j]);
                assert!(got == expected, "{m} x {n} x {k}, row {row}, column {j}: {got} for {expected}");
            }
        }
        assert!(actual == product(&*gpu, &x, &uploaded, Dtype::F32), "{m} x {n} x {k}, again");
    }
}

#[test]
fn nan_stays_in_its_row() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(9);
    for (m, n, k) in [(100, 200, 128), (2050, 1016, 4160)] {
        let mut weight = Matrix::new(ElementType::E2m1, [n, k], &random.normals(n * k));
        weight.scales[17 * k / 32 + 1] = 255;
        let mut x = random.normals(m * k);
        x[3 * k + 70] = f32::NAN;
        x[66 * k + 5] = f32::INFINITY;
        for activation in [None, Some(Cast::from(MxFormat::new(ElementType::E2m3)))] {
            let uploaded = gpu.upload(&[weight.source(activation)], None).unwrap();
            let actual = product(&*gpu, &x, &uploaded, Dtype::Bf16);
            for (i, y) in actual.iter().enumerate() {
                let (row, column) = (i / n, i % n);
                // Without quantization infinity times a number is infinity, or NaN.
                let poisoned = row == 3 || row == 66 || column == 17;
                assert!(
                    y.is_finite() != poisoned,
                    "{m} x {n} x {k}, {activation:?}: [{row}, {column}] is {y}"
                );
            }
        }
    }
}

#[test]
fn parts_of_k_add_up_the_same_every_time() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(11);
    // Few blocks and much of K: cut into parts, also uneven ones, by kernels for 64, 128 and 256 tokens.
    for (element, m, n, k) in [
        (ElementType::E2m1, 64, 300, 4160),
        (ElementType::E2m3, 40, 520, 32 * 67),
        (ElementType::E4m3, 200, 1000, 8192),
        (ElementType::Int8, 250, 4096, 2048),
        (ElementType::E2m1, 500, 2000, 8192),
    ] {
        let weight = Matrix::new(element, [n, k], &random.normals(n * k));
        let (x, bias) = (random.normals(m * k), random.normals(n));
        let uploaded = gpu.upload(&[weight.source(None)], Some(&bias)).unwrap();
        let what = format!("{element:?} {m} x {n} x {k}");
        let actual = product(&*gpu, &x, &uploaded, Dtype::F32);
        let rows: Vec<usize> = (0..m).step_by(7).collect();
        check(&what, &actual, [&x, &weight.values], &bias, k, &rows, 1e-6);
        for _ in 0..20 {
            assert!(actual == product(&*gpu, &x, &uploaded, Dtype::F32), "{what}, again");
        }
        if m <= 64 {
            let some = product(&*gpu, &x[..35 * k], &uploaded, Dtype::F32);
            assert!(some == actual[..35 * n], "{what}: fewer rows");
        }
    }
}

#[test]
fn a_rows_result_depends_on_no_other_row() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(10);
    let (m, n, k) = (700, 520, 352);
    let weight = Matrix::new(ElementType::E2m3, [n, k], &random.normals(n * k));
    let uploaded = gpu.upload(&[weight.source(None)], None).unwrap();
    let x = random.normals(m * k);
    let all = product(&*gpu, &x, &uploaded, Dtype::F32);
    for (first, rows) in [(0, 70), (65, 130), (100, 600), (333, 367)] {
        let some = product(&*gpu, &x[first * k..][..rows * k], &uploaded, Dtype::F32);
        assert!(some == all[first * n..][..rows * n], "rows {first} and {rows} more");
    }
}

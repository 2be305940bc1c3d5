//! Products of few rows, held to sums in F64 of the values that weights and activations stand for.

use half::bf16;
use kernels::mx::{Cast, ElementType, MxFormat, MxTensor, ScaleRounding, pack, quantize_dequantize};
use kernels::{Backend, Buffer, Component, DenseDtype, Dtype, Weight, WeightSource};

use crate::gpu;

/// Largest error of a sum of products accumulated in FP32, relative to the sum of their magnitudes.
const TOLERANCE: f64 = 2e-6;

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// Between -1 and 1.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// BF16 values of a few binades.
    fn activations(&mut self, len: usize) -> Vec<f32> {
        let mut value = || {
            let exponent = (self.next() % 8) as f32 - 5.0;
            bf16::from_f32(self.unit() * exponent.exp2()).to_f32()
        };
        (0..len).map(|_| value()).collect()
    }
}

/// Rows of a weight as a checkpoint holds them.
struct Rows {
    format: Option<MxFormat>,
    shape: [usize; 2],
    codes: Vec<u8>,
    scales: Vec<u8>,
}

impl Rows {
    /// Random codes, all of them numbers, with scales of several binades and zero blocks.
    fn mx(random: &mut Random, element: ElementType, shape: [usize; 2]) -> Self {
        let [rows, cols] = shape;
        let finite = |code: u8| if element.decode(code).is_finite() { code } else { 0 };
        let mut codes: Vec<u8> =
            (0..rows * cols).map(|_| finite(random.next() as u8 & element.spec().code_mask())).collect();
        codes.chunks_mut(32).filter(|_| random.next().is_multiple_of(9)).for_each(|block| block.fill(0));
        let mut packed = vec![0; codes.len() * element.spec().bits as usize / 8];
        pack(&codes, element.spec().bits, &mut packed);
        let scales = (0..rows * cols / 32).map(|_| 118 + (random.next() % 7) as u8).collect();
        Self { format: Some(MxFormat::new(element)), shape, codes: packed, scales }
    }

    fn dense(random: &mut Random, shape: [usize; 2]) -> Self {
        let bytes = (0..shape[0] * shape[1]).flat_map(|_| bf16::from_f32(random.unit()).to_le_bytes());
        Self { format: None, shape, codes: bytes.collect(), scales: Vec::new() }
    }

    fn source(&self, activation: Option<Cast>) -> WeightSource<'_> {
        match self.format {
            Some(format) => WeightSource::Mx {
                tensor: MxTensor::new(format, self.shape, &self.codes, &self.scales).unwrap(),
                scale_rounding: ScaleRounding::Even,
                activation,
                rotation: None,
            },
            None => WeightSource::Dense { dtype: DenseDtype::Bf16, shape: self.shape, bytes: &self.codes },
        }
    }

    /// `[N, K]`.
    fn values(&self) -> Vec<f32> {
        match self.source(None) {
            WeightSource::Mx { tensor, .. } => {
                let mut values = vec![0.0; self.shape[0] * self.shape[1]];
                for (row, values) in values.chunks_mut(self.shape[1]).enumerate() {
                    tensor.dequantize_row(row, values);
                }
                values
            }
            WeightSource::Dense { bytes, .. } => {
                let (pairs, _) = bytes.as_chunks();
                pairs.iter().map(|pair| bf16::from_le_bytes(*pair).to_f32()).collect()
            }
        }
    }
}

fn buffer(gpu: &dyn Backend, dtype: Dtype, values: &[f32]) -> Buffer {
    let mut buffer = gpu.alloc(dtype, values.len(), Component::Workspace).unwrap();
    gpu.write_f32(&mut buffer, 0, values);
    buffer
}

/// The product of `x` and `weight` in columns `column ..` of rows of `width` elements that were NaN.
fn product(
    gpu: &dyn Backend,
    x: &[f32],
    weight: &Weight,
    dtype: Dtype,
    [width, column]: [usize; 2],
) -> Vec<f32> {
    let rows = x.len() / weight.shape()[1];
    let mut out = buffer(gpu, dtype, &vec![f32::NAN; rows * width]);
    gpu.linear(&buffer(gpu, Dtype::Bf16, x), rows, weight, &mut out, width, column);
    let mut values = vec![0.0; rows * width];
    gpu.read_f32(&out, 0, &mut values);
    values
}

/// Compares a product with sums in F64; outside of its columns nothing is written.
fn check(
    what: &str,
    gpu: &dyn Backend,
    random: &mut Random,
    rows: &Rows,
    activation: Option<Cast>,
    m: usize,
    dtype: Dtype,
) {
    let [n, k] = rows.shape;
    let bias: Option<Vec<f32>> =
        random.next().is_multiple_of(2).then(|| (0..n).map(|_| random.unit()).collect());
    let weight = gpu.upload(&[rows.source(activation)], bias.as_deref()).unwrap();
    let x = random.activations(m * k);
    let mut inputs = x.clone();
    if let Some(cast) = activation {
        x.chunks(k).zip(inputs.chunks_mut(k)).for_each(|(x, out)| quantize_dequantize(cast, x, out));
    }
    let [width, column] = [n + 3 + random.next() as usize % 4, random.next() as usize % 3];
    let out = product(gpu, &x, &weight, dtype, [width, column]);
    let weights = rows.values();
    for (m, (out, x)) in out.chunks(width).zip(inputs.chunks(k)).enumerate() {
        for (at, &value) in out.iter().enumerate() {
            let Some(n) = at.checked_sub(column).filter(|&at| at < n) else {
                assert!(value.is_nan(), "{what}: column {at} of row {m} was written");
                continue;
            };
            let products = weights[n * k..][..k].iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
            let (sum, magnitude) = products.fold((0.0, 0.0), |(sum, all), p| (sum + p, all + p.abs()));
            let expected = sum + bias.as_ref().map_or(0.0, |bias| f64::from(bias[n]));
            let rounding = if dtype == Dtype::Bf16 { expected.abs() / 256.0 } else { 0.0 };
            let error = (f64::from(value) - expected).abs();
            // Not `error > bound`: NaN is an error too.
            assert!(
                error <= magnitude * TOLERANCE + rounding + 1e-6,
                "{what}: row {m}, column {n}: {value} instead of {expected}"
            );
        }
    }
}

/// Odd edges of M, N and K, and shapes with more than one round of the grid.
const SHAPES: [[usize; 3]; 9] = [
    [1, 1, 32],
    [2, 17, 64],
    [3, 33, 96],
    [8, 100, 576],
    [9, 40, 1536],
    [16, 130, 320],
    [31, 65, 2880],
    [64, 48, 128],
    [1, 5000, 160],
];

#[test]
fn every_format_gives_the_product_of_what_it_stands_for() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(11);
    for element in ElementType::ALL {
        for [m, n, k] in SHAPES {
            let rows = Rows::mx(&mut random, element, [n, k]);
            let dtype = if random.next().is_multiple_of(2) { Dtype::F32 } else { Dtype::Bf16 };
            check(&format!("{element:?} {m} {n} {k}"), &*gpu, &mut random, &rows, None, m, dtype);
        }
    }
    for [m, n, k] in SHAPES.into_iter().chain([[5, 33, 72], [1, 7, 8], [4, 20, 200]]) {
        let rows = Rows::dense(&mut random, [n, k]);
        check(&format!("dense {m} {n} {k}"), &*gpu, &mut random, &rows, None, m, Dtype::F32);
    }
}

#[test]
fn inputs_are_quantized_as_declared() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(12);
    let elements = [ElementType::E4m3, ElementType::E2m3, ElementType::E2m1, ElementType::Int8];
    for activation in elements {
        for scale_rounding in [ScaleRounding::Floor, ScaleRounding::Even, ScaleRounding::Rceil] {
            let cast = Cast { format: MxFormat::new(activation), scale_rounding };
            for (weight, [m, n, k]) in
                elements.into_iter().zip([[1, 50, 512], [5, 33, 96], [17, 20, 1024], [64, 16, 64]])
            {
                let rows = Rows::mx(&mut random, weight, [n, k]);
                let what = format!("{weight:?} x {activation:?} {scale_rounding} {m} {n} {k}");
                check(&what, &*gpu, &mut random, &rows, Some(cast), m, Dtype::F32);
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_neighbours() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(13);
    // Few tiles for a warp, whole groups of four and more, a weight whose K is cut into fewer parts, and rows so long that even
    // one takes several blocks.
    let shapes = [[70, 1408], [33, 4160], [6200, 1088], [17, 114_688]];
    for element in [ElementType::E2m1, ElementType::E2m3, ElementType::E4m3, ElementType::Int8] {
        for [n, k] in shapes {
            let rows = Rows::mx(&mut random, element, [n, k]);
            let weight = gpu.upload(&[rows.source(None)], None).unwrap();
            let x = random.activations(16 * k);
            let together = product(&*gpu, &x, &weight, Dtype::F32, [n, 0]);
            let again = product(&*gpu, &x, &weight, Dtype::F32, [n, 0]);
            assert_eq!(together, again, "{element:?} {n} {k}");
            for m in [1, 2, 3, 8, 11] {
                let some = product(&*gpu, &x[..m * k], &weight, Dtype::F32, [n, 0]);
                assert_eq!(together[..m * n], some, "{element:?} {n} {k}: the first {m}");
            }
        }
    }
}

/// Nothing is lost at either end of what numbers F32 has.
#[test]
fn inputs_of_any_ordinary_size_give_the_same_digits() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(15);
    for element in ElementType::ALL {
        let ([n, k], m) = ([40, 576], 3);
        let rows = Rows::mx(&mut random, element, [n, k]);
        let weight = gpu.upload(&[rows.source(None)], None).unwrap();
        let x = random.activations(m * k);
        let result = product(&*gpu, &x, &weight, Dtype::F32, [n, 0]);
        for exponent in [-30.0_f32, 30.0] {
            let scaled = |values: &[f32]| values.iter().map(|v| v * exponent.exp2()).collect::<Vec<f32>>();
            let actual = product(&*gpu, &scaled(&x), &weight, Dtype::F32, [n, 0]);
            assert_eq!(actual, scaled(&result), "{element:?}: times 2^{exponent}");
        }
    }
}

#[test]
fn a_nan_spoils_its_row_and_no_other() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(14);
    let ([n, k], m) = ([40, 160], 3);
    let mut rows = Rows::mx(&mut random, ElementType::E2m1, [n, k]);
    // A scale of weight row 17.
    rows.scales[17 * k / 32 + 2] = 255;
    let weight = gpu.upload(&[rows.source(None)], None).unwrap();
    let mut x = random.activations(m * k);
    x[k + 77] = f32::NAN;
    let out = product(&*gpu, &x, &weight, Dtype::F32, [n, 0]);
    for (at, value) in out.iter().enumerate() {
        assert_eq!(value.is_nan(), at / n == 1 || at % n == 17, "row {}, column {}", at / n, at % n);
    }
}

//! Products whose input is rotated first, against the definition of the rotation on the host.

use half::bf16;
use kernels::mx::{Block, Cast, ElementType, MxFormat, Rotation, quantize_dequantize};
use kernels::{Device, Dtype};

use crate::gpu;
use crate::prefill::{Matrix, Random, activations, check, product};

/// `x`, rows of a multiple of 32, rotated and then quantized by `cast`.
fn prepared(x: &[f32], cast: Option<Cast>) -> Vec<f32> {
    let mut rotated = x.to_vec();
    Rotation::BlockHadamard.apply(Block::OCP, &mut rotated);
    let Some(cast) = cast else { return rotated };
    let mut quantized = vec![0.0; x.len()];
    quantize_dequantize(cast, &rotated, &mut quantized);
    quantized
}

/// Through the identity, a product is its input: every bit of what is multiplied is seen, by kernels for few and many rows.
#[test]
fn inputs_are_rotated_and_then_quantized_to_the_bit() {
    let strict = Device::Cuda { ordinal: 0, strict: true };
    let (Some(_), Ok(gpu)) = (gpu(), kernels::open(strict)) else { return };
    let k = 288;
    let identity: Vec<f32> = (0..k * k).map(|i| if i / k == i % k { 1.0 } else { 0.0 }).collect();
    let identity = Matrix::new(ElementType::E4m3, [k, k], &identity);
    let mut random = Random(31);
    let elements =
        [ElementType::Int8, ElementType::E4m3, ElementType::E5m2, ElementType::E2m3, ElementType::E2m1];
    let formats = elements.map(|element| Some(Cast::from(MxFormat::new(element))));
    for cast in formats.into_iter().chain([None]) {
        let source = identity.source_of(cast, Some(Rotation::BlockHadamard));
        let weight = gpu.upload(&[source], None).unwrap();
        for m in [1, 7, 150] {
            // Kernels for few rows want numbers of an ordinary size.
            let x = if m < 17 { random.normals(m * k) } else { activations(&mut random, m, k) };
            let expected = prepared(&x, cast);
            let actual = product(&*gpu, &x, &weight, Dtype::F32);
            for (i, (actual, expected)) in actual.iter().zip(&expected).enumerate() {
                let expected = bf16::from_f32(*expected).to_f32();
                assert!(*actual == expected, "{cast:?}, {m} rows, element {i}: {actual} for {expected}");
            }
        }
    }
}

#[test]
fn rotated_inputs_multiply_in_e4m3() {
    let Some(gpu) = gpu() else { return };
    // Rows of which a thread has several pieces.
    let (m, n, k) = (2050, 520, 9216);
    let mut random = Random(32);
    let (x, w) = (random.normals(m * k), random.normals(n * k));
    let rows = [0, 1, 255, 1000, 2049];
    for (weight, activation) in
        [(ElementType::E2m1, ElementType::E2m3), (ElementType::E2m3, ElementType::E4m3)]
    {
        let weight = Matrix::new(weight, [n, k], &w);
        let cast = Some(Cast::from(MxFormat::new(activation)));
        let source = weight.source_of(cast, Some(Rotation::BlockHadamard));
        let uploaded = gpu.upload(&[source], None).unwrap();
        let before = gpu.rounded_tokens();
        let actual = product(&*gpu, &x, &uploaded, Dtype::Bf16);
        let what = format!("{} x {activation:?}", weight.format());
        check(&what, &actual, [&prepared(&x, cast), &weight.values], &vec![0.0; n], k, &rows, 1e-5);
        // That tokens of E4M3 are counted shows that the product did run in E4M3.
        let counted = gpu.rounded_tokens() > before;
        assert!(counted == (activation == ElementType::E4m3), "{what}: {counted}");
    }
}

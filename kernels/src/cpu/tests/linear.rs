//! Matrix products.

use super::*;
use crate::backend::DenseDtype;
use crate::mx::{Block, ElementRounding, Rotation, Values, quantize_dequantize, quantize_rows};

#[test]
fn linear_equals_its_definition_for_every_format_and_number_of_rows() {
    // 70 outputs leave a partial row group; 1120 columns make a second, partial panel.
    for shape in [[70, 96], [16, 32], [37, 1120]] {
        for element in ElementType::ALL {
            let weight = TestWeight::random(MxFormat::new(element), shape, 7);
            let (elements, scales) = weight.parts();
            let bias = Random(3).vec(shape[0]);
            for rows in [1, 2, 3, 4, 5, 12, 17, 31] {
                let x = Random(11).vec(rows * shape[1]);
                let seen = match weight.sum() {
                    BlockSum::Exact => reference::block_fixed_point(&x),
                    BlockSum::Chained => x.clone(),
                };
                let expected =
                    reference::linear(weight.sum(), &seen, &elements, Some(&scales), Some(&bias), shape);
                for backend in backends() {
                    let what = format!("{element:?} {shape:?} x {rows} on {}", backend.description());
                    let w = backend.upload(&[weight.source(None)], Some(&bias)).unwrap();
                    let mut out = poison(&backend, rows * shape[0]);
                    backend.linear(&upload_f32(&backend, &x), rows, &w, &mut out, shape[0], 0);
                    assert_bits(&read(&backend, &out), &expected, &what);
                }
            }
        }
    }
}

/// A rotated weight's product is that of the rotated input, with its activation format applied after.
#[test]
fn inputs_are_rotated_before_they_are_quantized() {
    let shape = [35, 96];
    let weight = TestWeight::random(MxFormat::new(ElementType::E2m1), shape, 1);
    for activation in [None, Some(Cast::from(MxFormat::new(ElementType::E4m3)))] {
        let WeightSource::Mx { tensor, scale_rounding, .. } = weight.source(activation) else {
            unreachable!("a test weight is MX")
        };
        let rotation = Some(Rotation::BlockHadamard);
        let rotated = WeightSource::Mx { tensor, scale_rounding, activation, rotation };
        for rows in [1, 5, 200] {
            let x = Random(8).vec(rows * shape[1]);
            let mut turned = x.clone();
            Rotation::BlockHadamard.apply(Block::OCP, &mut turned);
            for backend in backends() {
                let product = |source: WeightSource<'_>, x: &[f32]| {
                    let w = backend.upload(&[source], None).unwrap();
                    let mut out = poison(&backend, rows * shape[0]);
                    backend.linear(&upload_f32(&backend, x), rows, &w, &mut out, shape[0], 0);
                    read(&backend, &out)
                };
                let what = format!("{activation:?} x {rows} on {}", backend.description());
                assert_bits(&product(rotated, &x), &product(weight.source(activation), &turned), &what);
            }
        }
    }
}

#[test]
fn many_rows_are_cut_as_defined() {
    // More tokens than a task takes at least, and than stay in a cache beside the weights.
    let (shape, rows) = ([20, 2112], 190);
    let formats =
        [(ElementType::E2m1, None), (ElementType::Int8, Some(ElementType::Int8)), (ElementType::E4m3, None)];
    // Scales and activations that leave room for the sums in an F32's exponent, and some that do not.
    for ((element, activation), extreme) in formats.into_iter().flat_map(|f| [(f, false), (f, true)]) {
        let mut weight = TestWeight::random(MxFormat::new(element), shape, 7);
        let cast = activation.map(|element| Cast::from(MxFormat::new(element)));
        let mut x = Random(11).vec(rows * shape[1]);
        x[..32].fill(0.0);
        if extreme {
            weight.scales[5] = 3;
            weight.scales[70] = 250;
            x[3 * shape[1]..][..40].fill(f32::MIN_POSITIVE);
            x[7 * shape[1]] = f32::NAN;
        }
        let (elements, scales) = weight.parts();
        let mut seen = x.clone();
        match cast {
            Some(cast) => quantize_dequantize(cast, &x, &mut seen),
            None if weight.sum() == BlockSum::Exact => seen = reference::block_fixed_point(&x),
            None => {}
        }
        let expected = reference::linear(weight.sum(), &seen, &elements, Some(&scales), None, shape);
        for backend in backends() {
            let w = backend.upload(&[weight.source(cast)], None).unwrap();
            let mut out = poison(&backend, rows * shape[0]);
            backend.linear(&upload_f32(&backend, &x), rows, &w, &mut out, shape[0], 0);
            let what = format!("{element:?} on {}", backend.description());
            assert_bits(&read(&backend, &out), &expected, &what);
        }
    }
}

#[test]
fn dense_linear_takes_any_number_of_columns_and_each_dtype() {
    for shape in [[33, 50], [20, 64], [5, 1100]] {
        let values = Random(5).vec(shape[0] * shape[1]);
        for dtype in [DenseDtype::Bf16, DenseDtype::F16, DenseDtype::F32] {
            let (bytes, elements): (Vec<u8>, Vec<f32>) = match dtype {
                DenseDtype::Bf16 => {
                    let v: Vec<_> = values.iter().map(|&v| half::bf16::from_f32(v)).collect();
                    (v.iter().flat_map(|v| v.to_le_bytes()).collect(), v.iter().map(|v| v.to_f32()).collect())
                }
                DenseDtype::F16 => {
                    let v: Vec<_> = values.iter().map(|&v| half::f16::from_f32(v)).collect();
                    (v.iter().flat_map(|v| v.to_le_bytes()).collect(), v.iter().map(|v| v.to_f32()).collect())
                }
                DenseDtype::F32 => (values.iter().flat_map(|v| v.to_le_bytes()).collect(), values.clone()),
            };
            for rows in [1, 6, 13] {
                let x = Random(2).vec(rows * shape[1]);
                let expected = reference::linear(BlockSum::Chained, &x, &elements, None, None, shape);
                for backend in backends() {
                    let source = WeightSource::Dense { dtype, shape, bytes: &bytes };
                    let w = backend.upload(&[source], None).unwrap();
                    // The result's columns are in the middle of wider rows.
                    let width = shape[0] + 9;
                    let mut out = upload_f32(&backend, &vec![-7.0; rows * width]);
                    backend.linear(&upload_f32(&backend, &x), rows, &w, &mut out, width, 4);
                    let out = read(&backend, &out);
                    for (row, expected) in out.chunks_exact(width).zip(expected.chunks_exact(shape[0])) {
                        assert_bits(&row[4..4 + shape[0]], expected, &format!("{dtype:?} {shape:?}"));
                        assert!(row[..4].iter().chain(&row[4 + shape[0]..]).all(|&v| v == -7.0));
                    }
                    let mut row = poison(&backend, shape[1]);
                    backend.embed(&w, &upload_u32(&backend, &[3]), 1, &mut row);
                    assert_bits(&read(&backend, &row), &elements[3 * shape[1]..][..shape[1]], "embed");
                }
            }
        }
    }
}

#[test]
fn declared_activations_are_quantized() {
    let shape = [35, 96];
    for weight in ElementType::ALL {
        let weight = TestWeight::random(MxFormat::new(weight), shape, 1);
        let (elements, scales) = weight.parts();
        for activation in ElementType::ALL {
            let cast = Cast::from(MxFormat::new(activation));
            for rows in [1, 2, 3, 4, 5, 15] {
                let x = Random(4).vec(rows * 96);
                let mut quantized = vec![0.0; x.len()];
                let mut codes = vec![0; cast.format.code_bytes(x.len())];
                let mut block_scales = vec![0; cast.format.scale_bytes(x.len())];
                let bytes: Vec<u8> = x.iter().flat_map(|v| v.to_le_bytes()).collect();
                let nearest = ElementRounding::NearestEven;
                quantize_rows(cast, nearest, Values::F32(&bytes), 0, &mut codes, &mut block_scales).unwrap();
                let tensor = MxTensor::new(cast.format, [1, x.len()], &codes, &block_scales).unwrap();
                tensor.dequantize_row(0, &mut quantized);
                assert_ne!(quantized, x);
                let bias = Random(6).vec(35);
                if weight.sum() == BlockSum::Exact && activation.spec().int8_factor().is_none() {
                    quantized = reference::block_fixed_point(&quantized);
                }
                let expected =
                    reference::linear(weight.sum(), &quantized, &elements, Some(&scales), Some(&bias), shape);
                for backend in backends() {
                    let w = backend.upload(&[weight.source(Some(cast))], Some(&bias)).unwrap();
                    let mut out = poison(&backend, rows * 35);
                    backend.linear(&upload_f32(&backend, &x), rows, &w, &mut out, 35, 0);
                    let what = format!("{} on {}", w.scheme().unwrap(), backend.description());
                    assert_bits(&read(&backend, &out), &expected, &what);
                }
            }
        }
    }
}

#[test]
fn a_nan_activation_makes_its_row_nan_and_no_other() {
    let weight = TestWeight::random("mxint8".parse().unwrap(), [8, 64], 1);
    let mut x = Random(4).vec(3 * 64);
    x[64 + 40] = f32::NAN;
    let cast = Cast::from("mxint8".parse::<MxFormat>().unwrap());
    for backend in backends() {
        let w = backend.upload(&[weight.source(Some(cast))], None).unwrap();
        let mut out = upload_f32(&backend, &[0.0; 24]);
        backend.linear(&upload_f32(&backend, &x), 3, &w, &mut out, 8, 0);
        for (i, v) in read(&backend, &out).iter().enumerate() {
            assert_eq!(v.is_nan(), i / 8 == 1, "output {i}");
        }
    }
}

#[test]
fn a_nan_scale_or_element_makes_its_row_nan_and_no_other() {
    for element in [ElementType::E4m3, ElementType::E5m2, ElementType::E2m1, ElementType::Int8] {
        let shape = [20, 64];
        let mut weight = TestWeight::random(MxFormat::new(element), shape, 9);
        weight.scales[3 * 2 + 1] = 255;
        let mut nan_rows = vec![3];
        if element.spec().specials != Specials::None {
            weight.codes[5 * 64 + 40] = 0xFF;
            nan_rows.push(5);
        }
        let x = Random(4).vec(64 * 6);
        for backend in backends() {
            let w = backend.upload(&[weight.source(None)], None).unwrap();
            for rows in [1, 6] {
                let mut out = upload_f32(&backend, &vec![0.0; rows * 20]);
                backend.linear(&upload_f32(&backend, &x), rows, &w, &mut out, 20, 0);
                for (i, v) in read(&backend, &out).iter().enumerate() {
                    assert_eq!(v.is_nan(), nan_rows.contains(&(i % 20)), "{element:?} output {i}");
                }
            }
        }
    }
}

#[test]
fn both_ends_of_the_scales_are_multiplied_as_defined() {
    let shape = [16, 64];
    let mut weight = TestWeight::random("mxint8".parse().unwrap(), shape, 2);
    weight.scales.iter_mut().enumerate().for_each(|(i, s)| *s = if i % 2 == 0 { 2 } else { 250 });
    let (elements, scales) = weight.parts();
    // Small activations meet large scales, and large ones small scales.
    let x: Vec<f32> = (Random(3).vec(5 * 64).iter().enumerate())
        .map(|(i, v)| if i % 64 < 32 { v * 2.0_f32.powi(60) } else { v * 2.0_f32.powi(-60) })
        .collect();
    let cast = Cast::from("mxint8".parse::<MxFormat>().unwrap());
    let mut quantized = vec![0.0; x.len()];
    quantize_dequantize(cast, &x, &mut quantized);
    for (activation, seen) in [(Some(cast), quantized), (None, reference::block_fixed_point(&x))] {
        let expected = reference::linear(weight.sum(), &seen, &elements, Some(&scales), None, shape);
        for backend in backends() {
            let w = backend.upload(&[weight.source(activation)], None).unwrap();
            for rows in [1, 5] {
                let mut out = poison(&backend, rows * 16);
                backend.linear(&upload_f32(&backend, &x), rows, &w, &mut out, 16, 0);
                assert_bits(&read(&backend, &out), &expected[..rows * 16], &backend.description());
            }
        }
    }
}

#[test]
fn activations_of_every_magnitude_are_multiplied_as_defined() {
    let shape = [16, 32];
    let mut random = Random(8);
    // Values just below and at the points where a block's exponent changes, subnormals, zeros, and what is too large.
    let edge = f32::from_bits(32639.0_f32.to_bits() - 1);
    let peaks = [0.0, 1e-45, 1e-40, 2.0_f32.powi(-113), 1.0, 32639.0, edge, 2.0_f32.powi(99)];
    let mut x: Vec<f32> =
        peaks.iter().flat_map(|peak| random.vec(32).into_iter().map(move |v| v * peak)).collect();
    peaks.iter().zip(x.chunks_exact_mut(32)).for_each(|(peak, row)| row[7] = -peak);
    // Halves of a step: ties go to even.
    x.extend((0..32).map(|i| if i == 0 { 16384.0 } else { i as f32 - 15.5 }));
    for too_large in [2.0_f32.powi(100), -f32::MAX, f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
        x.extend((0..32).map(|i| if i == 9 { too_large } else { 1.0 }));
    }
    let rows = x.len() / 32;
    for element in [ElementType::E2m1, ElementType::E2m3, ElementType::Int8, ElementType::E3m0] {
        let weight = TestWeight::random(MxFormat::new(element), shape, 3);
        let (elements, scales) = weight.parts();
        let seen = reference::block_fixed_point(&x);
        let expected = reference::linear(BlockSum::Exact, &seen, &elements, Some(&scales), None, shape);
        assert_eq!(expected.iter().position(|v| v.is_nan()), Some((rows - 5) * 16));
        for backend in backends() {
            let w = backend.upload(&[weight.source(None)], None).unwrap();
            let mut out = poison(&backend, rows * 16);
            backend.linear(&upload_f32(&backend, &x), rows, &w, &mut out, 16, 0);
            assert_bits(&read(&backend, &out), &expected, &format!("{element:?} {}", backend.description()));
        }
    }
}

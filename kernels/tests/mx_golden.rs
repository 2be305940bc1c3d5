//! Bit-for-bit agreement with golden vectors: three independent implementations wrote them, and agree.

use kernels::mx::{
    Block, Cast, ElementRounding, ElementType, MxFormat, MxTensor, ScaleRounding, Values, quantize_block,
    quantize_dequantize, quantize_rows,
};
use safetensors::{Dtype, SafeTensors};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/public.safetensors");

/// Scale rules in the file; the search (`mse`) is not among them.
const ROUNDINGS: [ScaleRounding; 4] =
    [ScaleRounding::Floor, ScaleRounding::Ceil, ScaleRounding::Rceil, ScaleRounding::Even];

/// Formats of the packed section, in the file's names.
const PACKED: [(ElementType, &str); 6] = [
    (ElementType::Int8, "mxint8"),
    (ElementType::E4m3, "mxfp8_e4m3"),
    (ElementType::E5m2, "mxfp8_e5m2"),
    (ElementType::E2m3, "mxfp6_e2m3"),
    (ElementType::E3m2, "mxfp6_e3m2"),
    (ElementType::E2m1, "mxfp4_e2m1"),
];

fn with_golden(check: impl Fn(&SafeTensors<'_>)) {
    let bytes = std::fs::read(FILE).expect(FILE);
    check(&SafeTensors::deserialize(&bytes).expect(FILE));
}

fn u8s(file: &SafeTensors<'_>, name: &str) -> Vec<u8> {
    let tensor = file.tensor(name).expect(name);
    assert_eq!(tensor.dtype(), Dtype::U8, "{name}");
    tensor.data().to_vec()
}

fn f32s(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let tensor = file.tensor(name).expect(name);
    assert_eq!(tensor.dtype(), Dtype::F32, "{name}");
    tensor.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// Equal bits, except that any NaN equals any other.
fn assert_same_values(actual: &[f32], expected: &[f32], what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        let same = a.to_bits() == e.to_bits() || (a.is_nan() && e.is_nan());
        assert!(same, "{what}[{i}]: {a:e} instead of {e:e}");
    }
}

/// Quantizes `x` block by block, one code per byte.
fn quantize(cast: Cast, x: &[f32]) -> (Vec<u8>, Vec<u8>) {
    let block = cast.format.block.size();
    let mut codes = vec![0; x.len()];
    let scales = x
        .chunks_exact(block)
        .zip(codes.chunks_exact_mut(block))
        .map(|(x, codes)| quantize_block(cast, x, codes).0)
        .collect();
    (codes, scales)
}

fn check_blocks(file: &SafeTensors<'_>, element: ElementType, prefix: &str) {
    let input = f32s(file, "input");
    for scale_rounding in ROUNDINGS {
        let cast = Cast { format: MxFormat::new(element), scale_rounding };
        let (codes, scales) = quantize(cast, &input);
        let key = format!("{prefix}.{scale_rounding}");
        assert_eq!(scales, u8s(file, &format!("{key}.scale")), "{key}.scale");
        let expected = u8s(file, &format!("{key}.code"));
        for (i, (a, e)) in codes.chunks(32).zip(expected.chunks(32)).enumerate() {
            assert_eq!(a, e, "{key}.code of block {i}: {:?}", &input[32 * i..][..32]);
        }
    }
}

#[test]
fn blocks_of_every_ocp_format() {
    with_golden(|file| PACKED.iter().for_each(|(element, name)| check_blocks(file, *element, name)));
}

#[test]
fn blocks_of_the_experimental_formats() {
    with_golden(|file| {
        check_blocks(file, ElementType::Int4, "extra.mxint4");
        check_blocks(file, ElementType::E3m0, "extra.mxfp4_e3m0");
    });
}

#[test]
fn dequantized_values() {
    with_golden(|file| {
        let input = f32s(file, "input");
        for (element, name) in PACKED {
            for scale_rounding in [ScaleRounding::Floor, ScaleRounding::Even] {
                let key = format!("{name}.{scale_rounding}.deq");
                let expected = f32s(file, &key);
                let cast = Cast { format: MxFormat::new(element), scale_rounding };
                let mut actual = vec![0.0; input.len()];
                quantize_dequantize(cast, &input, &mut actual);
                assert_same_values(&actual, &expected, &key);
            }
        }
    });
}

#[test]
fn packed_rows() {
    with_golden(|file| {
        let (shape, weight) = ([8, 128], f32s(file, "pack.weight"));
        // The weights are BF16 values, so both inputs must give the same bytes.
        let f32_bytes: Vec<u8> = weight.iter().flat_map(|w| w.to_le_bytes()).collect();
        let bf16_bytes: Vec<u8> =
            weight.iter().flat_map(|w| ((w.to_bits() >> 16) as u16).to_le_bytes()).collect();
        for (element, name) in PACKED {
            let format = MxFormat::new(element);
            let cast = Cast { format, scale_rounding: ScaleRounding::Even };
            for values in [Values::F32(&f32_bytes), Values::Bf16(&bf16_bytes)] {
                let mut codes = vec![0; format.code_bytes(weight.len())];
                let mut scales = vec![0; format.scale_bytes(weight.len())];
                quantize_rows(cast, ElementRounding::NearestEven, values, 0, &mut codes, &mut scales)
                    .expect(name);
                assert_eq!(codes, u8s(file, &format!("pack.{name}.weight")), "{name}");
                assert_eq!(scales, u8s(file, &format!("pack.{name}.weight_scale")), "{name}");
            }
            let codes = u8s(file, &format!("pack.{name}.weight"));
            let scales = u8s(file, &format!("pack.{name}.weight_scale"));
            let tensor = MxTensor::new(format, shape, &codes, &scales).expect(name);
            let mut actual = vec![0.0; weight.len()];
            for (row, out) in actual.chunks_exact_mut(shape[1]).enumerate() {
                tensor.dequantize_row(row, out);
            }
            assert_same_values(&actual, &f32s(file, &format!("pack.{name}.deq")), name);
        }
    });
}

/// gpt-oss stores the same bytes with blocks as an axis; GGUF puts the scale before 16 bytes that hold elements `j`
/// (low nibble) and `j + 16`.
#[test]
fn foreign_mxfp4_layouts_hold_the_same_codes() {
    with_golden(|file| {
        let packed = u8s(file, "pack.mxfp4_e2m1.weight");
        let scales = u8s(file, "pack.mxfp4_e2m1.weight_scale");
        assert_eq!(packed, u8s(file, "pack.gptoss.blocks"));
        assert_eq!(scales, u8s(file, "pack.gptoss.scales"));

        let mut codes = vec![0; packed.len() * 2];
        kernels::mx::unpack(&packed, 4, &mut codes);
        let mut gguf = Vec::new();
        for (block, scale) in codes.as_chunks::<32>().0.iter().zip(&scales) {
            gguf.push(*scale);
            gguf.extend((0..16).map(|j| block[j] | block[j + 16] << 4));
        }
        assert_eq!(gguf, u8s(file, "pack.gguf_mxfp4"));
    });
}

#[test]
fn every_block_size_along_k() {
    with_golden(|file| {
        let input = f32s(file, "shape.input");
        for (element, name) in [
            (ElementType::Int8, "mxint8"),
            (ElementType::E2m3, "mxfp6_e2m3"),
            (ElementType::E2m1, "mxfp4_e2m1"),
        ] {
            for size in [16, 32, 64] {
                let format = MxFormat { element, block: Block::along_k(size).expect("a block size") };
                let (codes, scales) = quantize(Cast { format, scale_rounding: ScaleRounding::Floor }, &input);
                let key = format!("shape.{name}.row{size}");
                assert_eq!(scales, u8s(file, &format!("{key}.scale")), "{key}");
                assert_eq!(codes, u8s(file, &format!("{key}.code")), "{key}");
            }
        }
    });
}

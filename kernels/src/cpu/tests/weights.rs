//! What weights take in memory, and which are refused.

use super::*;
use crate::mx::Block;

#[test]
fn stacked_parts_are_one_weight_and_embedding_decodes_it() {
    for element in ElementType::ALL {
        let format = MxFormat::new(element);
        let (a, b) = (TestWeight::random(format, [19, 64], 1), TestWeight::random(format, [6, 64], 2));
        for backend in backends() {
            let w = backend.upload(&[a.source(None), b.source(None)], None).unwrap();
            assert_eq!(w.shape(), [25, 64]);
            let mut out = poison(&backend, 3 * 64);
            backend.embed(&w, &upload_u32(&backend, &[18, 19, 24]), 3, &mut out);
            let out = read(&backend, &out);
            let mut expected = vec![0.0; 3 * 64];
            a.tensor().dequantize_row(18, &mut expected[..64]);
            b.tensor().dequantize_row(0, &mut expected[64..128]);
            b.tensor().dequantize_row(5, &mut expected[128..]);
            assert_bits(&out, &expected, &format!("{element:?}"));
        }
    }
}

#[test]
fn packed_weights_take_the_bytes_of_their_format() {
    let backend = CpuBackend::new(1);
    for element in ElementType::ALL {
        let format = MxFormat::new(element);
        let weight = TestWeight::random(format, [64, 128], 1);
        let w = backend.upload(&[weight.source(None)], None).unwrap();
        assert_eq!(w.bytes(), weight.tensor().num_bytes(), "{element:?}");
        assert_eq!(backend.memory().bytes(Component::Weights), weight.codes.len());
        assert_eq!(backend.memory().bytes(Component::Scales), weight.scales.len());
        drop(w);
        assert_eq!(backend.memory().bytes(Component::Weights), 0);
    }
}

#[test]
fn what_has_no_kernel_is_refused_when_it_is_uploaded() {
    let backend = CpuBackend::new(1);
    let format = |element, size| MxFormat { element, block: Block::along_k(size).unwrap() };
    for size in [16, 64] {
        let weight = TestWeight::random(format(ElementType::E2m1, size), [16, 64], 1);
        let error = backend.upload(&[weight.source(None)], None).unwrap_err().to_string();
        assert!(error.contains(&format!("mxfp4_k{size}")), "{error}");
    }
    // Blocks of 64 do not fit rows of 96 activations.
    let weight = TestWeight::random(format(ElementType::E2m1, 32), [16, 96], 1);
    let activation = Cast::from(format(ElementType::Int8, 64));
    let error = backend.upload(&[weight.source(Some(activation))], None).unwrap_err().to_string();
    assert!(error.contains("mxfp4:mxint8_k64 with 96 columns"), "{error}");
}

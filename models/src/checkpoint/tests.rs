use std::path::Path;

use kernels::mx::{ScaleRounding, Scheme};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use super::quantization::{Declaration, Dialect};
use super::*;

const MODULE: &str = "model.layers.0.mlp.up_proj";

/// Writes a checkpoint with one module `[4, 64]`: codes and scales that count up.
fn write(dir: &Path, config: &Value, weight: (&str, Dtype, &[usize]), scale: Option<(Dtype, &[usize])>) {
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let bytes = |dtype: Dtype, shape: &[usize]| -> Vec<u8> {
        let length = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        (0..length).map(|i| u8::try_from(i % 120).unwrap()).collect()
    };
    let (name, dtype, shape) = weight;
    let codes = bytes(dtype, shape);
    let mut tensors =
        vec![(format!("{MODULE}.{name}"), TensorView::new(dtype, shape.to_vec(), &codes).unwrap())];
    let scales = scale.map(|(dtype, shape)| (dtype, shape, bytes(dtype, shape)));
    if let Some((dtype, shape, scales)) = &scales {
        let view = TensorView::new(*dtype, shape.to_vec(), scales).unwrap();
        tensors.push((format!("{MODULE}.weight_scale"), view));
    }
    std::fs::write(dir.join(SINGLE_FILE), safetensors::serialize(tensors, None).unwrap()).unwrap();
}

fn config(dialect: Dialect, format: &str) -> Value {
    let declaration =
        Declaration { default: format.parse().unwrap(), layers: Vec::new(), exclude: Vec::new() };
    json!({"quantization_config": dialect.write(&declaration)})
}

fn linear(dir: &Path) -> Result<LinearTensor, String> {
    Checkpoint::open(dir).and_then(|checkpoint| checkpoint.linear(MODULE)).map_err(|e| e.to_string())
}

#[test]
fn stored_dtypes_with_the_same_bytes_read_alike() {
    let dir = tempfile::tempdir().unwrap();
    let ours = Dialect::OcpMx;
    for (format, width, native) in [
        ("mxfp4", 32, Dtype::F4),
        ("mxfp6", 48, Dtype::F6_E2M3),
        ("mxfp6_e3m2", 48, Dtype::F6_E3M2),
        ("mxfp8", 64, Dtype::F8_E4M3),
        ("mxfp8_e5m2", 64, Dtype::F8_E5M2),
        ("mxint8", 64, Dtype::I8),
    ] {
        let mut rows = Vec::new();
        for (dtype, shape) in [(Dtype::U8, [4, width]), (native, [4, 64])] {
            for scale in [Dtype::U8, Dtype::F8_E8M0] {
                for name in ["weight", "weight_packed"] {
                    write(dir.path(), &config(ours, format), (name, dtype, &shape), Some((scale, &[4, 2])));
                    let linear = linear(dir.path()).unwrap();
                    assert_eq!(linear.shape(), [4, 64], "{format}");
                    assert_eq!(linear.scheme(), Some(format.parse().unwrap()));
                    let LinearTensor::Mx(mx) = linear else { panic!("{format} is dense") };
                    let codes: Vec<u8> = (0..4).flat_map(|row| mx.tensor().row_codes(row).to_vec()).collect();
                    rows.push(codes);
                }
            }
        }
        assert!(rows.iter().all(|r| *r == rows[0]), "{format}");
    }
}

#[test]
fn wrong_dtypes_and_shapes_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(Dialect::Quark, "mxfp4");
    let check = |weight: (&str, Dtype, &[usize]), scale: Option<(Dtype, &[usize])>, expected: &[&str]| {
        write(dir.path(), &config, weight, scale);
        let message = linear(dir.path()).unwrap_err();
        for part in expected {
            assert!(message.contains(part), "{message}");
        }
    };
    let good = ("weight", Dtype::U8, &[4, 32][..]);
    check(("weight", Dtype::BF16, &[4, 64]), Some((Dtype::U8, &[4, 2])), &["weight", "BF16", "mxfp4"]);
    check(("weight", Dtype::F8_E4M3, &[4, 64]), Some((Dtype::U8, &[4, 2])), &["F8_E4M3", "mxfp4"]);
    check(("weight", Dtype::U8, &[128]), Some((Dtype::U8, &[4, 2])), &["[rows, cols]"]);
    check(("weight", Dtype::U8, &[4, 24]), Some((Dtype::U8, &[4, 1])), &["48", "32"]);
    check(good, Some((Dtype::BF16, &[4, 2])), &["weight_scale", "BF16"]);
    check(good, Some((Dtype::U8, &[4, 4])), &["weight_scale", "[4, 2]"]);
    check(good, None, &["weight_scale", "missing"]);
}

#[test]
fn a_packed_module_that_is_declared_unquantized_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &json!({}), ("weight", Dtype::U8, &[4, 32]), Some((Dtype::U8, &[4, 2])));
    assert!(linear(dir.path()).unwrap_err().contains("declared unquantized"));
}

#[test]
fn dense_tensors_convert_to_f32() {
    let dir = tempfile::tempdir().unwrap();
    // Bytes that count up to 119 and begin anew: what the first values are follows from IEEE 754 and BF16.
    let check = |dtype: Dtype, period: usize, expected: &[f32]| {
        write(dir.path(), &json!({}), ("weight", dtype, &[4, 64]), None);
        let LinearTensor::Dense(dense) = linear(dir.path()).unwrap() else { panic!("not dense") };
        let values = dense.to_f32();
        assert_eq!(values.len(), 256);
        assert_eq!(values[..expected.len()], *expected, "{dtype}");
        assert_eq!(values[period], values[0], "{dtype}");
    };
    let power = |exponent: i32| 2_f32.powi(exponent);
    // 0x0100, 0x0302: exponent fields 2 and 6.
    check(Dtype::BF16, 60, &[power(-125), (1.0 + 2.0 / 128.0) * power(-121)]);
    // 0x0100, 0x0302: subnormals of F16, in units of 2^-24.
    check(Dtype::F16, 60, &[256.0 * power(-24), 770.0 * power(-24)]);
    check(Dtype::F32, 30, &[f32::from_bits(0x0302_0100), f32::from_bits(0x0706_0504)]);
    write(dir.path(), &json!({}), ("weight", Dtype::I32, &[4, 64]), None);
    assert!(linear(dir.path()).unwrap_err().contains("I32"));
    write(dir.path(), &json!({}), ("weight", Dtype::BF16, &[256]), None);
    assert!(linear(dir.path()).unwrap_err().contains("[rows, cols]"));
}

#[test]
fn the_record_refines_scale_rules_and_must_agree() {
    let dir = tempfile::tempdir().unwrap();
    let scales = Some((Dtype::U8, &[4, 2][..]));
    write(
        dir.path(),
        &config(Dialect::CompressedTensors, "w4a8"),
        ("weight_packed", Dtype::U8, &[4, 32]),
        scales,
    );
    let record = |activation: &str, rule: &str| {
        let layer = json!({"weight": {"format": "mxfp4", "scale_rounding": "mse"},
                           "activation": {"format": activation, "scale_rounding": rule}});
        std::fs::write(dir.path().join(RECORD_FILE), json!({"layers": {MODULE: layer}}).to_string()).unwrap();
        linear(dir.path())
    };
    let default: Scheme = "w4a8".parse().unwrap();
    assert_eq!(linear(dir.path()).unwrap().scheme(), Some(default));
    let refined = record("mxfp8_e4m3", "floor").unwrap().scheme().unwrap();
    assert_eq!(refined.weight.scale_rounding, ScaleRounding::Mse);
    assert_eq!(refined.activation.unwrap().scale_rounding, ScaleRounding::Floor);
    let contradiction = record("mxfp6_e2m3", "floor").unwrap_err();
    assert!(contradiction.contains(RECORD_FILE) && contradiction.contains(MODULE), "{contradiction}");
    assert!(record("mxfp8_e4m3", "sideways").unwrap_err().contains("sideways"));
}

#[test]
fn hf_quant_config_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let scales = Some((Dtype::U8, &[4, 2][..]));
    write(dir.path(), &json!({}), ("weight", Dtype::F8_E4M3, &[4, 64]), scales);
    let file = json!({"producer": {"name": "modelopt"},
                      "quantization": {"quant_algo": "MXFP8", "kv_cache_quant_algo": null, "exclude_modules": ["lm_head"]}});
    std::fs::write(dir.path().join("hf_quant_config.json"), file.to_string()).unwrap();
    assert_eq!(linear(dir.path()).unwrap().scheme(), Some("w8a8".parse().unwrap()));
}

#[test]
fn configs_that_are_no_object_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for config in [json!([]), json!(5), json!(null)] {
        write(dir.path(), &config, ("weight", Dtype::BF16, &[4, 64]), None);
        assert!(linear(dir.path()).unwrap_err().contains("config.json: is not a JSON object"));
    }
}

#[test]
fn scales_that_are_nan_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(Dialect::OcpMx, "mxfp8");
    write(dir.path(), &config, ("weight", Dtype::F8_E4M3, &[4, 64]), Some((Dtype::U8, &[4, 2])));
    let path = dir.path().join(SINGLE_FILE);
    let mut bytes = std::fs::read(&path).unwrap();
    let start =
        Checkpoint::open(dir.path()).unwrap().info(&format!("{MODULE}.weight_scale")).unwrap().offset();
    bytes[usize::try_from(start).unwrap() + 5] = 0xFF;
    std::fs::write(&path, bytes).unwrap();
    let message = linear(dir.path()).unwrap_err();
    assert!(message.contains(&format!("{MODULE}.weight_scale")), "{message}");
    assert!(message.contains("row 2, block 1"), "{message}");
}

#[test]
fn ranges_stay_inside_a_tensor() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &json!({}), ("weight", Dtype::BF16, &[4, 64]), None);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let info = checkpoint.info(&format!("{MODULE}.weight")).unwrap();
    let mut out = [0; 4];
    checkpoint.read_range(info, 508, &mut out).unwrap();
    assert_eq!(out, [28, 29, 30, 31]);
    assert!(checkpoint.read_range(info, 509, &mut out).is_err());
    assert!(checkpoint.read_range(info, u64::MAX, &mut out).is_err());
}

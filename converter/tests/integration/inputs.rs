//! Sources of every kind, and what is wrong with the bad ones.

use std::path::Path;

use converter::plan::Recipe;
use converter::{ConvertError, Options, convert};
use kernels::mx::Values;
use models::checkpoint::Checkpoint;
use safetensors::Dtype;
use serde_json::json;

use crate::common::{
    Tensor, assert_direct_cast, convert_to, files, names, rustdoc_6m, tiny_config, tiny_llama, write_model,
};

/// The error of a conversion, which must leave nothing behind.
fn refusal(model: &Path) -> String {
    let parent = model.parent().unwrap();
    let before = names(parent);
    let error = convert_to(model, &parent.join("out"), "mxfp4").unwrap_err().to_string();
    assert_eq!(names(parent), before, "nothing is left of a failed conversion");
    assert!(!error.contains('\n'), "{error}");
    error
}

#[test]
fn every_dtype_is_quantized_from_its_own_precision() {
    let root = tempfile::tempdir().unwrap();
    let mut packed_bytes = Vec::new();
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        let (model, output) =
            (root.path().join(format!("{dtype}")), root.path().join(format!("{dtype}-out")));
        let tensors = tiny_llama(dtype);
        write_model(&model, &tiny_config(), &tensors, 1);
        convert_to(&model, &output, "mxint8").unwrap();
        let packed = Checkpoint::open(&output).unwrap();
        for tensor in &tensors {
            let module = tensor.name.trim_end_matches(".weight");
            if module.ends_with("_proj") {
                let values = match dtype {
                    Dtype::F32 => Values::F32(&tensor.bytes),
                    Dtype::F16 => Values::F16(&tensor.bytes),
                    _ => Values::Bf16(&tensor.bytes),
                };
                assert_direct_cast(&packed, module, values, [tensor.shape[0], tensor.shape[1]]);
            } else {
                assert_eq!(packed.dense(&tensor.name).unwrap().bytes, tensor.bytes, "copied as it is");
            }
        }
        let down = packed.linear("model.layers.0.mlp.down_proj").unwrap();
        let mut row = vec![0.0; 96];
        let models::checkpoint::LinearTensor::Mx(mx) = down else { panic!("not packed") };
        mx.tensor().dequantize_row(0, &mut row);
        packed_bytes.push(row);
    }
    assert_ne!(packed_bytes[0], packed_bytes[2], "F32 does not go through BF16");
}

#[test]
fn shards_give_what_one_file_gives() {
    let root = tempfile::tempdir().unwrap();
    let tensors = tiny_llama(Dtype::BF16);
    let convert = |name: &str, files_in: usize| {
        let (model, output) = (root.path().join(name), root.path().join(format!("{name}-out")));
        write_model(&model, &tiny_config(), &tensors, files_in);
        convert_to(&model, &output, "mxfp6").unwrap();
        let packed = Checkpoint::open(&output).unwrap();
        let mut all: Vec<(String, Vec<u8>)> = Vec::new();
        for info in packed.tensors() {
            let mut bytes = vec![0; usize::try_from(info.bytes).unwrap()];
            packed.read_range(info, 0, &mut bytes).unwrap();
            all.push((info.name.clone(), bytes));
        }
        all
    };
    assert_eq!(convert("one", 1), convert("three", 3));
}

#[test]
fn companions_are_copied_when_there_are_any() {
    let root = tempfile::tempdir().unwrap();
    let with = root.path().join("with");
    convert_to(&rustdoc_6m(), &with, "mxfp4").unwrap();
    let (source, output) = (files(&rustdoc_6m()), files(&with));
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        assert_eq!(source[name], output[name]);
    }
    assert!(!output.contains_key("heldout.txt"), "only files that belong to a model");

    let model = root.path().join("plain");
    write_model(&model, &tiny_config(), &tiny_llama(Dtype::BF16), 1);
    let without = root.path().join("without");
    convert_to(&model, &without, "mxfp4").unwrap();
    assert_eq!(names(&without), ["README.md", "config.json", "model.safetensors", "mx_conversion.json"]);
    let record: serde_json::Value = serde_json::from_slice(&files(&without)["mx_conversion.json"]).unwrap();
    assert_eq!(record["source"]["name"], "plain");
    assert_eq!(record["source"]["sha256"]["model.safetensors"].as_str().unwrap().len(), 64);
    assert_eq!(record["layers"].as_object().unwrap().len(), 14);
}

#[test]
fn damaged_files_are_named() {
    let root = tempfile::tempdir().unwrap();
    let model = root.path().join("model");
    write_model(&model, &tiny_config(), &tiny_llama(Dtype::BF16), 2);
    let shard = model.join("model-00002-of-00002.safetensors");
    let whole = std::fs::read(&shard).unwrap();
    let check = |bytes: &[u8], expected: &str| {
        std::fs::write(&shard, bytes).unwrap();
        let error = refusal(&model);
        assert!(error.contains("model-00002-of-00002.safetensors") && error.contains(expected), "{error}");
    };
    check(&whole[..whole.len() - 1], "truncated");
    check(&whole[..100], "truncated");
    check(&whole[..4], "truncated");
    check(&[], "truncated");
    check(&[&whole[..], b"more"].concat(), "corrupt");
    check(&[&whole[..8], b"}{", &whole[10..]].concat(), "corrupt");
    check(&[&[0xFF; 8], &whole[8..]].concat(), "header length");

    std::fs::remove_file(&shard).unwrap();
    assert!(refusal(&model).contains("model-00002-of-00002.safetensors"));
    std::fs::write(&shard, &whole).unwrap();
    convert_to(&model, &root.path().join("out"), "mxfp4").unwrap();
}

#[test]
fn an_index_that_lies_is_named() {
    let root = tempfile::tempdir().unwrap();
    let model = root.path().join("model");
    write_model(&model, &tiny_config(), &tiny_llama(Dtype::BF16), 2);
    let path = model.join("model.safetensors.index.json");
    let mut index: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    index["weight_map"]["model.nowhere.weight"] = "model-00001-of-00002.safetensors".into();
    std::fs::write(&path, index.to_string()).unwrap();
    let error = refusal(&model);
    assert!(error.contains("index.json") && error.contains("model.nowhere.weight"), "{error}");
    index["weight_map"]["model.nowhere.weight"] = "../elsewhere.safetensors".into();
    std::fs::write(&path, index.to_string()).unwrap();
    assert!(refusal(&model).contains("../elsewhere.safetensors"));
}

#[test]
fn values_that_are_not_numbers_are_named() {
    let root = tempfile::tempdir().unwrap();
    for (dtype, bytes, text) in [
        (Dtype::BF16, &[0xC0, 0x7F][..], "NaN"),
        (Dtype::F16, &[0x00, 0x7C], "inf"),
        (Dtype::F32, &[0x00, 0x00, 0x80, 0xFF], "-inf"),
    ] {
        let model = root.path().join(text);
        let mut tensors = tiny_llama(dtype);
        let name = "model.layers.1.mlp.down_proj.weight";
        let tensor = tensors.iter_mut().find(|t| t.name == name).unwrap();
        let at = (5 * 96 + 17) * bytes.len();
        tensor.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        write_model(&model, &tiny_config(), &tensors, 1);
        let error = refusal(&model);
        assert!(error.contains(name) && error.contains("[5, 17]") && error.contains(text), "{error}");
        assert!(error.contains("model.safetensors"), "{error}");

        // Also in a tensor that is copied.
        let mut tensors = tiny_llama(dtype);
        let name = "model.layers.1.input_layernorm.weight";
        let tensor = tensors.iter_mut().find(|t| t.name == name).unwrap();
        tensor.bytes[33 * bytes.len()..][..bytes.len()].copy_from_slice(bytes);
        write_model(&model, &tiny_config(), &tensors, 2);
        std::fs::remove_file(model.join("model.safetensors")).unwrap();
        let error = refusal(&model);
        assert!(error.contains(name) && error.contains("[33]") && error.contains(text), "{error}");
        assert!(error.contains("model-00002-of-00002.safetensors"), "{error}");
    }
}

#[test]
fn rows_that_are_no_whole_number_of_blocks_are_named() {
    let root = tempfile::tempdir().unwrap();
    let model = root.path().join("model");
    let mut tensors = tiny_llama(Dtype::BF16);
    let name = "model.layers.1.mlp.down_proj.weight";
    tensors.retain(|t| t.name != name);
    tensors.push(Tensor::new(name, Dtype::BF16, &[64, 80]));
    write_model(&model, &tiny_config(), &tensors, 1);
    let error = refusal(&model);
    assert!(error.contains(name) && error.contains("80") && error.contains("32"), "{error}");
    let recipe = Recipe {
        exclude: vec!["model.layers.1.mlp.down_proj".parse().unwrap()],
        ..Recipe::new("mxfp4".parse().unwrap())
    };
    convert(&Options::new(&model, root.path().join("out"), recipe), &()).unwrap();
}

#[test]
fn quantized_sources_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let first = root.path().join("first");
    convert_to(&rustdoc_6m(), &first, "mxfp4").unwrap();
    let again = convert_to(&first, &root.path().join("second"), "mxfp4");
    assert!(matches!(again, Err(ConvertError::AlreadyQuantized { method: "quark", .. })));

    let gptq = root.path().join("gptq");
    let mut config = tiny_config();
    config["quantization_config"] = json!({"quant_method": "gptq", "bits": 4});
    write_model(&gptq, &config, &tiny_llama(Dtype::F16), 1);
    assert!(refusal(&gptq).contains("gptq"));
}

#[test]
fn sources_that_are_no_model_are_named() {
    let root = tempfile::tempdir().unwrap();
    assert!(refusal(&root.path().join("nowhere")).contains("nowhere"));
    let empty = root.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    assert!(refusal(&empty).contains("config.json"));
    std::fs::write(empty.join("config.json"), "{}").unwrap();
    assert!(refusal(&empty).contains("model.safetensors"));
    for no_object in ["{", "[]", "5", "null"] {
        std::fs::write(empty.join("config.json"), no_object).unwrap();
        assert!(refusal(&empty).contains("config.json"));
    }
    assert!(refusal(&empty).contains("config.json"));
    let file = root.path().join("file.gguf");
    std::fs::write(&file, "no GGUF").unwrap();
    assert!(refusal(&file).contains("file.gguf"));
}

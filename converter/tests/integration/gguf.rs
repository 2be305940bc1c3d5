//! A llama GGUF gives what the folder it was made from gives.

use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value as Meta};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor as CandleTensor};
use converter::ConvertError;
use kernels::mx::Values;
use models::checkpoint::Checkpoint;
use safetensors::Dtype;

use crate::common::{
    Tensor, assert_direct_cast, convert_to, files, names, tiny_config, tiny_llama, write_model,
};

/// llama.cpp's names of [`tiny_llama`]'s tensors.
fn ggml_name(name: &str) -> String {
    let name = name.trim_end_matches(".weight");
    let renamed = match name {
        "model.embed_tokens" => "token_embd".to_owned(),
        "model.norm" => "output_norm".to_owned(),
        "lm_head" => "output".to_owned(),
        _ => name
            .replace("model.layers.", "blk.")
            .replace("self_attn.o_proj", "attn_output")
            .replace("self_attn.", "attn_")
            .replace("mlp.", "ffn_")
            .replace("_proj", "")
            .replace("input_layernorm", "attn_norm")
            .replace("post_attention_layernorm", "ffn_norm"),
    };
    format!("{renamed}.weight")
}

/// llama.cpp's permutation of q and k rows (`LlamaModel.permute` of its converter).
fn permute(tensor: &Tensor, heads: usize) -> Tensor {
    let row_bytes = tensor.bytes.len() / tensor.shape[0];
    let dim = tensor.shape[0] / heads;
    let mut bytes = Vec::with_capacity(tensor.bytes.len());
    for head in 0..heads {
        for pair in 0..dim / 2 {
            for half in 0..2 {
                let row = head * dim + half * dim / 2 + pair;
                bytes.extend_from_slice(&tensor.bytes[row * row_bytes..][..row_bytes]);
            }
        }
    }
    Tensor { bytes, ..tensor.clone() }
}

pub(crate) fn metadata(pre_tokenizer: &str) -> Vec<(&'static str, Meta)> {
    let strings =
        |values: &[&str]| Meta::Array(values.iter().map(|v| Meta::String((*v).to_owned())).collect());
    let mut tokens: Vec<String> = (0..46).map(|i| char::from(b'!' + i).to_string()).collect();
    tokens.extend(["ab".to_owned(), "<eos>".to_owned()]);
    let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
    vec![
        ("general.architecture", Meta::String("llama".to_owned())),
        ("llama.block_count", Meta::U32(2)),
        ("llama.embedding_length", Meta::U32(64)),
        ("llama.feed_forward_length", Meta::U32(96)),
        ("llama.attention.head_count", Meta::U32(4)),
        ("llama.attention.head_count_kv", Meta::U32(2)),
        ("llama.context_length", Meta::U32(128)),
        ("llama.attention.layer_norm_rms_epsilon", Meta::F32(1e-5)),
        ("llama.rope.freq_base", Meta::F32(10000.0)),
        ("tokenizer.ggml.model", Meta::String("gpt2".to_owned())),
        ("tokenizer.ggml.pre", Meta::String(pre_tokenizer.to_owned())),
        ("tokenizer.ggml.tokens", strings(&tokens)),
        (
            "tokenizer.ggml.token_type",
            Meta::Array((0..48).map(|i| Meta::I32(if i == 47 { 3 } else { 1 })).collect()),
        ),
        ("tokenizer.ggml.merges", strings(&["a b"])),
        ("tokenizer.ggml.bos_token_id", Meta::U32(47)),
        ("tokenizer.ggml.eos_token_id", Meta::U32(47)),
        ("tokenizer.chat_template", Meta::String("{{ messages }}".to_owned())),
    ]
}

pub(crate) fn write_gguf(path: &Path, metadata: &[(&'static str, Meta)], tensors: &[Tensor]) {
    let quantized: Vec<(String, QTensor)> = tensors
        .iter()
        .map(|tensor| {
            let tensor = match tensor.name.as_str() {
                name if name.contains("q_proj") => permute(tensor, 4),
                name if name.contains("k_proj") => permute(tensor, 2),
                _ => tensor.clone(),
            };
            let values: Vec<f32> =
                tensor.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
            let candle = CandleTensor::from_vec(values, tensor.shape.clone(), &Device::Cpu).unwrap();
            (ggml_name(&tensor.name), QTensor::quantize(&candle, GgmlDType::F32).unwrap())
        })
        .collect();
    let metadata: Vec<(&str, &Meta)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<(&str, &QTensor)> = quantized.iter().map(|(name, t)| (name.as_str(), t)).collect();
    let mut file = std::fs::File::create(path).unwrap();
    gguf_file::write(&mut file, &metadata, &tensors).unwrap();
}

#[test]
fn equals_the_folder_it_was_made_from() {
    let root = tempfile::tempdir().unwrap();
    let tensors = tiny_llama(Dtype::F32);
    let (folder, gguf) = (root.path().join("folder"), root.path().join("tiny.gguf"));
    write_model(&folder, &tiny_config(), &tensors, 1);
    write_gguf(&gguf, &metadata("smollm"), &tensors);
    let output = root.path().join("out");
    convert_to(&gguf, &output, "mxfp6").unwrap();

    let packed = Checkpoint::open(&output).unwrap();
    for tensor in &tensors {
        let module = tensor.name.trim_end_matches(".weight");
        if module.ends_with("_proj") {
            assert_direct_cast(
                &packed,
                module,
                Values::F32(&tensor.bytes),
                [tensor.shape[0], tensor.shape[1]],
            );
        } else {
            let dense = packed.dense(&tensor.name).unwrap();
            let rounded = Tensor::new(&tensor.name, Dtype::BF16, &tensor.shape);
            assert_eq!(dense.bytes, rounded.bytes, "{}: rounded to BF16", tensor.name);
        }
    }
    let config = packed.config();
    for (field, expected) in tiny_config().as_object().unwrap() {
        assert_eq!(&config[field], expected, "{field}");
    }
    let tokenizer: serde_json::Value = serde_json::from_slice(&files(&output)["tokenizer.json"]).unwrap();
    assert_eq!(tokenizer["model"]["vocab"]["ab"], 46);
    assert_eq!(tokenizer["model"]["merges"][0], serde_json::json!(["a", "b"]));
    assert_eq!(tokenizer["added_tokens"][0]["content"], "<eos>");
    assert_eq!(tokenizer["pre_tokenizer"]["pretokenizers"][0]["type"], "Digits");
    let config: serde_json::Value = serde_json::from_slice(&files(&output)["tokenizer_config.json"]).unwrap();
    assert_eq!(config["chat_template"], "{{ messages }}");
    assert_eq!(config["eos_token"], "<eos>");
}

#[test]
fn an_unknown_tokenizer_is_left_out() {
    let root = tempfile::tempdir().unwrap();
    let gguf = root.path().join("tiny.gguf");
    write_gguf(&gguf, &metadata("klingon"), &tiny_llama(Dtype::F32));
    let output = root.path().join("out");
    convert_to(&gguf, &output, "mxfp4").unwrap();
    let names = names(&output);
    assert!(
        names.contains(&"config.json".to_owned()) && !names.contains(&"tokenizer.json".to_owned()),
        "{names:?}"
    );
}

#[test]
fn a_file_without_output_weight_is_tied() {
    let root = tempfile::tempdir().unwrap();
    let gguf = root.path().join("tiny.gguf");
    let mut tensors = tiny_llama(Dtype::F32);
    tensors.retain(|t| t.name != "lm_head.weight");
    write_gguf(&gguf, &metadata("gpt-2"), &tensors);
    let output = root.path().join("out");
    convert_to(&gguf, &output, "mxfp4").unwrap();
    assert_eq!(Checkpoint::open(&output).unwrap().config()["tie_word_embeddings"], true);
}

#[test]
fn other_files_are_refused_by_name() {
    let root = tempfile::tempdir().unwrap();
    let gguf = root.path().join("tiny.gguf");
    let refusal = || match convert_to(&gguf, &root.path().join("out"), "mxfp4") {
        Err(error @ ConvertError::Gguf { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    };
    let tensors = tiny_llama(Dtype::F32);
    let mut other = metadata("smollm");
    other[0].1 = Meta::String("mamba".to_owned());
    write_gguf(&gguf, &other, &tensors);
    assert!(refusal().contains("mamba"));

    let mut unaligned = metadata("smollm");
    unaligned.push(("general.alignment", Meta::U32(0)));
    write_gguf(&gguf, &unaligned, &tensors);
    assert!(refusal().contains("general.alignment is 0"));

    let mut heads = metadata("smollm");
    heads[4].1 = Meta::U32(3);
    write_gguf(&gguf, &heads, &tensors);
    assert!(refusal().contains("do not fit 3 heads"));

    let mut extra = tensors.clone();
    extra.push(Tensor::new("model.layers.0.mlp.gate_inp.weight", Dtype::F32, &[4, 64]));
    write_gguf(&gguf, &metadata("smollm"), &extra);
    assert!(refusal().contains("ffn_gate_inp"));

    write_gguf(&gguf, &metadata("smollm"), &tensors);
    let whole = std::fs::read(&gguf).unwrap();
    std::fs::write(&gguf, &whole[..whole.len() - 4096]).unwrap();
    assert!(refusal().contains("truncated"));
}

//! Reordered channels: the model is the same, and its errors are smaller.

use std::path::Path;

use converter::calibrate::Calibration;
use converter::permute::{PermutationReport, Permute};
use converter::plan::Recipe;
use converter::quantize::CalibratedMethod;
use converter::{Options, convert};
use half::bf16;
use kernels::mx::Values;
use models::checkpoint::Checkpoint;
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::calibrated::text;
use crate::common::{Tensor, assert_direct_cast, rustdoc_6m, tiny_config, tiny_llama, write_model};
use crate::gguf::{metadata, write_gguf};
use crate::perplexity::{measure, windows};

/// Channels of a head in [`uneven_tiny`].
const HEAD: usize = 64;

fn permuted(model: &Path, output: &Path, format: &str, text: Option<&Path>) -> PermutationReport {
    let permute = Some(Permute { text: text.map(Path::to_owned) });
    let recipe = Recipe::new(format.parse().unwrap());
    let report = convert(&Options { permute, ..Options::new(model, output, recipe) }, &()).unwrap();
    report.permutation.unwrap()
}

/// A layer whose down and o have columns of magnitude 16 and 1 in turns: in blocks of both, MXFP4 loses the small ones.
fn uneven_tiny(intermediate: usize) -> (Value, Vec<Tensor>) {
    let mut config = tiny_config();
    let changed = json!({"num_hidden_layers": 1, "head_dim": HEAD, "intermediate_size": intermediate});
    config.as_object_mut().unwrap().extend(changed.as_object().unwrap().clone());
    let tensors = tiny_llama(Dtype::F32).into_iter().filter(|tensor| !tensor.name.contains("layers.1."));
    let tensors = tensors.map(|tensor| {
        let shape = match tensor.name.split('.').rev().nth(1).unwrap() {
            "q_proj" => vec![4 * HEAD, 64],
            "k_proj" | "v_proj" => vec![2 * HEAD, 64],
            "gate_proj" | "up_proj" => vec![intermediate, 64],
            "o_proj" => vec![64, 4 * HEAD],
            "down_proj" => vec![64, intermediate],
            _ => return tensor,
        };
        let mut made = Tensor::new(&tensor.name, Dtype::F32, &shape);
        if made.name.contains("o_proj") || made.name.contains("down_proj") {
            for (i, bytes) in made.bytes.chunks_exact_mut(4).enumerate() {
                let value = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                // shape[1] is even.
                let magnitude = if i % 2 == 0 { 16.0 } else { 1.0_f32 };
                bytes.copy_from_slice(&magnitude.copysign(value).to_le_bytes());
            }
        }
        made
    });
    (config, tensors.collect())
}

/// Rows `[_, row_bytes]` in this order.
fn gathered(bytes: &[u8], row_bytes: usize, order: &[usize]) -> Vec<u8> {
    order.iter().flat_map(|&row| bytes[row * row_bytes..][..row_bytes].to_vec()).collect()
}

/// Asserts that rows and columns of `output` are those of `tensors`, the even channels of each group first.
fn check_uneven(output: &Path, tensors: &[Tensor]) {
    let packed = Checkpoint::open(output).unwrap();
    for tensor in tensors.iter().filter(|tensor| tensor.name.contains("_proj")) {
        let &[rows, cols] = tensor.shape.as_slice() else { panic!("{} is a matrix", tensor.name) };
        let evens_first = |channels: usize, group: usize| -> Vec<usize> {
            let groups = (0..channels).step_by(group);
            groups.flat_map(|g| [0, 1].map(|odd| (g + odd..g + group).step_by(2))).flatten().collect()
        };
        let (row_order, col_order) = match tensor.name.split('.').rev().nth(1).unwrap() {
            "v_proj" => (evens_first(rows, HEAD), None),
            "gate_proj" | "up_proj" => (evens_first(rows, rows), None),
            "o_proj" => ((0..rows).collect(), Some(evens_first(cols, HEAD))),
            "down_proj" => ((0..rows).collect(), Some(evens_first(cols, cols))),
            _ => ((0..rows).collect(), None),
        };
        let mut bytes = gathered(&tensor.bytes, 4 * cols, &row_order);
        if let Some(order) = col_order {
            bytes = bytes.chunks_exact(4 * cols).flat_map(|row| gathered(row, 4, &order)).collect();
        }
        let module = tensor.name.trim_end_matches(".weight");
        assert_direct_cast(&packed, module, Values::F32(&bytes), [rows, cols]);
    }
}

/// Of tensors that are read in one piece and in several, from a folder and from a GGUF file.
#[test]
fn rows_and_columns_follow_each_other() {
    let root = tempfile::tempdir().unwrap();
    // 4.5 MiB.
    for intermediate in [128, 17_664] {
        let (config, tensors) = uneven_tiny(intermediate);
        let model = root.path().join(format!("model-{intermediate}"));
        write_model(&model, &config, &tensors, 2);
        let output = root.path().join(format!("out-{intermediate}"));
        let report = permuted(&model, &output, "mxfp4", None);
        assert_eq!(report.modules.len(), 2);
        for module in report.modules {
            assert!(module.order == "weights" && module.db < module.stored_db - 10.0, "{module:?}");
        }
        check_uneven(&output, &tensors);
        let record = std::fs::read(output.join("mx_conversion.json")).unwrap();
        let record: Value = serde_json::from_slice(&record).unwrap();
        let permuted = json!(["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"]);
        assert_eq!(record["permuted"], permuted);
    }

    let (_, tensors) = uneven_tiny(128);
    let gguf = root.path().join("tiny.gguf");
    let mut described = metadata("smollm");
    described.retain(|(key, _)| !["llama.block_count", "llama.feed_forward_length"].contains(key));
    described.push(("llama.feed_forward_length", candle_core::quantized::gguf_file::Value::U32(128)));
    described.push(("llama.block_count", candle_core::quantized::gguf_file::Value::U32(1)));
    for key in ["llama.attention.key_length", "llama.attention.value_length"] {
        described.push((key, candle_core::quantized::gguf_file::Value::U32(HEAD as u32)));
    }
    write_gguf(&gguf, &described, &tensors);
    let output = root.path().join("from-gguf");
    permuted(&gguf, &output, "mxfp4", None);
    check_uneven(&output, &tensors);
}

/// The tests' model with every other channel of up 16 times larger, and what takes it 16 times smaller: the same model.
fn uneven_rustdoc(dir: &Path) {
    let source = Checkpoint::open(&rustdoc_6m()).unwrap();
    let tensors: Vec<Tensor> = source
        .tensors()
        .map(|info| {
            let mut bytes = source.dense(&info.name).unwrap().bytes;
            let cols = info.shape.last().copied().unwrap();
            let factor = |i: usize| match info.name.as_str() {
                name if name.contains("up_proj") && (i / cols).is_multiple_of(2) => 16.0,
                name if name.contains("down_proj") && (i % cols).is_multiple_of(2) => 1.0 / 16.0,
                _ => 1.0,
            };
            for (i, value) in bytes.chunks_exact_mut(2).enumerate() {
                let scaled = bf16::from_le_bytes([value[0], value[1]]).to_f32() * factor(i);
                value.copy_from_slice(&bf16::from_f32(scaled).to_le_bytes());
            }
            Tensor { name: info.name.clone(), dtype: info.dtype, shape: info.shape.clone(), bytes }
        })
        .collect();
    write_model(dir, source.config(), &tensors, 1);
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(rustdoc_6m().join(file), dir.join(file)).unwrap();
    }
}

#[test]
fn a_permuted_model_is_the_same_with_smaller_errors() {
    let root = tempfile::tempdir().unwrap();
    let (model, text) = (root.path().join("model"), text(root.path()));
    uneven_rustdoc(&model);
    let windows = windows();
    let unquantized = measure(&model, &windows).perplexity;
    let quotient = |name: &str| measure(&root.path().join(name), &windows).perplexity / unquantized;

    permuted(&model, &root.path().join("int8"), "mxint8", None);
    assert!((0.998..1.002).contains(&quotient("int8")), "{}", quotient("int8"));

    for format in ["mxfp4", "w4a4"] {
        convert(&Options::new(&model, root.path().join("stored"), Recipe::new(format.parse().unwrap())), &())
            .unwrap();
        let report = permuted(&model, &root.path().join("permuted"), format, Some(&text));
        assert_eq!((report.text.as_deref(), report.modules.len()), (Some("text.txt"), 12));
        for module in report.modules.iter().filter(|module| module.module.contains("down_proj")) {
            assert!(module.order != "stored" && module.db < module.stored_db - 1.0, "{module:?}");
        }
        let (stored, permuted) = (quotient("stored"), quotient("permuted"));
        assert!(permuted - 1.0 < 0.8 * (stored - 1.0), "{format}: {stored} and {permuted} of the perplexity");
        for name in ["stored", "permuted"] {
            std::fs::remove_dir_all(root.path().join(name)).unwrap();
        }
    }
}

/// What calibration runs, and what it writes, is in the new order.
#[test]
fn calibration_sees_the_new_order() {
    let root = tempfile::tempdir().unwrap();
    let (model, text) = (root.path().join("model"), text(root.path()));
    uneven_rustdoc(&model);
    let output = root.path().join("out");
    let calibration = Calibration::new(CalibratedMethod::Gptq, &text);
    let options = Options {
        calibration: Some(Calibration { windows: 48, window_tokens: 128, ..calibration }),
        permute: Some(Permute { text: Some(text) }),
        ..Options::new(&model, &output, Recipe::new("mxfp4".parse().unwrap()))
    };
    let report = convert(&options, &()).unwrap();
    let calibration = report.calibration.unwrap();
    assert!(calibration.kept, "{:?}", calibration.divergence);
    let quotient = measure(&output, &windows()).perplexity / measure(&model, &windows()).perplexity;
    assert!((0.99..1.06).contains(&quotient), "{quotient}");
}

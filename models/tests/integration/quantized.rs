//! Models with MX weights: what a checkpoint declares is what runs.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use kernels::mx::{ElementRounding, ElementType, MxFormat, MxTensor, Scheme, Values, quantize_rows};
use kernels::{Component, DenseDtype, KvCacheDtype};
use models::LinearInfo;
use models::checkpoint::quantization::{Declaration, Dialect, LayerGroup};
use models::checkpoint::{Checkpoint, DenseTensor};
use safetensors::tensor::TensorView;
use safetensors::{Dtype as StoredDtype, serialize_to_file};
use serde_json::Value;
use tempfile::TempDir;

use crate::common::{Errors, Golden, Runner, blocks};

/// Shape, dtype and bytes of a tensor to be stored.
type Stored = (StoredDtype, Vec<usize>, Vec<u8>);

/// Two checkpoints of the same numbers: one packed, one with the decoded weights in F32.
struct Pair {
    packed: TempDir,
    decoded: TempDir,
}

/// Quantizes the modules of a checkpoint that `scheme` has a scheme for.
pub(crate) fn quantize(dir: &Path, scheme: impl Fn(&str) -> Option<Scheme>) -> TempDir {
    quantize_pair(dir, scheme).packed
}

fn quantize_pair(dir: &Path, scheme: impl Fn(&str) -> Option<Scheme>) -> Pair {
    let source = Checkpoint::open(dir).unwrap();
    let names: Vec<_> = source.tensors().map(|info| info.name.clone()).collect();
    let (mut packed, mut decoded) = (BTreeMap::new(), BTreeMap::new());
    let (mut layers, mut exclude) = (Vec::new(), Vec::new());
    for name in names {
        let tensor = source.dense(&name).unwrap();
        let module = name.strip_suffix(".weight").filter(|_| tensor.shape.len() == 2);
        match module.map(|module| (module, scheme(module))) {
            Some((module, Some(scheme))) => {
                let (codes, scales, values) = pack(&tensor, scheme);
                let (suffix, dtype) = Dialect::OcpMx.code_tensor(scheme.weight.format.element);
                let [rows, cols] = [tensor.shape[0], tensor.shape[1]];
                let row = |bytes: &[u8]| vec![rows, bytes.len() / rows];
                packed.insert(format!("{module}.{suffix}"), (dtype, row(&codes), codes));
                packed.insert(format!("{module}.weight_scale"), (StoredDtype::U8, row(&scales), scales));
                decoded.insert(name.clone(), (StoredDtype::F32, vec![rows, cols], values));
                layers.push((LayerGroup::Module(module.to_owned()), scheme));
            }
            other => {
                exclude.extend(other.map(|(module, _)| module.to_owned()));
                let values = tensor.to_f32().into_iter().flat_map(f32::to_le_bytes).collect();
                decoded.insert(name.clone(), (StoredDtype::F32, tensor.shape.clone(), values));
                packed.insert(name, (stored(tensor.dtype), tensor.shape, tensor.bytes));
            }
        }
    }
    let declaration = Declaration { default: layers[0].1, layers, exclude };
    let mut config = source.config().clone();
    let decoded = write(&config, &decoded);
    config["quantization_config"] = Dialect::OcpMx.write(&declaration);
    Pair { packed: write(&config, &packed), decoded }
}

fn write(config: &Value, tensors: &BTreeMap<String, Stored>) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    serialize_to_file(views, None, &dir.path().join("model.safetensors")).unwrap();
    dir
}

fn stored(dtype: DenseDtype) -> StoredDtype {
    match dtype {
        DenseDtype::Bf16 => StoredDtype::BF16,
        DenseDtype::F16 => StoredDtype::F16,
        DenseDtype::F32 => StoredDtype::F32,
    }
}

/// Codes and scales of a tensor, rotated as the scheme says, and the values that they stand for as F32 bytes.
fn pack(tensor: &DenseTensor, scheme: Scheme) -> (Vec<u8>, Vec<u8>, Vec<u8>) {
    let format = scheme.weight.format;
    let shape = [tensor.shape[0], tensor.shape[1]];
    let count = shape[0] * shape[1];
    let (mut codes, mut scales) = (vec![0; format.code_bytes(count)], vec![0; format.scale_bytes(count)]);
    let mut values = tensor.to_f32();
    scheme.rotate(&mut values);
    let bytes: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
    let (rounding, values) = (ElementRounding::NearestEven, Values::F32(&bytes));
    quantize_rows(scheme.weight, rounding, values, 0, &mut codes, &mut scales).unwrap();
    let mut decoded = vec![0.0; count];
    let matrix = MxTensor::new(format, shape, &codes, &scales).unwrap();
    for (row, out) in decoded.chunks_exact_mut(shape[1]).enumerate() {
        matrix.dequantize_row(row, out);
    }
    // A rotation is its own inverse.
    scheme.rotate(&mut decoded);
    (codes, scales, decoded.into_iter().flat_map(f32::to_le_bytes).collect())
}

/// Whether a module is one of the seven linear layers of a decoder layer.
pub(crate) fn in_a_layer(module: &str) -> bool {
    module.ends_with("_proj")
}

fn logits(dir: &Path, golden: &Golden) -> (Vec<f32>, Vec<LinearInfo>) {
    let table = blocks(golden.tokens.len());
    let mut runner = Runner::load(dir, KvCacheDtype::F32, table.len());
    let logits = runner.sequence(&golden.tokens, golden.tokens.len(), &table);
    (logits, runner.model.linear_info())
}

/// Checks that a packed model computes what the model of its decoded weights does; returns what it reports.
fn check(case: &str, scheme: impl Fn(&str) -> Option<Scheme>) -> Vec<LinearInfo> {
    let golden = Golden::read(case);
    let pair = quantize_pair(&golden.dir, scheme);
    let (decoded, _) = logits(pair.decoded.path(), &golden);
    let (packed, linears) = logits(pair.packed.path(), &golden);
    let errors = Errors::between(&packed, &decoded);
    // The CPU rounds what weights of integers are multiplied by to 16-bit block fixed point, whose error is up to 2^-15 of
    // a block's largest magnitude in each layer; all else differs in the order of F32 sums alone.
    let rounds = |row: &LinearInfo| {
        row.scheme.is_some_and(|scheme| scheme.weight.format.element.spec().int8_factor().is_some())
    };
    let bound = if linears.iter().any(rounds) { 2e-3 } else { 3e-5 };
    assert!(errors.max <= bound, "{case}, {linears:?}: {errors:?}");
    assert!(Errors::between(&packed, &golden.logits).rms > 1e-3, "{case}: quantization changes the logits");
    linears
}

fn weight_only(element: ElementType) -> Scheme {
    Scheme { weight: MxFormat::new(element).into(), activation: None, rotation: None }
}

#[test]
fn every_format_computes_what_its_decoded_weights_do() {
    for element in ElementType::ALL {
        let scheme = weight_only(element);
        let linears = check("llama_biases", |module| in_a_layer(module).then_some(scheme));
        for row in &linears {
            let declared = (row.group != "lm_head").then_some(scheme);
            assert_eq!(row.scheme, declared, "{}", row.group);
            let bits = declared.map_or(16.0, |scheme| scheme.weight.format.bits_per_element());
            assert_eq!(row.bytes as f64 * 8.0, row.parameters as f64 * bits, "{} in {scheme}", row.group);
        }
    }
}

#[test]
fn neighbours_with_different_schemes_write_to_their_own_columns() {
    let of = |name: &str| Some(name.parse::<Scheme>().unwrap());
    let linears = check("llama_biases", |module| match module.rsplit('.').next().unwrap() {
        "q_proj" | "up_proj" => of("mxfp4"),
        "v_proj" if module.contains("layers.1.") => of("mxint8"),
        "v_proj" | "gate_proj" => None,
        _ => of("mxfp6"),
    });
    let groups: Vec<_> = linears.iter().map(|row| (row.group.as_str(), row.layers)).collect();
    let expected = [
        ("q_proj", 2),
        ("k_proj", 2),
        ("v_proj", 1),
        ("o_proj", 2),
        ("gate_proj", 2),
        ("up_proj", 2),
        ("down_proj", 2),
        ("v_proj", 1),
        ("lm_head", 1),
    ];
    assert_eq!(groups, expected);
}

#[test]
fn a_head_of_its_own_can_be_quantized() {
    let scheme = weight_only(ElementType::E2m3);
    let linears = check("llama", |module| (module == "lm_head").then_some(scheme));
    assert_eq!(linears.last().map(|row| (row.group.as_str(), row.scheme)), Some(("lm_head", Some(scheme))));
}

#[test]
fn a_quantized_embedding_serves_the_tied_head_too() {
    let scheme = weight_only(ElementType::E4m3);
    let linears = check("qwen3", |module| (module == "model.embed_tokens").then_some(scheme));
    assert_eq!(linears.last().map(|row| (row.group.as_str(), row.scheme)), Some(("lm_head", Some(scheme))));
}

#[test]
fn a_tied_model_uses_a_quantized_head_that_it_carries() {
    let golden = Golden::read("llama");
    let scheme = weight_only(ElementType::E2m1);
    let pair = quantize_pair(&golden.dir, |module| (module == "lm_head").then_some(scheme));
    let (untied, _) = logits(pair.packed.path(), &golden);
    tie(pair.packed.path());
    let (tied, linears) = logits(pair.packed.path(), &golden);
    assert!(untied == tied, "the packed head is used");
    assert_eq!(linears.last().unwrap().scheme, Some(scheme));

    // An unquantized head in a tied checkpoint is a copy of the embedding, and is not loaded.
    tie(pair.decoded.path());
    let (copied, _) = logits(pair.decoded.path(), &golden);
    assert!(Errors::between(&copied, &tied).rms > 0.1, "the embedding of this model is not its head");
}

fn tie(dir: &Path) {
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    config["tie_word_embeddings"] = true.into();
    fs::write(path, config.to_string()).unwrap();
}

#[test]
fn declared_activation_formats_are_executed() {
    let golden = Golden::read("mistral_window");
    let run = |name: &str| {
        let scheme: Scheme = name.parse().unwrap();
        let dir = quantize(&golden.dir, |module| in_a_layer(module).then_some(scheme));
        let (logits, linears) = logits(dir.path(), &golden);
        assert_eq!(linears[0].scheme.map(|scheme| scheme.to_string()), Some(scheme.to_string()));
        logits
    };
    let weight_only = run("mxint8");
    let coarser = ["mxint8:mxint8", "mxint8:mxfp6", "mxint8:mxfp4"].map(run);
    let errors = coarser.map(|logits| Errors::between(&logits, &weight_only).rms);
    assert!(errors[0] > 1e-3 && errors[1] > 2.0 * errors[0] && errors[2] > 2.0 * errors[1], "{errors:?}");
}

#[test]
fn packed_bytes_are_accounted_as_weights_and_scales() {
    let golden = Golden::read("qwen3");
    let scheme = weight_only(ElementType::E2m1);
    let dir = quantize(&golden.dir, |module| in_a_layer(module).then_some(scheme));
    let runner = Runner::load(dir.path(), KvCacheDtype::F32, 1);
    let linears = runner.model.linear_info();
    let quantized: usize = linears.iter().filter(|row| row.scheme.is_some()).map(|row| row.parameters).sum();
    let memory = runner.backend.memory();
    assert_eq!(memory.bytes(Component::Weights), quantized / 2);
    assert_eq!(memory.bytes(Component::Scales), quantized / 32);
}

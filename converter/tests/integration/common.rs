//! Models to convert, and how to look at the result.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use converter::plan::Recipe;
use converter::{ConvertError, Options, Report, convert};
use half::{bf16, f16};
use kernels::mx::{Cast, ElementRounding, Values, quantize_rows};
use models::checkpoint::{Checkpoint, LinearTensor};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

/// A real small model in BF16, tied.
pub(crate) fn rustdoc_6m() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/rustdoc-6m")
}

/// A tensor to write.
#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

impl Tensor {
    /// Reproducible values that BF16 and F16 do not hold exactly.
    pub(crate) fn new(name: &str, dtype: Dtype, shape: &[usize]) -> Self {
        let elements: usize = shape.iter().product();
        let mut state = name
            .bytes()
            .fold(0x9E37_79B9_7F4A_7C15_u64, |s, b| (s ^ u64::from(b)).wrapping_mul(0x0100_0000_01B3));
        let values = (0..elements).map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as f32 / (1_u64 << 31) as f32 - 0.5
        });
        Self { name: name.to_owned(), dtype, shape: shape.to_vec(), bytes: encode(dtype, values) }
    }
}

fn encode(dtype: Dtype, values: impl Iterator<Item = f32>) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => values.flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect(),
        Dtype::F16 => values.flat_map(|v| f16::from_f32(v).to_le_bytes()).collect(),
        Dtype::F32 => values.flat_map(f32::to_le_bytes).collect(),
        other => panic!("no test tensors of {other}"),
    }
}

/// Tensors of an untied two-layer Llama, K = 64 and 96.
pub(crate) fn tiny_llama(dtype: Dtype) -> Vec<Tensor> {
    let mut tensors = vec![
        Tensor::new("model.embed_tokens.weight", dtype, &[48, 64]),
        Tensor::new("model.norm.weight", dtype, &[64]),
        Tensor::new("lm_head.weight", dtype, &[48, 64]),
    ];
    for layer in 0..2 {
        for (name, shape) in [
            ("input_layernorm", &[64][..]),
            ("post_attention_layernorm", &[64]),
            ("self_attn.q_proj", &[64, 64]),
            ("self_attn.k_proj", &[32, 64]),
            ("self_attn.v_proj", &[32, 64]),
            ("self_attn.o_proj", &[64, 64]),
            ("mlp.gate_proj", &[96, 64]),
            ("mlp.up_proj", &[96, 64]),
            ("mlp.down_proj", &[64, 96]),
        ] {
            tensors.push(Tensor::new(&format!("model.layers.{layer}.{name}.weight"), dtype, shape));
        }
    }
    tensors
}

/// `config.json` of [`tiny_llama`].
pub(crate) fn tiny_config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "vocab_size": 48, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 128,
        "tie_word_embeddings": false,
    })
}

/// Writes a checkpoint folder; several files get an index.
pub(crate) fn write_model(dir: &Path, config: &Value, tensors: &[Tensor], files: usize) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut weight_map = serde_json::Map::new();
    for (i, part) in tensors.chunks(tensors.len().div_ceil(files)).enumerate() {
        let name = match files {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{files:05}.safetensors", i + 1),
        };
        let views = part.iter().map(|t| {
            weight_map.insert(t.name.clone(), name.as_str().into());
            (t.name.as_str(), TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap())
        });
        std::fs::write(dir.join(&name), safetensors::serialize(views, None).unwrap()).unwrap();
    }
    if files > 1 {
        let index = json!({"metadata": {}, "weight_map": weight_map});
        std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
}

/// Converts with the recipe that a format alone means.
pub(crate) fn convert_to(model: &Path, output: &Path, format: &str) -> Result<Report, ConvertError> {
    convert(&Options::new(model, output, Recipe::new(format.parse().unwrap())), &())
}

/// Every file of a folder.
pub(crate) fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(path).unwrap())
        })
        .collect()
}

/// Names in a folder, sorted.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Asserts that `module` of `packed` holds the direct cast of `values` `[rows, cols]`.
pub(crate) fn assert_direct_cast(packed: &Checkpoint, module: &str, values: Values<'_>, shape: [usize; 2]) {
    let linear = packed.linear(module).unwrap();
    let LinearTensor::Mx(mx) = &linear else { panic!("{module} is not packed") };
    let cast: Cast = mx.scheme().weight;
    let elements = shape[0] * shape[1];
    let mut codes = vec![0; cast.format.code_bytes(elements)];
    let mut scales = vec![0; cast.format.scale_bytes(elements)];
    quantize_rows(cast, ElementRounding::NearestEven, values, 0, &mut codes, &mut scales).unwrap();
    let tensor = mx.tensor();
    assert_eq!(tensor.shape(), shape, "{module}");
    for row in 0..shape[0] {
        assert_eq!(
            tensor.row_codes(row),
            &codes[row * cast.format.code_bytes(shape[1])..][..cast.format.code_bytes(shape[1])]
        );
        assert_eq!(
            tensor.row_scales(row),
            &scales[row * cast.format.scale_bytes(shape[1])..][..cast.format.scale_bytes(shape[1])]
        );
    }
}

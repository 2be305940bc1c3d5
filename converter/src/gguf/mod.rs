//! Llama-architecture GGUF files: dequantized by candle, renamed, q and k rows put back into Hugging Face's order.

mod alignment;
mod config;
mod tokenizer;

use std::fs::File;
use std::io::{BufReader, Seek};
use std::path::{Path, PathBuf};

use candle_core::Device;
use candle_core::quantized::gguf_file::{Content, Value as GgufValue};
use safetensors::Dtype;
use serde_json::Value;

use crate::error::ConvertError;
use crate::source::SourceTensor;

pub(crate) use tokenizer::TokenizerFiles;

/// Names inside a block, in ggml and in Hugging Face's Llama.
const BLOCK_NAMES: [(&str, &str); 9] = [
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
];

/// RoPE frequency factors: not a weight in Hugging Face, see [`config`].
const ROPE_FREQS: &str = "rope_freqs.weight";

/// An open GGUF file.
#[derive(Debug)]
pub(crate) struct GgufSource {
    path: PathBuf,
    content: Content,
    tensors: Vec<SourceTensor>,
    origins: Vec<Origin>,
    config: Value,
}

/// Where a tensor comes from.
#[derive(Debug)]
struct Origin {
    name: String,
    stored_bytes: u64,
    /// Heads whose rows ggml's RoPE order interleaves.
    heads: Option<usize>,
}

impl GgufSource {
    /// Reads the header; checks that the file is as long as it says.
    pub(crate) fn open(path: &Path) -> Result<Self, ConvertError> {
        let gguf = |reason: String| ConvertError::Gguf { path: path.to_owned(), reason };
        let file = File::open(path).map_err(ConvertError::io(path))?;
        let file_bytes = file.metadata().map_err(ConvertError::io(path))?.len();
        let mut reader = BufReader::new(file);
        if alignment::is_zero(&mut reader) {
            return Err(gguf("metadata general.alignment is 0".to_owned()));
        }
        reader.rewind().map_err(ConvertError::io(path))?;
        let content = Content::read(&mut reader)
            .map_err(|e| gguf(format!("no readable GGUF file: {}", first_line(&e))))?;
        let metadata = Metadata { content: &content };
        let architecture = metadata.string("general.architecture").map_err(&gguf)?;
        if architecture != "llama" {
            return Err(gguf(format!("architecture '{architecture}' is not supported; known: llama")));
        }

        let mut entries: Vec<_> = content.tensor_infos.iter().collect();
        entries.sort_by_key(|(_, info)| info.offset);
        let config = config::build(&metadata, &content, path).map_err(&gguf)?;
        let (mut tensors, mut origins) = (Vec::new(), Vec::new());
        for (name, info) in entries {
            let elements = info.shape.dims().iter().try_fold(1_usize, |n, &dim| n.checked_mul(dim));
            let stored_bytes = elements
                .filter(|elements| elements.checked_mul(size_of::<f32>()).is_some())
                .and_then(|n| (n / info.ggml_dtype.block_size()).checked_mul(info.ggml_dtype.type_size()))
                .ok_or_else(|| gguf(format!("tensor {name}: shape {:?} is too large", info.shape.dims())))?
                as u64;
            if content.tensor_data_offset.saturating_add(info.offset).saturating_add(stored_bytes)
                > file_bytes
            {
                return Err(gguf(format!(
                    "truncated: tensor {name} ends after the file's {file_bytes} bytes"
                )));
            }
            if name == ROPE_FREQS {
                continue;
            }
            let renamed =
                rename(name).ok_or_else(|| gguf(format!("tensor {name} is not part of a dense Llama")))?;
            let heads = match renamed.rsplit('.').nth(1) {
                Some("q_proj") => Some(config::heads(&config, "num_attention_heads")),
                Some("k_proj") => Some(config::heads(&config, "num_key_value_heads")),
                _ => None,
            };
            let rows = info.shape.dims().first().copied().unwrap_or(0);
            let fit = |heads: usize| {
                heads.checked_mul(2).is_some_and(|halves| halves > 0 && rows.is_multiple_of(halves))
            };
            if let Some(heads) = heads.filter(|heads| !fit(*heads)) {
                return Err(gguf(format!("tensor {name}: {rows} rows do not fit {heads} heads")));
            }
            tensors.push(SourceTensor {
                name: renamed,
                dtype: Dtype::F32,
                shape: info.shape.dims().to_vec(),
            });
            origins.push(Origin { name: name.clone(), stored_bytes, heads });
        }
        Ok(Self { path: path.to_owned(), content, tensors, origins, config })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    /// `config.json` of the equivalent Hugging Face folder.
    pub(crate) fn config(&self) -> &Value {
        &self.config
    }

    pub(crate) fn stored_bytes(&self, tensor: usize) -> u64 {
        self.origins[tensor].stored_bytes
    }

    /// Tokenizer and generation files, or the reason why there are none.
    pub(crate) fn tokenizer(&self) -> Result<TokenizerFiles, String> {
        tokenizer::build(&Metadata { content: &self.content })
    }

    /// `generation_config.json`.
    pub(crate) fn generation_config(&self) -> Value {
        config::generation(&self.config)
    }

    /// Dequantizes a tensor into F32 bytes, its rows in Hugging Face's order.
    pub(crate) fn read(&self, tensor: usize, out: &mut Vec<u8>) -> Result<(), ConvertError> {
        let origin = &self.origins[tensor];
        let candle = |e: candle_core::Error| ConvertError::Gguf {
            path: self.path.clone(),
            reason: format!("tensor {}: {}", origin.name, first_line(&e)),
        };
        let mut file = File::open(&self.path).map_err(ConvertError::io(&self.path))?;
        let quantized = self.content.tensor(&mut file, &origin.name, &Device::Cpu).map_err(candle)?;
        let values = quantized
            .dequantize(&Device::Cpu)
            .and_then(|tensor| tensor.flatten_all()?.to_vec1::<f32>())
            .map_err(candle)?;
        drop(quantized);

        out.clear();
        out.reserve(values.len() * 4);
        let rows = self.tensors[tensor].shape[0];
        let cols = values.len() / rows.max(1);
        for row in 0..rows {
            let from = origin.heads.map_or(row, |heads| ggml_row(row, rows / heads));
            for value in &values[from * cols..][..cols] {
                out.extend_from_slice(&value.to_le_bytes());
            }
        }
        Ok(())
    }
}

/// Row of ggml's q or k that is row `row` of Hugging Face's: ggml rotates neighbours (2i, 2i + 1), Hugging Face the
/// halves of a head (i, i + dim / 2).
fn ggml_row(row: usize, head_dim: usize) -> usize {
    let (head, i) = (row / head_dim, row % head_dim);
    let (half, pair) = (i / (head_dim / 2), i % (head_dim / 2));
    head * head_dim + 2 * pair + half
}

/// A tensor's name in a Hugging Face Llama.
fn rename(name: &str) -> Option<String> {
    match name {
        "token_embd.weight" => return Some("model.embed_tokens.weight".to_owned()),
        "output_norm.weight" => return Some("model.norm.weight".to_owned()),
        "output.weight" => return Some("lm_head.weight".to_owned()),
        _ => {}
    }
    let mut parts = name.strip_prefix("blk.")?.splitn(3, '.');
    let layer: usize = parts.next()?.parse().ok()?;
    let (ggml, kind) = (parts.next()?, parts.next()?);
    let (_, module) = BLOCK_NAMES.iter().find(|(g, _)| *g == ggml)?;
    matches!(kind, "weight" | "bias").then(|| format!("model.layers.{layer}.{module}.{kind}"))
}

/// candle's errors carry a backtrace after their first line.
fn first_line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

/// Typed access to GGUF metadata.
#[derive(Debug, Clone, Copy)]
struct Metadata<'a> {
    content: &'a Content,
}

impl<'a> Metadata<'a> {
    fn optional(&self, key: &str) -> Option<&'a GgufValue> {
        self.content.metadata.get(key)
    }

    fn required(&self, key: &str) -> Result<&'a GgufValue, String> {
        self.optional(key).ok_or_else(|| format!("metadata {key} is missing"))
    }

    fn string(&self, key: &str) -> Result<&'a str, String> {
        self.required(key)?
            .to_string()
            .map(String::as_str)
            .map_err(|_| format!("metadata {key} is no string"))
    }

    /// Any integer type.
    fn integer(&self, key: &str) -> Result<u64, String> {
        integer(self.required(key)?).ok_or_else(|| format!("metadata {key} is no unsigned integer"))
    }

    fn optional_integer(&self, key: &str) -> Result<Option<u64>, String> {
        self.optional(key).map(|_| self.integer(key)).transpose()
    }

    fn float(&self, key: &str) -> Result<f32, String> {
        self.required(key)?.to_f32().map_err(|_| format!("metadata {key} is no F32"))
    }

    fn flag(&self, key: &str) -> bool {
        self.optional(key).and_then(|v| v.to_bool().ok()).unwrap_or(false)
    }

    fn array(&self, key: &str) -> Result<&'a [GgufValue], String> {
        self.required(key)?.to_vec().map(Vec::as_slice).map_err(|_| format!("metadata {key} is no array"))
    }

    fn strings(&self, key: &str) -> Result<Vec<&'a str>, String> {
        self.array(key)?
            .iter()
            .map(|v| {
                v.to_string().map(String::as_str).map_err(|_| format!("metadata {key} holds no strings"))
            })
            .collect()
    }
}

fn integer(value: &GgufValue) -> Option<u64> {
    match *value {
        GgufValue::U8(v) => Some(v.into()),
        GgufValue::U16(v) => Some(v.into()),
        GgufValue::U32(v) => Some(v.into()),
        GgufValue::U64(v) => Some(v),
        GgufValue::I8(v) => v.try_into().ok(),
        GgufValue::I16(v) => v.try_into().ok(),
        GgufValue::I32(v) => v.try_into().ok(),
        GgufValue::I64(v) => v.try_into().ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let check = |ggml: &str, expected: Option<&str>| assert_eq!(rename(ggml).as_deref(), expected);
        check("token_embd.weight", Some("model.embed_tokens.weight"));
        check("output.weight", Some("lm_head.weight"));
        check("blk.12.attn_q.weight", Some("model.layers.12.self_attn.q_proj.weight"));
        check("blk.0.attn_k.bias", Some("model.layers.0.self_attn.k_proj.bias"));
        check("blk.0.ffn_gate_exps.weight", None);
        check("blk.x.attn_q.weight", None);
    }

    #[test]
    fn rows_go_back_to_halves() {
        // Hugging Face's rows 0..4 and 4..8 of a head of 8 are ggml's even and odd rows.
        let order: Vec<usize> = (0..16).map(|row| ggml_row(row, 8)).collect();
        assert_eq!(order, [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]);
    }
}

//! `config.json` from GGUF metadata.

use std::fs::File;
use std::path::Path;

use candle_core::Device;
use candle_core::quantized::gguf_file::Content;
use serde_json::{Value, json};

use super::{Metadata, ROPE_FREQS, first_line};

/// Llama 3's RoPE scaling (`_compute_llama3_parameters` in Transformers), whose factors GGUF stores instead of its
/// parameters; these three are the same in every Llama 3 release.
const LOW_FREQ_FACTOR: f64 = 1.0;
const HIGH_FREQ_FACTOR: f64 = 4.0;
const ORIGINAL_CONTEXT: f64 = 8192.0;

/// The config of the equivalent Hugging Face folder.
pub(super) fn build(metadata: &Metadata<'_>, content: &Content, path: &Path) -> Result<Value, String> {
    let hidden = metadata.integer("llama.embedding_length")?;
    let heads = metadata.integer("llama.attention.head_count")?;
    if heads == 0 {
        return Err("metadata llama.attention.head_count is 0".to_owned());
    }
    if metadata.optional_integer("llama.expert_count")?.is_some_and(|experts| experts > 0) {
        return Err("a mixture of experts is not supported".to_owned());
    }
    let kv_heads = metadata.optional_integer("llama.attention.head_count_kv")?.unwrap_or(heads);
    let head_dim = metadata.optional_integer("llama.attention.key_length")?.unwrap_or(hidden / heads);
    let has = |tensor: &str| content.tensor_infos.contains_key(tensor);
    let vocabulary = match metadata.optional("tokenizer.ggml.tokens") {
        Some(_) => metadata.array("tokenizer.ggml.tokens")?.len() as u64,
        None => metadata.integer("llama.vocab_size")?,
    };
    let theta = match metadata.optional("llama.rope.freq_base") {
        Some(_) => shortest(metadata.float("llama.rope.freq_base")?),
        None => 10000.0,
    };
    Ok(json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": has("blk.0.attn_q.bias"),
        "attention_dropout": 0.0,
        "bos_token_id": metadata.optional_integer("tokenizer.ggml.bos_token_id")?,
        "eos_token_id": metadata.optional_integer("tokenizer.ggml.eos_token_id")?,
        "pad_token_id": metadata.optional_integer("tokenizer.ggml.padding_token_id")?,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.041_666_666_666_666_664,
        "intermediate_size": metadata.integer("llama.feed_forward_length")?,
        "max_position_embeddings": metadata.integer("llama.context_length")?,
        "mlp_bias": has("blk.0.ffn_gate.bias"),
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": metadata.integer("llama.block_count")?,
        "num_key_value_heads": kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": shortest(metadata.float("llama.attention.layer_norm_rms_epsilon")?),
        "rope_scaling": rope_scaling(metadata, content, path, theta, head_dim)?,
        "rope_theta": theta,
        "tie_word_embeddings": !has("output.weight"),
        "torch_dtype": "bfloat16",
        "use_cache": true,
        "vocab_size": vocabulary,
    }))
}

/// `generation_config.json`.
pub(super) fn generation(config: &Value) -> Value {
    json!({
        "_from_model_config": true,
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": config["pad_token_id"],
    })
}

/// A number of heads in a config made by [`build`].
pub(super) fn heads(config: &Value, field: &str) -> usize {
    config[field].as_u64().and_then(|heads| usize::try_from(heads).ok()).unwrap_or(0)
}

/// The F64 that prints like the F32: 1e-5, not 9.999999747378752e-6.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or_else(|_| f64::from(value))
}

fn rope_scaling(
    metadata: &Metadata<'_>,
    content: &Content,
    path: &Path,
    theta: f64,
    head_dim: u64,
) -> Result<Value, String> {
    let kind = match metadata.optional("llama.rope.scaling.type") {
        Some(_) => metadata.string("llama.rope.scaling.type")?,
        None => "none",
    };
    match kind {
        "none" => {}
        "linear" => {
            let factor = shortest(metadata.float("llama.rope.scaling.factor")?);
            return Ok(json!({"rope_type": "linear", "factor": factor}));
        }
        other => return Err(format!("RoPE scaling '{other}' is not supported")),
    }
    if !content.tensor_infos.contains_key(ROPE_FREQS) {
        return Ok(Value::Null);
    }
    let factors = File::open(path)
        .map_err(candle_core::Error::from)
        .and_then(|mut file| content.tensor(&mut file, ROPE_FREQS, &Device::Cpu))
        .and_then(|tensor| tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>())
        .map_err(|e| format!("tensor {ROPE_FREQS}: {}", first_line(&e)))?;
    let factor = factors.iter().copied().fold(1.0_f32, f32::max);
    let expected = llama3_factors(theta, head_dim, f64::from(factor));
    let agrees = factors.len() == expected.len()
        && factors.iter().zip(&expected).all(|(a, b)| (f64::from(*a) - b).abs() <= 1e-3 * b);
    if !agrees {
        return Err(format!("tensor {ROPE_FREQS}: the factors are not those of Llama 3's RoPE scaling"));
    }
    Ok(json!({
        "rope_type": "llama3",
        "factor": shortest(factor),
        "low_freq_factor": LOW_FREQ_FACTOR,
        "high_freq_factor": HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": ORIGINAL_CONTEXT as u64,
    }))
}

/// What each rotation frequency is divided by.
fn llama3_factors(theta: f64, head_dim: u64, factor: f64) -> Vec<f64> {
    (0..head_dim / 2)
        .map(|i| {
            let frequency = theta.powf(-(2.0 * i as f64) / head_dim as f64);
            let wavelength = 2.0 * std::f64::consts::PI / frequency;
            if wavelength < ORIGINAL_CONTEXT / HIGH_FREQ_FACTOR {
                1.0
            } else if wavelength > ORIGINAL_CONTEXT / LOW_FREQ_FACTOR {
                factor
            } else {
                let smooth =
                    (ORIGINAL_CONTEXT / wavelength - LOW_FREQ_FACTOR) / (HIGH_FREQ_FACTOR - LOW_FREQ_FACTOR);
                1.0 / ((1.0 - smooth) / factor + smooth)
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f32_metadata_prints_as_written() {
        assert_eq!(shortest(1e-5), 1e-5);
        assert_eq!(shortest(500_000.0), 500_000.0);
    }

    #[test]
    fn llama3_factors_run_from_one_to_the_factor() {
        let factors = llama3_factors(500_000.0, 128, 8.0);
        assert_eq!(factors.len(), 64);
        assert_eq!(factors[0], 1.0);
        assert_eq!(factors[63], 8.0);
        assert!(factors.is_sorted());
        assert!(factors.iter().any(|f| *f > 1.0 && *f < 8.0));
    }
}

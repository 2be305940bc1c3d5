//! Qwen3: Llama with an RMS norm over each head of q and k before RoPE, and a head dimension of its own.

use crate::ConfigError;
use crate::config::{Biases, Variant, qwen_windows};
use crate::fields::Fields;
use crate::llama;
use crate::registry::Architecture;

pub(crate) const ARCHITECTURE: Architecture =
    Architecture { name: "Qwen3ForCausalLM", variant, names: &llama::NAMES };

fn variant(config: &Fields<'_>, num_layers: usize) -> Result<Variant, ConfigError> {
    let attention = config.flag("attention_bias", false)?;
    Ok(Variant {
        default_head_dim: Some(128),
        windows: qwen_windows(config, num_layers)?,
        biases: Biases { qkv: attention, output: attention, mlp: false },
        qk_norm: true,
    })
}

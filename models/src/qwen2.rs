//! Qwen2 and Qwen2.5: Llama with biases on q, k and v, and a sliding window in the upper layers on request.

use crate::ConfigError;
use crate::config::{Biases, Variant, qwen_windows};
use crate::fields::Fields;
use crate::llama;
use crate::registry::Architecture;

pub(crate) const ARCHITECTURE: Architecture =
    Architecture { name: "Qwen2ForCausalLM", variant, names: &llama::NAMES };

fn variant(config: &Fields<'_>, num_layers: usize) -> Result<Variant, ConfigError> {
    Ok(Variant {
        default_head_dim: None,
        windows: qwen_windows(config, num_layers)?,
        biases: Biases { qkv: true, ..Biases::default() },
        qk_norm: false,
    })
}

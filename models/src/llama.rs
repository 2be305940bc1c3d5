//! Llama: grouped-query attention, RoPE (Llama 3.1 stretches it), a gated MLP; biases where the config asks for them.

use crate::ConfigError;
use crate::config::{Biases, Variant};
use crate::decoder::WeightNames;
use crate::fields::Fields;
use crate::registry::Architecture;

pub(crate) const ARCHITECTURE: Architecture =
    Architecture { name: "LlamaForCausalLM", variant, names: &NAMES };

/// Names that the Llama family shares.
pub(crate) const NAMES: WeightNames = WeightNames {
    embed: "model.embed_tokens",
    layers: "model.layers",
    input_norm: "input_layernorm",
    qkv: ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    qk_norm: ["self_attn.q_norm", "self_attn.k_norm"],
    attention_output: "self_attn.o_proj",
    post_attention_norm: "post_attention_layernorm",
    gate_up: ["mlp.gate_proj", "mlp.up_proj"],
    down: "mlp.down_proj",
    norm: "model.norm",
    head: "lm_head",
};

fn variant(config: &Fields<'_>, num_layers: usize) -> Result<Variant, ConfigError> {
    let attention = config.flag("attention_bias", false)?;
    Ok(Variant {
        default_head_dim: None,
        windows: vec![None; num_layers],
        biases: Biases { qkv: attention, output: attention, mlp: config.flag("mlp_bias", false)? },
        qk_norm: false,
    })
}

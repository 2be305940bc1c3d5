//! `config.json`, parsed once and then trusted.

use kernels::Heads;
use serde_json::Value;

use crate::fields::Fields;
use crate::{ConfigError, Rope, registry};

/// The name of the file, in errors.
const FILE: &str = "config.json";

/// What defines a decoder's arithmetic. Made by [`parse`](Self::parse) alone, so that the parts fit together.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The class in Transformers: `LlamaForCausalLM`.
    pub architecture: &'static str,
    /// Tokens, and rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Decoder layers; at least 1.
    pub num_layers: usize,
    /// Attention heads; `q` is a multiple of `kv`, `dim` is even.
    pub heads: Heads,
    /// For each layer, the positions a row sees, its own included; `None` sees all before it.
    pub windows: Vec<Option<usize>>,
    /// Which linear layers have biases.
    pub biases: Biases,
    /// Whether the heads of q and k are RMS-normed before RoPE.
    pub qk_norm: bool,
    /// Added to the mean square in every RMS norm.
    pub rms_norm_eps: f32,
    /// Rotary position embedding.
    pub rope: Rope,
    /// The longest context, in tokens.
    pub max_model_len: usize,
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Tokens that end a sequence, as far as `config.json` tells; [`GenerationConfig`](crate::GenerationConfig)
    /// adds those of `generation_config.json`.
    pub eos_token_ids: Vec<u32>,
}

/// Which linear layers have biases.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Biases {
    /// The projections to q, k and v.
    pub qkv: bool,
    /// The attention's output projection.
    pub output: bool,
    /// The three projections of the MLP.
    pub mlp: bool,
}

/// What an architecture decides about a config, beside the fields that all have in common.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Variant {
    /// Head dimension where the config has none; `None` divides the hidden size by the heads.
    pub(crate) default_head_dim: Option<usize>,
    pub(crate) windows: Vec<Option<usize>>,
    pub(crate) biases: Biases,
    pub(crate) qk_norm: bool,
}

/// Fields that would change the arithmetic in a way that no decoder here has, and the values that leave it alone.
const UNSUPPORTED: [(&str, &[f64]); 7] = [
    ("partial_rotary_factor", &[1.0]),
    ("attn_logit_softcapping", &[]),
    ("final_logit_softcapping", &[]),
    ("num_experts", &[0.0, 1.0]),
    ("num_local_experts", &[0.0, 1.0]),
    ("n_routed_experts", &[0.0]),
    ("clip_qkv", &[]),
];

impl ModelConfig {
    /// Reads the content of a `config.json` as Transformers 4 or 5 writes it.
    ///
    /// # Errors
    /// Names the first field that is missing, wrong, or not supported.
    pub fn parse(config: &Value) -> Result<Self, ConfigError> {
        let fields = Fields::new(FILE, config)?;
        let architecture = registry::architecture(&fields)?;
        for (field, neutral) in UNSUPPORTED {
            if let Some(value) = fields.value(field)
                && !value.as_f64().is_some_and(|x| neutral.contains(&x))
            {
                return Err(fields.unsupported(field, "none"));
            }
        }
        if let Some(activation) = fields.text("hidden_act")?
            && !["silu", "swish"].contains(&activation)
        {
            return Err(fields.unsupported("hidden_act", "silu"));
        }

        let size = |field| fields.size(field).and_then(|value| fields.require(field, value));
        let num_layers = size("num_hidden_layers")?;
        let hidden_size = size("hidden_size")?;
        let variant = (architecture.variant)(&fields, num_layers)?;
        let heads = heads(&fields, hidden_size, variant.default_head_dim)?;
        let max_position_embeddings = size("max_position_embeddings")?;
        let rope = Rope::parse(&fields, heads.dim, max_position_embeddings)?;
        Ok(Self {
            architecture: architecture.name,
            vocab_size: size("vocab_size")?,
            hidden_size,
            intermediate_size: size("intermediate_size")?,
            num_layers,
            heads,
            windows: variant.windows,
            biases: variant.biases,
            qk_norm: variant.qk_norm,
            rms_norm_eps: fields.non_negative("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            max_model_len: rope.max_positions,
            rope,
            tie_word_embeddings: fields.flag("tie_word_embeddings", false)?,
            eos_token_ids: fields.token_ids("eos_token_id")?,
        })
    }
}

fn heads(fields: &Fields<'_>, hidden_size: usize, default_dim: Option<usize>) -> Result<Heads, ConfigError> {
    let q = fields.size("num_attention_heads")?;
    let q = fields.require("num_attention_heads", q)?;
    let kv = fields.size("num_key_value_heads")?.unwrap_or(q);
    if !q.is_multiple_of(kv) {
        return Err(fields.invalid("num_key_value_heads", format!("a divisor of num_attention_heads = {q}")));
    }
    let dim = match fields.size("head_dim")?.or(default_dim) {
        Some(dim) => dim,
        None if hidden_size.is_multiple_of(q) => hidden_size / q,
        None => {
            return Err(
                fields.invalid("num_attention_heads", format!("a divisor of hidden_size = {hidden_size}"))
            );
        }
    };
    if !dim.is_multiple_of(2) {
        return Err(fields.invalid("head_dim", format!("even (it comes to {dim})")));
    }
    Ok(Heads { q, kv, dim })
}

/// The windows of Qwen2 and Qwen3: `layer_types` says which layers slide; without it, those from
/// `max_window_layers` on.
pub(crate) fn qwen_windows(
    fields: &Fields<'_>,
    num_layers: usize,
) -> Result<Vec<Option<usize>>, ConfigError> {
    let window =
        if fields.flag("use_sliding_window", false)? { fields.size("sliding_window")? } else { None };
    if let Some(types) = fields.texts("layer_types")? {
        if types.len() != num_layers {
            return Err(fields.invalid("layer_types", format!("a list of num_hidden_layers = {num_layers}")));
        }
        return types
            .into_iter()
            .map(|kind| match kind {
                "full_attention" => Ok(None),
                "sliding_attention" => Ok(window),
                _ => Err(fields.unsupported("layer_types", "full_attention, sliding_attention")),
            })
            .collect();
    }
    let first = fields.count("max_window_layers")?.unwrap_or(28);
    Ok((0..num_layers).map(|layer| window.filter(|_| layer >= first)).collect())
}

#[cfg(test)]
pub(crate) mod tests;

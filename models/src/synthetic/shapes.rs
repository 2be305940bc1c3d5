//! Sizes of known models, as their `config.json` has them.

use std::str::FromStr;

use serde_json::{Value, json};

/// The sizes of a known model. A new one is one row of [`Shape::ALL`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Its name: `llama-8b`.
    pub name: &'static str,
    architecture: &'static str,
    hidden: usize,
    intermediate: usize,
    layers: usize,
    /// Query heads, key/value heads, elements per head.
    heads: [usize; 3],
    vocab: usize,
    tied: bool,
}

const LLAMA: &str = "LlamaForCausalLM";
const QWEN3: &str = "Qwen3ForCausalLM";

impl Shape {
    /// The known shapes: SmolLM2-135M, Llama-3.2-1B, Qwen3-4B, Llama-3.1-8B, and one GPU's share of Llama-3.1-70B
    /// when eight share its heads, MLP and vocabulary.
    #[rustfmt::skip]
    pub const ALL: [Self; 5] = [
        Self::row("smollm2-135m",  LLAMA,  576,  1536, 30, [ 9, 3,  64],  49_152, true),
        Self::row("llama-1b",      LLAMA, 2048,  8192, 16, [32, 8,  64], 128_256, true),
        Self::row("qwen3-4b",      QWEN3, 2560,  9728, 36, [32, 8, 128], 151_936, true),
        Self::row("llama-8b",      LLAMA, 4096, 14336, 32, [32, 8, 128], 128_256, false),
        Self::row("llama-70b-tp8", LLAMA, 8192,  3584, 80, [ 8, 1, 128],  16_032, false),
    ];

    #[allow(clippy::too_many_arguments, reason = "a row of the table")]
    const fn row(
        name: &'static str,
        architecture: &'static str,
        hidden: usize,
        intermediate: usize,
        layers: usize,
        heads: [usize; 3],
        vocab: usize,
        tied: bool,
    ) -> Self {
        Self { name, architecture, hidden, intermediate, layers, heads, vocab, tied }
    }

    /// The content of its `config.json`.
    pub fn config(&self) -> Value {
        let [q, kv, dim] = self.heads;
        json!({
            "architectures": [self.architecture],
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": q,
            "num_key_value_heads": kv,
            "head_dim": dim,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "max_position_embeddings": 131_072,
        })
    }
}

/// A name that is no shape.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown shape '{name}'; known: {}", Shape::ALL.map(|shape| shape.name).join(", "))]
pub struct UnknownShape {
    name: String,
}

impl FromStr for Shape {
    type Err = UnknownShape;

    fn from_str(name: &str) -> Result<Self, UnknownShape> {
        let found = Self::ALL.into_iter().find(|shape| shape.name == name);
        found.ok_or_else(|| UnknownShape { name: name.to_owned() })
    }
}

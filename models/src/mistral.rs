//! Mistral: Llama with a sliding window in every layer.

use crate::ConfigError;
use crate::config::{Biases, Variant};
use crate::fields::Fields;
use crate::llama;
use crate::registry::Architecture;

pub(crate) const ARCHITECTURE: Architecture =
    Architecture { name: "MistralForCausalLM", variant, names: &llama::NAMES };

/// The window of Mistral 7B v0.1, where a config does not mention it; a null turns it off.
const DEFAULT_WINDOW: usize = 4096;

fn variant(config: &Fields<'_>, num_layers: usize) -> Result<Variant, ConfigError> {
    let window = match config.size("sliding_window")? {
        None if !config.mentions("sliding_window") => Some(DEFAULT_WINDOW),
        window => window,
    };
    Ok(Variant {
        default_head_dim: None,
        windows: vec![window; num_layers],
        biases: Biases::default(),
        qk_norm: false,
    })
}

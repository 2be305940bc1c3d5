//! Which architectures there are. To add one: a file like `qwen3.rs`, and its row here.

use kernels::Backend;

use crate::checkpoint::Checkpoint;
use crate::config::Variant;
use crate::decoder::{Decoder, WeightNames};
use crate::fields::Fields;
use crate::parameters::ParameterSource;
use crate::read_ahead::ReadAhead;
use crate::{ConfigError, Model, ModelConfig, ModelError, llama, mistral, qwen2, qwen3};

/// The architectures that run.
const ARCHITECTURES: [&Architecture; 4] =
    [&llama::ARCHITECTURE, &mistral::ARCHITECTURE, &qwen2::ARCHITECTURE, &qwen3::ARCHITECTURE];

/// What is particular to one architecture.
pub(crate) struct Architecture {
    /// The name in `config.json`: `LlamaForCausalLM`.
    pub(crate) name: &'static str,
    /// Reads what the architecture decides; given the number of layers.
    pub(crate) variant: fn(&Fields<'_>, usize) -> Result<Variant, ConfigError>,
    /// Where its weights are.
    pub(crate) names: &'static WeightNames,
}

/// The architecture that `config.json` names.
pub(crate) fn architecture(config: &Fields<'_>) -> Result<&'static Architecture, ConfigError> {
    let names = config.texts("architectures")?;
    let names = config.require("architectures", names)?;
    ARCHITECTURES.into_iter().find(|known| names == [known.name]).ok_or_else(|| {
        let known: Vec<_> = ARCHITECTURES.iter().map(|known| known.name).collect();
        config.unsupported("architectures", known.join(", "))
    })
}

/// Loads the model of a checkpoint onto a device, one tensor (or group of fused tensors) at a time.
///
/// # Errors
/// The configuration is wrong or not supported, a tensor is missing, unreadable or of another shape than the
/// configuration calls for, or the device cannot take it.
pub fn load(backend: &dyn Backend, checkpoint: &Checkpoint) -> Result<Box<dyn Model>, ModelError> {
    let config = ModelConfig::parse(checkpoint.config())?;
    let names = names(&config);
    if backend.device_memory().is_none() {
        // What packs weights for the host are the threads that would read.
        return Ok(Box::new(Decoder::load(backend, checkpoint, config, names)?));
    }
    let mut modules = names.linear_modules(&config);
    if config.tie_word_embeddings && !ParameterSource::is_quantized(checkpoint, names.head)? {
        modules.pop();
    }
    std::thread::scope(|scope| {
        let source = ReadAhead::start(scope, checkpoint, modules);
        Ok::<_, ModelError>(Box::new(Decoder::load(backend, &source, config, names)?) as Box<dyn Model>)
    })
}

/// Where the weights of a model of `config` are.
pub(crate) fn names(config: &ModelConfig) -> &'static WeightNames {
    let known = ARCHITECTURES.into_iter().find(|known| known.name == config.architecture);
    known.expect("a parsed config names a known architecture").names
}

//! Decoder-only language models, written once over [`kernels::Backend`]: checkpoints in, logits out.
//!
//! [`Checkpoint`](checkpoint::Checkpoint) reads the files, [`ModelConfig`] what `config.json` says, [`load`] builds
//! a [`Model`]. One step fills [`StepInputs`], runs [`Model::forward`] over the [`KvCache`], and asks
//! [`Model::logits`] for the rows it needs. A new architecture is one file and one row of the registry.

#![forbid(unsafe_code)]

pub mod checkpoint;
mod config;
mod decoder;
mod error;
mod fields;
mod generation_config;
mod kv_cache;
mod layers;
mod llama;
mod mistral;
mod model;
mod parameters;
mod qwen2;
mod qwen3;
mod read_ahead;
mod registry;
mod rope;
pub mod staged;
mod step;
pub mod synthetic;
mod workspace;

pub use config::{Biases, ModelConfig};
pub use error::{ConfigError, ModelError};
pub use generation_config::GenerationConfig;
pub use kv_cache::KvCache;
pub use model::{LinearInfo, Model, Observer};
pub use registry::load;
pub use rope::Rope;
pub use step::{OutputRows, StepInputs, StepSequence};
pub use workspace::Workspace;

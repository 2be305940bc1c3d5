//! Every knob of the server, in two stages: [`Settings`] is what was said (in a TOML file, in the environment, by
//! flags; each knob may be missing), [`ServerConfig`] is what it means (every knob has a value, checked once).
//!
//! A flag wins over the environment, which wins over the file; [`ServerConfig::resolve`] is the one place that
//! merges them. `server.toml` beside this crate documents every key and its default.
#![forbid(unsafe_code)]

mod checks;
mod error;
mod file;
mod server;
mod settings;
mod sources;
mod values;

pub use error::ConfigError;
pub use server::{ServerConfig, TlsFiles};
pub use settings::Settings;
pub use sources::{Source, Sources};
pub use values::{
    DeviceChoice, GenerationConfig, LogFormat, LogLevel, ReasoningParser, SchedulingPolicy,
    SpeculativeConfig, SpeculativeMethod, ToolCallParser,
};

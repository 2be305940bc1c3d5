//! NVIDIA ModelOpt MXFP8: `quant_algo` in `config.json` or in `hf_quant_config.json`.
//!
//! ModelOpt's MXFP8 quantizes weights and, dynamically, inputs (`MXFP8_DEFAULT_CFG`).

use kernels::mx::{Block, ElementType, Scheme};
use serde::Deserialize;
use serde_json::Value;

use super::spec::{cast, parse, refuse_unless_empty};
use super::{Quantization, Refusal, rules};

/// ModelOpt's own file beside `config.json`.
pub(super) const FILE: &str = "hf_quant_config.json";

#[derive(Debug, Deserialize)]
struct Config {
    quant_algo: Option<String>,
    #[serde(default)]
    kv_cache_quant_algo: Option<Value>,
    #[serde(default)]
    kv_cache_scheme: Option<Value>,
    #[serde(default)]
    exclude_modules: Option<Vec<String>>,
    /// Newer exports name the excluded modules so.
    #[serde(default)]
    ignore: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
struct HfQuantConfig {
    quantization: Value,
}

/// Reads `quantization_config` of `config.json`.
pub(super) fn read(declared: &Value) -> Result<Quantization, Refusal> {
    let config: Config = parse("", declared)?;
    match config.quant_algo.as_deref() {
        Some("MXFP8" | "mxfp8") => {}
        other => {
            let algorithm = other.unwrap_or("none");
            return Err(Refusal::new(
                "quant_algo",
                format!("'{algorithm}' is not supported; known of ModelOpt: MXFP8"),
            ));
        }
    }
    refuse_unless_empty("kv_cache_quant_algo", config.kv_cache_quant_algo.as_ref(), "a quantized KV cache")?;
    refuse_unless_empty("kv_cache_scheme", config.kv_cache_scheme.as_ref(), "a quantized KV cache")?;
    let excluded = config.exclude_modules.into_iter().chain(config.ignore).flatten();
    // A name also stands for everything inside the module.
    let patterns = excluded.flat_map(|name| [format!("{name}.*"), name]);
    let mxfp8 = cast(ElementType::E4m3, Block::OCP, None);
    Ok(Quantization {
        dialect: Some("modelopt"),
        rules: rules("exclude_modules", patterns, None)?,
        default: Some(Scheme { weight: mxfp8, activation: Some(mxfp8), rotation: None }),
    })
}

/// Reads `hf_quant_config.json`.
pub(super) fn read_file(declared: &Value) -> Result<Quantization, Refusal> {
    let file: HfQuantConfig = parse("", declared)?;
    read(&file.quantization).map_err(|refusal| refusal.within("quantization"))
}

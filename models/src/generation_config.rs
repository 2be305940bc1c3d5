//! `generation_config.json`: how the makers of a model want it sampled.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use serde_json::Value;

use crate::fields::Fields;
use crate::{ConfigError, ModelConfig};

const FILE: &str = "generation_config.json";

/// Sampling defaults that come with a checkpoint; `None` where the file says nothing.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// Tokens that end a sequence: those of `generation_config.json`, then those that only `config.json` has.
    pub eos_token_ids: Vec<u32>,
    /// Sampling temperature.
    pub temperature: Option<f32>,
    /// Keep the k most likely tokens.
    pub top_k: Option<u32>,
    /// Keep the most likely tokens up to this probability.
    pub top_p: Option<f32>,
    /// Drop tokens less likely than this times the most likely.
    pub min_p: Option<f32>,
    /// Divides or multiplies the logits of tokens seen before.
    pub repetition_penalty: Option<f32>,
}

impl GenerationConfig {
    /// Reads the file in the checkpoint folder `dir`; a folder without one has no defaults but the end tokens of
    /// `config`.
    ///
    /// # Errors
    /// The file cannot be read or parsed, or a field has the wrong type.
    pub fn read(dir: &Path, config: &ModelConfig) -> Result<Self, ConfigError> {
        let path = dir.join(FILE);
        let json = match fs::read_to_string(&path) {
            Ok(text) => serde_json::from_str(&text)
                .map_err(|error| ConfigError::Json { path: path.display().to_string(), error })?,
            Err(error) if error.kind() == ErrorKind::NotFound => Value::Object(serde_json::Map::new()),
            Err(error) => return Err(ConfigError::Io { path: path.display().to_string(), error }),
        };
        Self::parse(&json, config)
    }

    /// Reads the content of a `generation_config.json`.
    ///
    /// # Errors
    /// A field has the wrong type.
    pub fn parse(json: &Value, config: &ModelConfig) -> Result<Self, ConfigError> {
        let fields = Fields::new(FILE, json)?;
        let number = |field| Ok::<_, ConfigError>(fields.non_negative(field)?.map(|value| value as f32));
        let mut eos_token_ids = fields.token_ids("eos_token_id")?;
        for &id in &config.eos_token_ids {
            if !eos_token_ids.contains(&id) {
                eos_token_ids.push(id);
            }
        }
        Ok(Self {
            eos_token_ids,
            temperature: number("temperature")?,
            // 0 and null both mean: no such limit.
            top_k: fields.count("top_k")?.filter(|&k| k > 0).map(|k| k as u32),
            top_p: number("top_p")?,
            min_p: number("min_p")?,
            repetition_penalty: number("repetition_penalty")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(eos: Value) -> ModelConfig {
        let mut config = crate::config::tests::llama();
        config["eos_token_id"] = eos;
        ModelConfig::parse(&config).unwrap()
    }

    #[test]
    fn end_tokens_of_both_files_are_merged_without_repetition() {
        let generation = json!({ "eos_token_id": [7, 9] });
        let merged = GenerationConfig::parse(&generation, &config(json!(9))).unwrap();
        assert_eq!(merged.eos_token_ids, [7, 9]);
        let merged = GenerationConfig::parse(&generation, &config(json!([9, 3]))).unwrap();
        assert_eq!(merged.eos_token_ids, [7, 9, 3]);
        let merged = GenerationConfig::parse(&json!({ "eos_token_id": null }), &config(json!(3))).unwrap();
        assert_eq!(merged.eos_token_ids, [3]);
    }

    #[test]
    fn sampling_defaults_are_read_and_zero_top_k_is_none() {
        let json = json!({ "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1 });
        let read = GenerationConfig::parse(&json, &config(Value::Null)).unwrap();
        assert_eq!((read.temperature, read.top_k, read.top_p), (Some(0.6), Some(20), Some(0.95)));
        assert_eq!((read.min_p, read.repetition_penalty), (None, Some(1.1)));
        let read = GenerationConfig::parse(&json!({ "top_k": 0 }), &config(Value::Null)).unwrap();
        assert_eq!(read.top_k, None);
    }

    #[test]
    fn a_folder_without_the_file_has_the_end_tokens_of_the_config() {
        let dir = tempfile::tempdir().unwrap();
        let read = GenerationConfig::read(dir.path(), &config(json!(5))).unwrap();
        assert_eq!(read, GenerationConfig { eos_token_ids: vec![5], ..GenerationConfig::default() });
    }

    #[test]
    fn errors_name_the_file_and_the_field() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), "{").unwrap();
        let error = GenerationConfig::read(dir.path(), &config(Value::Null)).unwrap_err().to_string();
        assert!(error.contains(FILE), "{error}");
        let error = GenerationConfig::parse(&json!({ "top_k": "many" }), &config(Value::Null)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "generation_config.json: top_k is \"many\", not an integer from 0 to 2097152"
        );
    }
}

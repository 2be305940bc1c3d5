//! Knobs that take one of a few names.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// Where the model runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// The best device that this build and machine have.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// Names of [`KvCacheDtype`]: its own, `auto` for the default, and vLLM's for the floats.
pub(crate) mod kv_cache_dtype {
    use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
    use kernels::KvCacheDtype;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    fn named(name: &str) -> Option<KvCacheDtype> {
        match name {
            "auto" => Some(KvCacheDtype::default()),
            "bfloat16" => Some(KvCacheDtype::Bf16),
            "float32" => Some(KvCacheDtype::F32),
            name => name.parse().ok(),
        }
    }

    /// Of a flag or an environment variable.
    pub(crate) fn parser() -> impl TypedValueParser<Value = KvCacheDtype> {
        let names = KvCacheDtype::ALL.map(|dtype| match dtype {
            KvCacheDtype::Bf16 => PossibleValue::new("bf16").alias("bfloat16"),
            KvCacheDtype::F32 => PossibleValue::new("f32").alias("float32"),
            dtype => PossibleValue::new(dtype.name()),
        });
        PossibleValuesParser::new(std::iter::once(PossibleValue::new("auto")).chain(names))
            .try_map(|name| named(&name).ok_or("no KV cache dtype"))
    }

    pub(crate) fn serialize<S: Serializer>(
        dtype: &Option<KvCacheDtype>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match dtype {
            Some(dtype) => serializer.serialize_str(dtype.name()),
            None => serializer.serialize_none(),
        }
    }

    /// Of the file; an error does not repeat its text.
    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<KvCacheDtype>, D::Error> {
        let name = String::deserialize(deserializer)?;
        let known = || {
            let names = KvCacheDtype::ALL.map(KvCacheDtype::name).join(", ");
            D::Error::custom(format!("expected auto, {names}"))
        };
        named(&name).ok_or_else(known).map(Some)
    }
}

/// Where the defaults of the sampling parameters come from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GenerationConfig {
    /// The model's `generation_config.json`, and neutral values for what it does not name.
    #[default]
    Auto,
    /// Neutral values only, as vLLM has them: temperature 1, nothing filtered.
    Vllm,
}

/// The least important log lines that are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Errors only.
    Error,
    /// And warnings.
    Warn,
    /// And a line for each request.
    #[default]
    Info,
    /// And what happens inside.
    Debug,
    /// Everything.
    Trace,
}

impl LogLevel {
    /// The name: `info`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

//! Knobs that take one of a few names.

use std::fmt;
use std::str::FromStr;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// Where the model runs; written `auto`, `cpu`, `cuda` or `cuda:1`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceChoice {
    /// The first GPU, if this build and machine have one; else the processor.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// An NVIDIA GPU.
    Cuda {
        /// Its number among the visible ones.
        ordinal: usize,
    },
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda { ordinal } => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda { ordinal: 0 }),
            _ => match text.strip_prefix("cuda:").map(str::parse) {
                Some(Ok(ordinal)) => Ok(Self::Cuda { ordinal }),
                _ => Err("must be auto, cpu, cuda or cuda:N".to_owned()),
            },
        }
    }
}

impl TryFrom<String> for DeviceChoice {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<DeviceChoice> for String {
    fn from(choice: DeviceChoice) -> Self {
        choice.to_string()
    }
}

/// Names of [`kernels::KvCacheDtype`]: its own, `auto` for the default, and vLLM's for the floats.
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

/// In which order requests are served.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SchedulingPolicy {
    /// First come, first served.
    #[default]
    Fcfs,
    /// By their `priority`, lower first, and equal ones in order of arrival.
    Priority,
}

/// How the model writes calls of tools; vLLM's names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum ToolCallParser {
    /// What the chat template shows.
    #[default]
    Auto,
    /// `<tool_call>{…}</tool_call>`: Nous Hermes, Qwen2.5, Qwen3.
    Hermes,
    /// `{"name": …, "parameters": …}` and nothing else: Llama 3.1 and later.
    Llama3Json,
    /// `[TOOL_CALLS]…`.
    Mistral,
}

/// How the model writes what it thinks before it answers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum ReasoningParser {
    /// What the chat template shows.
    #[default]
    Auto,
    /// It does not, or what it thinks belongs to its answer.
    None,
    /// `<think>…</think>`.
    #[value(alias = "deepseek_r1", alias = "qwen3")]
    #[serde(alias = "deepseek_r1", alias = "qwen3")]
    Think,
}

/// How tokens are drafted that one step then verifies; written as vLLM does, in JSON:
/// `{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpeculativeConfig {
    /// Where drafts come from.
    pub method: SpeculativeMethod,
    /// Most tokens of a draft.
    pub num_speculative_tokens: usize,
    /// Longest n-gram that is looked for in what the sequence has so far. Default: the shortest, or 5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_lookup_max: Option<usize>,
    /// Shortest. Default: the longest, or 5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_lookup_min: Option<usize>,
}

/// Where drafts come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SpeculativeMethod {
    /// From the sequence itself: what followed where its last tokens occurred before.
    Ngram,
}

impl SpeculativeConfig {
    /// Lengths of the n-grams that are looked for, longest and shortest.
    pub fn lookup_lengths(&self) -> (usize, usize) {
        let one = self.prompt_lookup_max.or(self.prompt_lookup_min).unwrap_or(5);
        (self.prompt_lookup_max.unwrap_or(one), self.prompt_lookup_min.unwrap_or(one))
    }
}

impl FromStr for SpeculativeConfig {
    type Err = serde_json::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        serde_json::from_str(text)
    }
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

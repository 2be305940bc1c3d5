//! `mx_conversion.json`: what the converter did, in full. The foreign JSON dialects have no place for some of it,
//! above all for the activations' scale rounding.

use std::collections::BTreeMap;
use std::path::Path;

use kernels::mx::{Cast, Scheme, UnknownName};
use serde::{Deserialize, Serialize};

use super::CheckpointError;

/// Name of the record beside `config.json`.
pub const RECORD_FILE: &str = "mx_conversion.json";

/// How a checkpoint was made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ConversionRecord {
    /// The program: `mxconvert`.
    pub tool: String,
    /// Its version.
    pub tool_version: String,
    /// Quantization method: `nearest`.
    pub method: String,
    /// How elements were rounded.
    pub element_rounding: RecordedRounding,
    /// JSON dialect and tensor names: `quark`, `compressed-tensors`, `ocp-mx`.
    pub layout: String,
    /// What it was made from.
    pub source: RecordedSource,
    /// By quantized module: `model.layers.0.mlp.down_proj`.
    pub layers: BTreeMap<String, RecordedScheme>,
    /// Modules whose input channels are in another order than the source's, as are the rows that make them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub permuted: Vec<String>,
}

/// Element rounding, and what makes it reproducible.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "mode")]
pub enum RecordedRounding {
    /// To the nearest value, ties to even.
    Nearest,
    /// Stochastic.
    Stochastic {
        /// The run's seed.
        seed: u64,
    },
}

/// The source checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedSource {
    /// Name of the folder or file, without its path.
    pub name: String,
    /// SHA-256 of each weight file, as `sha256sum` prints it.
    pub sha256: BTreeMap<String, String>,
}

/// One module's scheme.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedScheme {
    /// The weight.
    pub weight: RecordedCast,
    /// The input activations; `None` leaves them as they are.
    pub activation: Option<RecordedCast>,
    /// How rows were rotated, and the input is at run time: `block-hadamard`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotation: Option<String>,
}

/// A format and its scale rule, by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedCast {
    /// `mxfp6_e2m3`.
    pub format: String,
    /// `even`.
    pub scale_rounding: String,
}

impl From<Cast> for RecordedCast {
    fn from(cast: Cast) -> Self {
        Self { format: cast.format.to_string(), scale_rounding: cast.scale_rounding.to_string() }
    }
}

impl From<Scheme> for RecordedScheme {
    fn from(scheme: Scheme) -> Self {
        Self {
            weight: scheme.weight.into(),
            activation: scheme.activation.map(RecordedCast::from),
            rotation: scheme.rotation.map(|rotation| rotation.name().to_owned()),
        }
    }
}

impl RecordedScheme {
    fn parse(&self) -> Result<Scheme, String> {
        Ok(Scheme {
            weight: self.weight.parse()?,
            activation: self.activation.as_ref().map(RecordedCast::parse).transpose()?,
            rotation: self
                .rotation
                .as_deref()
                .map(str::parse)
                .transpose()
                .map_err(|e: UnknownName| e.to_string())?,
        })
    }
}

impl RecordedCast {
    fn parse(&self) -> Result<Cast, String> {
        Ok(Cast {
            format: self.format.parse().map_err(|e| format!("{e}"))?,
            scale_rounding: self.scale_rounding.parse().map_err(|e| format!("{e}"))?,
        })
    }
}

/// Recorded schemes by module; empty when there is no record.
#[derive(Debug, Default)]
pub(super) struct RecordedSchemes(BTreeMap<String, Scheme>);

impl RecordedSchemes {
    /// Reads the record beside `config.json`, if there is one.
    pub(super) fn read(dir: &Path) -> Result<Self, CheckpointError> {
        let path = dir.join(RECORD_FILE);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(CheckpointError::Io { path, error }),
        };
        // Only what is used: a record of a later version, with a method this one does not know, still reads.
        #[derive(Deserialize)]
        struct Layers {
            layers: BTreeMap<String, RecordedScheme>,
        }
        let record: Layers = serde_json::from_slice(&text)
            .map_err(|error| CheckpointError::Json { path: path.clone(), error })?;
        let mut schemes = BTreeMap::new();
        for (module, recorded) in record.layers {
            let scheme = recorded.parse().map_err(|reason| CheckpointError::Quantization {
                path: path.clone(),
                field: format!("layers.{module}"),
                reason,
            })?;
            schemes.insert(module, scheme);
        }
        Ok(Self(schemes))
    }

    /// `declared` with the recorded scale rules; the formats must agree.
    pub(super) fn refine(
        &self,
        dir: &Path,
        module: &str,
        declared: Scheme,
    ) -> Result<Scheme, CheckpointError> {
        let Some(&recorded) = self.0.get(module) else { return Ok(declared) };
        let formats =
            |scheme: Scheme| (scheme.weight.format, scheme.activation.map(|a| a.format), scheme.rotation);
        if formats(recorded) == formats(declared) {
            return Ok(recorded);
        }
        Err(CheckpointError::Quantization {
            path: dir.join(RECORD_FILE),
            field: format!("layers.{module}"),
            reason: format!("says {recorded}, config.json declares {declared}"),
        })
    }
}

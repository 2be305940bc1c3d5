//! `quantization_config`: which modules a checkpoint declares as MX, in each JSON dialect, read and written.
//!
//! A dialect's file turns its JSON into one list of rules, first match wins; nothing else in the crate knows the
//! dialects. What is declared but is not MX is refused by name: ignoring it would change the model.

mod compressed_tensors;
mod modelopt;
mod ocp_mx;
mod quark;
mod spec;

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use kernels::mx::{ElementType, Scheme, UnknownName};
use safetensors::Dtype;
use serde_json::Value;

use super::{CheckpointError, ModulePattern};

/// What a checkpoint declares about its linear modules.
#[derive(Debug, Clone, Default)]
pub struct Quantization {
    dialect: Option<&'static str>,
    rules: Vec<Rule>,
    default: Option<Scheme>,
}

/// Modules that match `pattern` have `scheme`; `None` leaves them unquantized.
#[derive(Debug, Clone)]
struct Rule {
    pattern: ModulePattern,
    scheme: Option<Scheme>,
}

/// A field that declares something this crate does not execute.
#[derive(Debug)]
struct Refusal {
    field: String,
    reason: String,
}

impl Refusal {
    fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { field: field.into(), reason: reason.into() }
    }

    /// The same, inside `parent`; an empty name is the object itself.
    fn within(self, parent: &str) -> Self {
        let dot = if parent.is_empty() || self.field.is_empty() { "" } else { "." };
        Self { field: format!("{parent}{dot}{}", self.field), ..self }
    }
}

impl Quantization {
    /// Reads `quantization_config` of `config.json`, or `hf_quant_config.json`.
    ///
    /// # Errors
    /// Something other than MX is declared, or the declaration is malformed.
    pub fn read(dir: &Path, config: &Value) -> Result<Self, CheckpointError> {
        if let Some(declared) = config.get("quantization_config").filter(|v| !v.is_null()) {
            return Self::from_json(declared)
                .map_err(|refusal| refuse(dir.join("config.json"), refusal.within("quantization_config")));
        }
        if let Some(declared) = config.get("compression_config").filter(|v| !v.is_null()) {
            return compressed_tensors::read(declared)
                .map_err(|refusal| refuse(dir.join("config.json"), refusal.within("compression_config")));
        }
        let path = dir.join(modelopt::FILE);
        match std::fs::read(&path) {
            Ok(text) => {
                let declared = serde_json::from_slice(&text)
                    .map_err(|error| CheckpointError::Json { path: path.clone(), error })?;
                modelopt::read_file(&declared).map_err(|refusal| refuse(path, refusal))
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(CheckpointError::Io { path, error }),
        }
    }

    fn from_json(declared: &Value) -> Result<Self, Refusal> {
        let Some(method) = declared.get("quant_method").and_then(Value::as_str) else {
            return Err(Refusal::new("quant_method", "is not given"));
        };
        match method {
            "quark" => quark::read(declared),
            "compressed-tensors" => compressed_tensors::read(declared),
            "modelopt" | "modelopt_mxfp8" => modelopt::read(declared),
            ocp_mx::METHOD => ocp_mx::read(declared),
            other => Err(Refusal::new(
                "quant_method",
                format!("'{other}' is not supported; known: quark, compressed-tensors, modelopt, ocp-mx"),
            )),
        }
    }

    /// The JSON dialect: `quark`, `compressed-tensors`, `modelopt`, `ocp-mx`; `None` when nothing is declared.
    pub fn dialect(&self) -> Option<&'static str> {
        self.dialect
    }

    /// What is declared for a module. Defaults cover linear modules, not embedding tables.
    pub fn scheme(&self, module: &str) -> Option<Scheme> {
        match self.rules.iter().find(|rule| rule.pattern.matches(module)) {
            Some(rule) => rule.scheme,
            None if is_embedding(module) => None,
            None => self.default,
        }
    }
}

/// Whether a module is an embedding table, by its name in the architectures this crate knows.
pub fn is_embedding(module: &str) -> bool {
    module == "embed_tokens" || module.ends_with(".embed_tokens")
}

fn refuse(path: std::path::PathBuf, refusal: Refusal) -> CheckpointError {
    CheckpointError::Quantization { path, field: refusal.field, reason: refusal.reason }
}

/// Rules of the parts of a declaration that name modules.
fn rules(
    field: &str,
    patterns: impl IntoIterator<Item = impl AsRef<str>>,
    scheme: Option<Scheme>,
) -> Result<Vec<Rule>, Refusal> {
    patterns
        .into_iter()
        .map(|pattern| {
            let pattern: ModulePattern =
                pattern.as_ref().parse().map_err(|e| Refusal::new(field, format!("{e}")))?;
            Ok(Rule { pattern, scheme })
        })
        .collect()
}

/// The safetensors dtype in which one stored element is one code; the packed form is U8 in every layout.
pub(super) fn native_dtype(element: ElementType) -> Option<Dtype> {
    const NATIVE: [(ElementType, Dtype); 6] = [
        (ElementType::Int8, Dtype::I8),
        (ElementType::E4m3, Dtype::F8_E4M3),
        (ElementType::E5m2, Dtype::F8_E5M2),
        (ElementType::E2m3, Dtype::F6_E2M3),
        (ElementType::E3m2, Dtype::F6_E3M2),
        (ElementType::E2m1, Dtype::F4),
    ];
    NATIVE.iter().find(|(e, _)| *e == element).map(|(_, dtype)| *dtype)
}

/// JSON dialects that can be written, with the tensor names that belong to them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dialect {
    /// compressed-tensors 0.20: `mxfp4-pack-quantized`, `mxfp6-pack-quantized`, `mxfp8-quantized`.
    CompressedTensors,
    /// AMD Quark 0.13.
    Quark,
    /// Ours: every format.
    OcpMx,
}

/// What a checkpoint to be written declares.
#[derive(Debug, Clone)]
pub struct Declaration {
    /// Scheme of every linear module that nothing below names.
    pub default: Scheme,
    /// Modules with another scheme; the first match wins.
    pub layers: Vec<(LayerGroup, Scheme)>,
    /// Linear modules that stay unquantized, by name.
    pub exclude: Vec<String>,
}

/// Modules with one scheme: one module, or the same module of every layer.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum LayerGroup {
    /// A module's name.
    Module(String),
    /// Name up to and after the layer number: `model.layers.`, `.mlp.down_proj`.
    EveryLayer(String, String),
}

impl LayerGroup {
    /// As a glob: `model.layers.*.mlp.down_proj`.
    pub fn glob(&self) -> String {
        match self {
            Self::Module(name) => name.clone(),
            Self::EveryLayer(prefix, suffix) => format!("{prefix}*{suffix}"),
        }
    }

    /// As a module name, or a regular expression after `re:`.
    fn name_or_regex(&self) -> String {
        match self {
            Self::Module(name) => name.clone(),
            Self::EveryLayer(prefix, suffix) => {
                format!("re:^{}\\d+{}$", regex::escape(prefix), regex::escape(suffix))
            }
        }
    }
}

impl Dialect {
    /// Every dialect that can be written.
    pub const ALL: [Self; 3] = [Self::CompressedTensors, Self::Quark, Self::OcpMx];

    /// The name on command lines and in `quant_method`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::CompressedTensors => "compressed-tensors",
            Self::Quark => "quark",
            Self::OcpMx => ocp_mx::METHOD,
        }
    }

    /// Whether the dialect has a place for the formats and the rotation of `scheme`.
    pub fn expresses(self, scheme: Scheme) -> bool {
        let knows = |element| match self {
            Self::CompressedTensors => compressed_tensors::format_name(element).is_some(),
            Self::Quark => quark::knows(element),
            Self::OcpMx => true,
        };
        if scheme.rotation.is_some() && self != Self::OcpMx {
            return false;
        }
        let ocp_block = |cast: &kernels::mx::Cast| cast.format.block == kernels::mx::Block::OCP;
        [Some(scheme.weight), scheme.activation]
            .iter()
            .flatten()
            .all(|cast| knows(cast.format.element) && (self == Self::OcpMx || ocp_block(cast)))
    }

    /// Whether the dialect has a place for quantized embedding tables.
    pub const fn expresses_embeddings(self) -> bool {
        matches!(self, Self::OcpMx)
    }

    /// Name after the module's, and stored dtype, of the codes of `element`: U8 holds them packed.
    pub fn code_tensor(self, element: ElementType) -> (&'static str, Dtype) {
        let whole_bytes = element.spec().bits == 8;
        let name = if self == Self::CompressedTensors && !whole_bytes { "weight_packed" } else { "weight" };
        let dtype = native_dtype(element).filter(|_| whole_bytes).unwrap_or(Dtype::U8);
        (name, dtype)
    }

    /// `quantization_config` for `declaration`, which the dialect [expresses](Self::expresses).
    pub fn write(self, declaration: &Declaration) -> Value {
        match self {
            Self::CompressedTensors => compressed_tensors::write(declaration),
            Self::Quark => quark::write(declaration),
            Self::OcpMx => ocp_mx::write(declaration),
        }
    }
}

impl fmt::Display for Dialect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Dialect {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        Self::ALL.into_iter().find(|d| d.name() == name).ok_or_else(|| UnknownName {
            what: "layout",
            name: name.to_owned(),
            known: "compressed-tensors, quark, ocp-mx",
        })
    }
}

#[cfg(test)]
mod tests;

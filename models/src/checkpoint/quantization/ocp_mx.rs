//! Our own dialect, for what the others cannot say: MXINT8, MXFP8 E5M2, the experimental formats, other block
//! sizes, quantized embeddings.
//!
//! `{"quant_method": "ocp-mx", "version": 1, "weight": CAST, "input_tensors": CAST | null,
//! "layers": {GLOB: {"weight": CAST | null, "input_tensors": CAST | null}}, "exclude": [PATTERN]}` with CAST =
//! `{"dtype": "int8", "group_size": 32, "axis": 1, "scale_format": "e8m0", "scale_calculation_mode": "floor"}`.
//! `"rotation": "block-hadamard"` beside a `weight` says that its rows were rotated, block by block, and that the input
//! is to be rotated likewise before it is quantized or used: the Hadamard matrix of the weight's `group_size`,
//! in Sylvester's order, divided by the square root of it.

use kernels::mx::{Block, Cast, ScaleRounding, Scheme, UnknownName};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::spec::{cast, element, element_name, parse};
use super::{Declaration, Quantization, Refusal, rules};

/// The dialect's name.
pub(super) const METHOD: &str = "ocp-mx";
const VERSION: u64 = 1;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    #[serde(rename = "quant_method")]
    _method: String,
    version: u64,
    weight: Option<CastJson>,
    input_tensors: Option<CastJson>,
    rotation: Option<String>,
    #[serde(default)]
    layers: Map<String, Value>,
    #[serde(default)]
    exclude: Vec<String>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct LayerJson {
    weight: Option<CastJson>,
    input_tensors: Option<CastJson>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rotation: Option<String>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct CastJson {
    dtype: String,
    group_size: usize,
    axis: u64,
    scale_format: String,
    scale_calculation_mode: Option<String>,
}

impl From<Cast> for CastJson {
    fn from(cast: Cast) -> Self {
        Self {
            dtype: element_name(cast.format.element).to_owned(),
            group_size: cast.format.block.size(),
            axis: 1,
            scale_format: "e8m0".to_owned(),
            scale_calculation_mode: Some(cast.scale_rounding.name().to_owned()),
        }
    }
}

impl From<Scheme> for LayerJson {
    fn from(scheme: Scheme) -> Self {
        Self {
            weight: Some(scheme.weight.into()),
            input_tensors: scheme.activation.map(CastJson::from),
            rotation: scheme.rotation.map(|rotation| rotation.name().to_owned()),
        }
    }
}

impl LayerJson {
    /// `None`: unquantized.
    fn scheme(&self) -> Result<Option<Scheme>, Refusal> {
        let cast = |field: &str, json: &CastJson| json.cast().map_err(|refusal| refusal.within(field));
        let Some(weight) = &self.weight else {
            let of_input =
                [("input_tensors", self.input_tensors.is_some()), ("rotation", self.rotation.is_some())];
            return match of_input.into_iter().find(|(_, is_given)| *is_given) {
                None => Ok(None),
                Some((field, _)) => {
                    Err(Refusal::new(field, "for the input of an unquantized weight is not supported"))
                }
            };
        };
        let rotation = self.rotation.as_deref().map(str::parse).transpose();
        Ok(Some(Scheme {
            weight: cast("weight", weight)?,
            activation: self.input_tensors.as_ref().map(|input| cast("input_tensors", input)).transpose()?,
            rotation: rotation.map_err(|error: UnknownName| Refusal::new("rotation", error.to_string()))?,
        }))
    }
}

impl CastJson {
    fn cast(&self) -> Result<Cast, Refusal> {
        let unknown = |field: &str, value: &str| Refusal::new(field, format!("'{value}' is not supported"));
        let element = element(&self.dtype).ok_or_else(|| unknown("dtype", &self.dtype))?;
        let block = Block::along_k(self.group_size)
            .ok_or_else(|| unknown("group_size", &self.group_size.to_string()))?;
        if self.axis != 1 {
            return Err(unknown("axis", &self.axis.to_string()));
        }
        if self.scale_format != "e8m0" {
            return Err(unknown("scale_format", &self.scale_format));
        }
        let rounding = self
            .scale_calculation_mode
            .as_deref()
            .map(|mode| mode.parse::<ScaleRounding>().map_err(|_| unknown("scale_calculation_mode", mode)))
            .transpose()?;
        Ok(cast(element, block, rounding))
    }
}

/// Reads `quantization_config`.
pub(super) fn read(declared: &Value) -> Result<Quantization, Refusal> {
    let config: Config = parse("", declared)?;
    if config.version != VERSION {
        return Err(Refusal::new("version", format!("{} is not supported", config.version)));
    }
    let mut list = rules("exclude", config.exclude, None)?;
    for (pattern, layer) in config.layers {
        let field = format!("layers.{pattern}");
        let layer: LayerJson = parse(&field, &layer)?;
        let scheme = layer.scheme().map_err(|refusal| refusal.within(&field))?;
        list.extend(rules(&field, [pattern], scheme)?);
    }
    let Config { weight, input_tensors, rotation, .. } = config;
    let default = LayerJson { weight, input_tensors, rotation }.scheme()?;
    Ok(Quantization { dialect: Some(METHOD), rules: list, default })
}

/// Writes `quantization_config`.
pub(super) fn write(declaration: &Declaration) -> Value {
    let default = LayerJson::from(declaration.default);
    let layers: Map<String, Value> = declaration
        .layers
        .iter()
        .map(|(group, scheme)| (group.glob(), json!(LayerJson::from(*scheme))))
        .collect();
    let mut config = json!({
        "quant_method": METHOD,
        "version": VERSION,
        "weight": default.weight,
        "input_tensors": default.input_tensors,
        "layers": layers,
        "exclude": declaration.exclude,
    });
    // Where nothing is rotated, nothing is said of it: readers that know no rotation read on.
    if let Some(rotation) = default.rotation {
        config["rotation"] = json!(rotation);
    }
    config
}

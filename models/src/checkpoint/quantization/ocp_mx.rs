//! Our own dialect, for what the others cannot say: MXINT8, MXFP8 E5M2, the experimental formats, other block
//! sizes, quantized embeddings.
//!
//! `{"quant_method": "ocp-mx", "version": 1, "weight": CAST, "input_tensors": CAST | null,
//! "layers": {GLOB: {"weight": CAST | null, "input_tensors": CAST | null}}, "exclude": [PATTERN]}` with CAST =
//! `{"dtype": "int8", "group_size": 32, "axis": 1, "scale_format": "e8m0", "scale_calculation_mode": "floor"}`.

use kernels::mx::{Block, Cast, ScaleRounding, Scheme};
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
        Self { weight: Some(scheme.weight.into()), input_tensors: scheme.activation.map(CastJson::from) }
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
        let scheme =
            scheme(layer.weight.as_ref(), layer.input_tensors.as_ref()).map_err(|r| r.within(&field))?;
        list.extend(rules(&field, [pattern], scheme)?);
    }
    let default = scheme(config.weight.as_ref(), config.input_tensors.as_ref())?;
    Ok(Quantization { dialect: Some(METHOD), rules: list, default })
}

fn scheme(weight: Option<&CastJson>, input: Option<&CastJson>) -> Result<Option<Scheme>, Refusal> {
    let cast = |field: &str, json: &CastJson| json.cast().map_err(|refusal| refusal.within(field));
    let Some(weight) = weight else {
        return match input {
            None => Ok(None),
            Some(_) => Err(Refusal::new(
                "input_tensors",
                "a quantized input of an unquantized weight is not supported",
            )),
        };
    };
    Ok(Some(Scheme {
        weight: cast("weight", weight)?,
        activation: input.map(|input| cast("input_tensors", input)).transpose()?,
    }))
}

/// Writes `quantization_config`.
pub(super) fn write(declaration: &Declaration) -> Value {
    let default = LayerJson::from(declaration.default);
    let layers: Map<String, Value> = declaration
        .layers
        .iter()
        .map(|(group, scheme)| (group.glob(), json!(LayerJson::from(*scheme))))
        .collect();
    json!({
        "quant_method": METHOD,
        "version": VERSION,
        "weight": default.weight,
        "input_tensors": default.input_tensors,
        "layers": layers,
        "exclude": declaration.exclude,
    })
}

//! AMD Quark: `global_quant_config`, `layer_quant_config` globs, `exclude` (Quark 0.13, `QConfig.from_dict` and
//! `QTensorConfig`; vLLM's `quark.py` for what must be present).

use kernels::mx::{Block, Cast, ElementType, ScaleRounding, Scheme};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::spec::{cast, element, element_name, parse, refuse_unless_empty};
use super::{Declaration, Quantization, Refusal, rules};

/// Element types that Quark and its readers store as MX.
const ELEMENTS: [ElementType; 4] =
    [ElementType::E2m1, ElementType::E2m3, ElementType::E3m2, ElementType::E4m3];

/// Methods that leave nothing to do at run time.
const FOLDED_ALGORITHMS: [&str; 7] =
    ["awq", "gptq", "gptaq", "qronos", "smooth", "smoothquant", "autosmoothquant"];

#[derive(Debug, Deserialize)]
struct Config {
    global_quant_config: LayerConfig,
    #[serde(default)]
    layer_quant_config: Option<Map<String, Value>>,
    #[serde(default)]
    layer_type_quant_config: Option<Value>,
    #[serde(default)]
    exclude: Option<Vec<String>>,
    #[serde(default)]
    kv_cache_quant_config: Option<Value>,
    #[serde(default)]
    softmax_quant_spec: Option<Value>,
    #[serde(default)]
    algo_config: Option<Value>,
    #[serde(default)]
    export: Option<Export>,
}

#[derive(Debug, Deserialize)]
struct Export {
    #[serde(default)]
    kv_cache_group: Option<Value>,
    #[serde(default)]
    weight_format: Option<String>,
}

#[derive(Debug, Deserialize)]
struct LayerConfig {
    #[serde(default)]
    weight: Option<Value>,
    #[serde(default)]
    input_tensors: Option<Value>,
    #[serde(default)]
    output_tensors: Option<Value>,
    #[serde(default)]
    bias: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct TensorConfig {
    dtype: String,
    #[serde(default)]
    is_dynamic: Option<bool>,
    #[serde(default)]
    qscheme: Option<String>,
    #[serde(default)]
    ch_axis: Option<i64>,
    #[serde(default)]
    group_size: Option<usize>,
    #[serde(default)]
    scale_format: Option<String>,
    #[serde(default)]
    scale_calculation_mode: Option<String>,
}

/// Whether MX tensors of `element` can be declared.
pub(super) fn knows(element: ElementType) -> bool {
    ELEMENTS.contains(&element)
}

/// Reads `quantization_config`.
pub(super) fn read(declared: &Value) -> Result<Quantization, Refusal> {
    let config: Config = parse("", declared)?;
    refuse_unless_empty(
        "layer_type_quant_config",
        config.layer_type_quant_config.as_ref(),
        "a scheme per layer type",
    )?;
    refuse_unless_empty(
        "kv_cache_quant_config",
        config.kv_cache_quant_config.as_ref(),
        "a quantized KV cache",
    )?;
    refuse_unless_empty("softmax_quant_spec", config.softmax_quant_spec.as_ref(), "a quantized softmax")?;
    if let Some(export) = &config.export {
        refuse_unless_empty("export.kv_cache_group", export.kv_cache_group.as_ref(), "a quantized KV cache")?;
        if let Some(format) = export.weight_format.as_deref().filter(|f| *f != "real_quantized") {
            return Err(Refusal::new("export.weight_format", format!("'{format}' is not supported")));
        }
    }
    check_algorithms(config.algo_config.as_ref())?;

    let mut list = rules("exclude", config.exclude.unwrap_or_default(), None)?;
    for (pattern, layer) in config.layer_quant_config.unwrap_or_default() {
        let field = format!("layer_quant_config.{pattern}");
        let scheme = layer_scheme(parse(&field, &layer)?).map_err(|r| r.within(&field))?;
        list.extend(rules(&field, [pattern], scheme)?);
    }
    let default =
        layer_scheme(config.global_quant_config).map_err(|refusal| refusal.within("global_quant_config"))?;
    Ok(Quantization { dialect: Some("quark"), rules: list, default })
}

/// Algorithms that only changed the weights are fine; rotations want operators at run time.
fn check_algorithms(algorithms: Option<&Value>) -> Result<(), Refusal> {
    let list = match algorithms {
        None | Some(Value::Null) => return Ok(()),
        Some(Value::Array(list)) => list.as_slice(),
        Some(other) => std::slice::from_ref(other),
    };
    for algorithm in list {
        let name = algorithm.get("name").and_then(Value::as_str).unwrap_or("without a name");
        if !FOLDED_ALGORITHMS.contains(&name) {
            return Err(Refusal::new("algo_config", format!("algorithm '{name}' is not supported")));
        }
    }
    Ok(())
}

fn layer_scheme(layer: LayerConfig) -> Result<Option<Scheme>, Refusal> {
    refuse_unless_empty("output_tensors", layer.output_tensors.as_ref(), "a quantized output")?;
    refuse_unless_empty("bias", layer.bias.as_ref(), "a quantized bias")?;
    let weight = layer.weight.filter(|v| !v.is_null());
    let input = layer.input_tensors.filter(|v| !v.is_null());
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
        weight: tensor_cast("weight", &weight, false)?,
        activation: input.map(|input| tensor_cast("input_tensors", &input, true)).transpose()?,
        rotation: None,
    }))
}

/// The MX cast that a tensor's config declares; anything else is refused by what it is.
fn tensor_cast(field: &str, value: &Value, dynamic: bool) -> Result<Cast, Refusal> {
    let config: TensorConfig = parse(field, value)?;
    let qscheme = config.qscheme.as_deref().unwrap_or("per_tensor");
    let scale_format = config.scale_format.as_deref().unwrap_or("float32");
    let is_dynamic = config.is_dynamic.unwrap_or(false);
    let element = element(&config.dtype).filter(|e| knows(*e));
    let along_k = matches!(config.ch_axis, None | Some(-1 | 1));
    let is_mx = qscheme == "per_group"
        && config.group_size == Some(Block::OCP.size())
        && scale_format == "e8m0"
        && along_k
        && is_dynamic == dynamic;
    let Some(element) = element.filter(|_| is_mx) else {
        let kind = if is_dynamic { "dynamic" } else { "static" };
        let group = config.group_size.map(|g| format!(" of {g}")).unwrap_or_default();
        return Err(Refusal::new(
            field,
            format!(
                "{kind} {} {qscheme}{group} with {scale_format} scales is not an MX format that is supported here",
                config.dtype
            ),
        ));
    };
    let rounding = match config.scale_calculation_mode.as_deref() {
        None => None,
        Some(mode) => Some(
            mode.parse::<ScaleRounding>()
                .map_err(|e| Refusal::new(format!("{field}.scale_calculation_mode"), e.to_string()))?,
        ),
    };
    Ok(cast(element, Block::OCP, rounding))
}

/// Writes `quantization_config`.
pub(super) fn write(declaration: &Declaration) -> Value {
    let layers: Map<String, Value> =
        declaration.layers.iter().map(|(group, scheme)| (group.glob(), layer_json(*scheme))).collect();
    json!({
        "quant_method": "quark",
        "version": "0.13",
        "quant_mode": "eager_mode",
        "global_quant_config": layer_json(declaration.default),
        "layer_quant_config": layers,
        "layer_type_quant_config": {},
        "exclude": declaration.exclude,
        "algo_config": null,
        "kv_cache_quant_config": {},
        "softmax_quant_spec": null,
        "export": {
            "kv_cache_group": [],
            "min_kv_scale": 0.0,
            "pack_method": "reorder",
            "weight_format": "real_quantized",
            "weight_merge_groups": null,
        },
    })
}

fn layer_json(scheme: Scheme) -> Value {
    json!({
        "weight": tensor_json(scheme.weight, false),
        "input_tensors": scheme.activation.map(|cast| tensor_json(cast, true)),
        "output_tensors": null,
        "bias": null,
        "target_device": null,
    })
}

/// Quark knows the scale rules floor, ceil and even. The others are written as even: decoding does not need the
/// rule, and `mx_conversion.json` has the true one.
fn tensor_json(cast: Cast, dynamic: bool) -> Value {
    let mode = match cast.scale_rounding {
        rule @ (ScaleRounding::Floor | ScaleRounding::Ceil) => rule,
        ScaleRounding::Even | ScaleRounding::Rceil | ScaleRounding::Mse => ScaleRounding::Even,
    };
    json!({
        "dtype": element_name(cast.format.element),
        "is_dynamic": dynamic,
        "qscheme": "per_group",
        "ch_axis": -1,
        "group_size": cast.format.block.size(),
        "block_size": null,
        "symmetric": null,
        "round_method": "half_even",
        "scale_type": "float",
        "zero_point_type": "int32",
        "scale_format": "e8m0",
        "scale_calculation_mode": mode.name(),
        "mx_element_dtype": null,
        "observer_cls": "PerBlockMXObserver",
        "is_scale_quant": false,
    })
}

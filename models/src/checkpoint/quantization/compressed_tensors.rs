//! compressed-tensors: `config_groups` with targets and a storage format each, `ignore` (compressed-tensors 0.20,
//! `quantization/quant_config.py`, `quant_args.py`, `utils/match.py`).

use kernels::mx::{Block, Cast, ElementType, Scheme};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::spec::{cast, parse, refuse_unless_empty};
use super::{Declaration, Quantization, Refusal, Rule, rules};

/// Storage formats that hold MX, and their element type: there is one per width.
const FORMATS: [(&str, ElementType); 3] = [
    ("mxfp4-pack-quantized", ElementType::E2m1),
    ("mxfp6-pack-quantized", ElementType::E2m3),
    ("mxfp8-quantized", ElementType::E4m3),
];

#[derive(Debug, Deserialize)]
struct Config {
    config_groups: Map<String, Value>,
    #[serde(default)]
    format: Option<String>,
    #[serde(default)]
    quantization_status: Option<String>,
    #[serde(default)]
    ignore: Option<Vec<String>>,
    #[serde(default)]
    kv_cache_scheme: Option<Value>,
    #[serde(default)]
    transform_config: Option<Value>,
    #[serde(default)]
    sparsity_config: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct Group {
    targets: Vec<String>,
    #[serde(default)]
    format: Option<String>,
    #[serde(default)]
    weights: Option<Args>,
    #[serde(default)]
    input_activations: Option<Args>,
    #[serde(default)]
    output_activations: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct Args {
    num_bits: u32,
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    strategy: Option<String>,
    #[serde(default)]
    group_size: Option<i64>,
    #[serde(default)]
    dynamic: Value,
    #[serde(default)]
    scale_dtype: Option<String>,
    #[serde(default)]
    actorder: Value,
}

/// The storage format of `element`.
pub(super) fn format_name(element: ElementType) -> Option<&'static str> {
    FORMATS.iter().find(|(_, e)| *e == element).map(|(name, _)| *name)
}

/// Reads `quantization_config`.
pub(super) fn read(declared: &Value) -> Result<Quantization, Refusal> {
    let config: Config = parse("", declared)?;
    refuse_unless_empty("kv_cache_scheme", config.kv_cache_scheme.as_ref(), "a quantized KV cache")?;
    let transforms = config.transform_config.as_ref().and_then(|t| t.get("config_groups"));
    refuse_unless_empty("transform_config", transforms, "a transform at run time")?;
    refuse_sparsity(config.sparsity_config.as_ref())?;
    if let Some(status) = config.quantization_status.as_deref().filter(|s| *s != "compressed") {
        return Err(Refusal::new(
            "quantization_status",
            format!("'{status}' where 'compressed' is expected"),
        ));
    }

    let mut list = rules("ignore", config.ignore.unwrap_or_default(), None)?;
    let (mut exact, mut regexes, mut default) = (Vec::new(), Vec::new(), None);
    for (name, value) in &config.config_groups {
        let field = format!("config_groups.{name}");
        let group: Group = parse(&field, value)?;
        let scheme = group_scheme(&group, config.format.as_deref()).map_err(|r| r.within(&field))?;
        for target in &group.targets {
            match target.as_str() {
                "Linear" => match default.replace(scheme) {
                    Some(other) if other != scheme => {
                        return Err(Refusal::new(
                            field,
                            format!("targets Linear in {scheme}, as another group does in {other}"),
                        ));
                    }
                    _ => {}
                },
                _ if target.starts_with("re:") => {
                    regexes.extend(rules(&field, [target], Some(scheme))?);
                }
                // Module classes other than Linear are capitalised words without a dot.
                _ if !target.contains('.') && target.starts_with(char::is_uppercase) => {
                    return Err(Refusal::new(field, format!("target '{target}' is not supported")));
                }
                _ => exact.extend(rules(&field, [target], Some(scheme))?),
            }
        }
    }
    // Names before regular expressions, each kind sorted, before classes: `match_targets`.
    let by_text = |a: &Rule, b: &Rule| a.pattern.as_str().cmp(b.pattern.as_str());
    exact.sort_by(by_text);
    regexes.sort_by(by_text);
    list.extend(exact);
    list.extend(regexes);
    Ok(Quantization { dialect: Some("compressed-tensors"), rules: list, default })
}

fn refuse_sparsity(config: Option<&Value>) -> Result<(), Refusal> {
    match config.and_then(|c| c.get("format")).and_then(Value::as_str) {
        None | Some("dense") => Ok(()),
        Some(format) => Err(Refusal::new("sparsity_config.format", format!("'{format}' is not supported"))),
    }
}

fn group_scheme(group: &Group, top_format: Option<&str>) -> Result<Scheme, Refusal> {
    refuse_unless_empty("output_activations", group.output_activations.as_ref(), "a quantized output")?;
    let format = group.format.as_deref().or(top_format).unwrap_or("none");
    let Some((_, element)) = FORMATS.iter().find(|(name, _)| *name == format) else {
        let known = FORMATS.map(|(name, _)| name).join(", ");
        return Err(Refusal::new("format", format!("'{format}' is not supported; known: {known}")));
    };
    let Some(weights) = &group.weights else {
        return Err(Refusal::new("weights", "are not given"));
    };
    let weight = args_cast("weights", weights, false)?;
    if weight.format.element != *element {
        return Err(Refusal::new("weights.num_bits", format!("{} in format '{format}'", weights.num_bits)));
    }
    let activation = group
        .input_activations
        .as_ref()
        .map(|args| args_cast("input_activations", args, true))
        .transpose()?;
    Ok(Scheme { weight, activation, rotation: None })
}

/// The MX cast that quantization arguments declare; anything else is refused by what it is.
fn args_cast(field: &str, args: &Args, dynamic: bool) -> Result<Cast, Refusal> {
    let strategy = args.strategy.as_deref().unwrap_or("group");
    let is_dynamic = args.dynamic == Value::Bool(true);
    let group_size = i64::try_from(Block::OCP.size()).ok();
    let is_mx = args.kind == "float"
        && strategy == "group"
        && args.group_size == group_size
        && matches!(args.scale_dtype.as_deref(), None | Some("torch.uint8" | "torch.float8_e8m0fnu"))
        && (args.dynamic.is_null() || args.dynamic.is_boolean())
        && is_dynamic == dynamic
        && args.actorder != "group";
    let element = FORMATS.iter().map(|(_, e)| *e).find(|e| e.spec().bits == args.num_bits);
    match element.filter(|_| is_mx) {
        Some(element) => Ok(cast(element, Block::OCP, None)),
        None => {
            let kind = if is_dynamic { "dynamic" } else { "static" };
            let group = args.group_size.map(|g| format!(" of {g}")).unwrap_or_default();
            Err(Refusal::new(
                field,
                format!(
                    "{kind} {} bit {} per {strategy}{group} is not an MX format that is supported here",
                    args.num_bits, args.kind
                ),
            ))
        }
    }
}

/// Writes `quantization_config`: a group per scheme.
pub(super) fn write(declaration: &Declaration) -> Value {
    let mut schemes = vec![(declaration.default, vec!["Linear".to_owned()])];
    for (group, scheme) in &declaration.layers {
        let target = group.name_or_regex();
        match schemes.iter_mut().skip(1).find(|(s, _)| s == scheme) {
            Some((_, targets)) => targets.push(target),
            None => schemes.push((*scheme, vec![target])),
        }
    }
    let name = |scheme: &Scheme| format_name(scheme.weight.format.element);
    let first = name(&declaration.default);
    let format = if schemes.iter().all(|(s, _)| name(s) == first) { first } else { Some("mixed-precision") };
    let groups: Map<String, Value> = schemes
        .iter()
        .enumerate()
        .map(|(i, (scheme, targets))| {
            let group = json!({
                "targets": targets,
                "format": name(scheme),
                "weights": args_json(scheme.weight, false),
                "input_activations": scheme.activation.map(|cast| args_json(cast, true)),
                "output_activations": null,
            });
            (format!("group_{i}"), group)
        })
        .collect();
    json!({
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": declaration.exclude,
        "kv_cache_scheme": null,
    })
}

fn args_json(cast: Cast, dynamic: bool) -> Value {
    json!({
        "num_bits": cast.format.element.spec().bits,
        "type": "float",
        "symmetric": true,
        "strategy": "group",
        "group_size": cast.format.block.size(),
        "dynamic": dynamic,
        "scale_dtype": "torch.uint8",
        "zp_dtype": "torch.uint8",
        "actorder": null,
        "block_structure": null,
    })
}

//! Which JSON dialect a plan is written in, and what it declares.

use std::collections::BTreeMap;

use kernels::mx::Scheme;
use models::checkpoint::ModulePattern;
use models::checkpoint::quantization::{Declaration, Dialect, LayerGroup, is_embedding};

use crate::error::{ConvertError, Unexpressed};
use crate::plan::{Action, LAYERS, Plan};

/// The dialect asked for, if it has a place for everything in the plan; else the default: compressed-tensors for
/// uniform MXFP8 (weight-only or W8A8), Quark for what Quark knows, ours for the rest.
///
/// # Errors
/// The dialect asked for has no place for something.
pub(crate) fn choose(asked: Option<Dialect>, plan: &Plan) -> Result<Dialect, ConvertError> {
    let schemes = schemes(plan);
    let embeddings = schemes.keys().any(|module| is_embedding(module));
    let missing = |layout: Dialect| {
        if embeddings && !layout.expresses_embeddings() {
            return Some(Unexpressed::Embeddings);
        }
        schemes.values().find(|scheme| !layout.expresses(**scheme)).map(|scheme| Unexpressed::Scheme(*scheme))
    };
    if let Some(layout) = asked {
        return match missing(layout) {
            None => Ok(layout),
            Some(what) => Err(ConvertError::Layout { layout, what }),
        };
    }
    // Quark's own reader refuses FP8 in groups; compressed-tensors is what reads MXFP8 everywhere.
    let eight_bits = schemes.values().all(|scheme| scheme.weight.format.element.spec().bits == 8);
    let uniform = schemes.values().all(|scheme| {
        let formats = |s: &Scheme| (s.weight.format, s.activation.map(|a| a.format));
        Some(formats(scheme)) == schemes.values().next().map(formats)
    });
    let own_activation =
        schemes.values().all(|scheme| scheme.activation.is_none_or(|a| a.format == scheme.weight.format));
    let order = if eight_bits && uniform && own_activation {
        [Dialect::CompressedTensors, Dialect::Quark, Dialect::OcpMx]
    } else {
        [Dialect::Quark, Dialect::OcpMx, Dialect::CompressedTensors]
    };
    Ok(order.into_iter().find(|layout| missing(*layout).is_none()).unwrap_or(Dialect::OcpMx))
}

/// What `quantization_config` says of the plan: the most common scheme as the default, the others by name.
pub(crate) fn declare(plan: &Plan, fallback: Scheme) -> Declaration {
    let schemes = schemes(plan);
    let mut counts: Vec<(Scheme, usize)> = Vec::new();
    for scheme in plan.linears.values().flatten() {
        match counts.iter_mut().find(|(s, _)| s == scheme) {
            Some((_, count)) => *count += 1,
            None => counts.push((*scheme, 1)),
        }
    }
    // Of equally common schemes the first by module name: reproducible.
    let default = counts.iter().rev().max_by_key(|(_, count)| *count).map_or(fallback, |(scheme, _)| *scheme);

    // The same module of every layer is one entry, where all of them agree.
    let mut groups: BTreeMap<LayerGroup, Vec<&str>> = BTreeMap::new();
    let embeddings = schemes.keys().copied().filter(|module| is_embedding(module));
    let modules: Vec<&str> = plan.linears.keys().map(String::as_str).chain(embeddings).collect();
    for &module in &modules {
        groups.entry(layer_group(module)).or_default().push(module);
    }
    let mut layers = Vec::new();
    for (group, members) in groups {
        let scheme_of = |module: &str| schemes.get(module).copied();
        let first = scheme_of(members[0]);
        let agree = members.iter().all(|module| scheme_of(module) == first);
        let reaches_others = group.glob().parse().is_ok_and(|glob: ModulePattern| {
            modules.iter().any(|module| glob.matches(module) && !members.contains(module))
        });
        let differs = |module: &str, scheme: Scheme| scheme != default || is_embedding(module);
        if agree && !reaches_others {
            layers.extend(first.filter(|scheme| differs(members[0], *scheme)).map(|scheme| (group, scheme)));
        } else {
            layers.extend(members.iter().filter_map(|module| {
                let scheme = scheme_of(module).filter(|scheme| differs(module, *scheme))?;
                Some((LayerGroup::Module((*module).to_owned()), scheme))
            }));
        }
    }
    let unquantized = plan.linears.iter().filter(|(_, scheme)| scheme.is_none());
    let exclude = unquantized.map(|(module, _)| module.clone()).collect();
    Declaration { default, layers, exclude }
}

/// Scheme of every quantized module.
pub(crate) fn schemes(plan: &Plan) -> BTreeMap<&str, Scheme> {
    plan.tensors
        .iter()
        .filter_map(|tensor| match tensor.action {
            Action::Quantize(scheme) => Some((tensor.module()?, scheme)),
            Action::Copy | Action::ToBf16 => None,
        })
        .collect()
}

fn layer_group(module: &str) -> LayerGroup {
    let split = module.strip_prefix(LAYERS).and_then(|rest| rest.split_once('.'));
    match split {
        Some((number, rest)) if number.bytes().all(|b| b.is_ascii_digit()) => {
            LayerGroup::EveryLayer(LAYERS.to_owned(), format!(".{rest}"))
        }
        _ => LayerGroup::Module(module.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;

    use super::*;
    use crate::plan::{Recipe, SourceTraits, plan};
    use crate::source::SourceTensor;

    fn planned(format: &str, layers: &[(&str, &str)], exclude: &[&str]) -> Plan {
        let mut names = vec!["model.embed_tokens".to_owned()];
        for layer in 0..12 {
            for module in ["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"] {
                names.push(format!("model.layers.{layer}.{module}"));
            }
        }
        let tensors: Vec<SourceTensor> = names
            .iter()
            .map(|n| SourceTensor { name: format!("{n}.weight"), dtype: Dtype::BF16, shape: vec![32, 32] })
            .collect();
        let recipe = Recipe {
            layers: layers.iter().map(|(p, f)| (p.parse().unwrap(), f.parse().unwrap())).collect(),
            exclude: exclude.iter().map(|p| p.parse().unwrap()).collect(),
            ..Recipe::new(format.parse().unwrap())
        };
        plan(&recipe, &tensors, SourceTraits { tied: true, to_bf16: false }).unwrap()
    }

    #[test]
    fn default_layouts() {
        let check = |format: &str, layers: &[(&str, &str)], expected: Dialect| {
            assert_eq!(choose(None, &planned(format, layers, &[])).unwrap(), expected, "{format} {layers:?}");
        };
        for format in ["mxfp4", "mxfp6", "mxfp6_e3m2", "w4a4", "w4a6", "w4a8", "w6a6", "w6a8", "mxfp8:mxfp6"]
        {
            check(format, &[], Dialect::Quark);
        }
        for format in ["mxfp8", "w8a8"] {
            check(format, &[], Dialect::CompressedTensors);
        }
        for format in ["mxint8", "mxint8:mxint8", "mxfp8_e5m2", "mxint4", "mxfp4_e3m0", "mxfp4:mxint8"] {
            check(format, &[], Dialect::OcpMx);
        }
        check("mxfp4", &[("*down_proj", "mxfp8")], Dialect::Quark);
        check("mxfp4", &[("*down_proj", "mxint8")], Dialect::OcpMx);
        check("mxfp4", &[("model.embed_tokens", "mxfp8")], Dialect::OcpMx);
    }

    #[test]
    fn layouts_refuse_what_they_have_no_place_for() {
        let check = |layout: Dialect, format: &str, layers: &[(&str, &str)]| {
            let message = choose(Some(layout), &planned(format, layers, &[])).unwrap_err().to_string();
            assert!(message.contains("--layout") && message.contains(layout.name()), "{message}");
        };
        check(Dialect::Quark, "mxint8", &[]);
        check(Dialect::CompressedTensors, "mxfp6_e3m2", &[]);
        check(Dialect::Quark, "mxfp4", &[("model.embed_tokens", "mxfp8")]);
    }

    #[test]
    fn declarations_say_what_the_plan_does() {
        for (layers, exclude) in [
            (&[][..], &[][..]),
            (&[("*down_proj", "mxfp8")], &["*q_proj"]),
            (&[("model.layers.1.*", "mxfp8"), ("lm_head", "mxfp6")], &["model.layers.11.mlp.up_proj"]),
            (&[("*_proj", "w4a6")], &[]),
        ] {
            let plan = planned("mxfp4", layers, exclude);
            for dialect in Dialect::ALL {
                let config = serde_json::json!({
                    "quantization_config": dialect.write(&declare(&plan, "mxfp4".parse().unwrap())),
                });
                let dir = std::path::Path::new("none");
                let read = models::checkpoint::Quantization::read(dir, &config).unwrap();
                // Formats only: the scale rules are in the record.
                let formats = |s: Scheme| (s.weight.format, s.activation.map(|a| a.format));
                for (module, scheme) in &plan.linears {
                    assert_eq!(read.scheme(module).map(formats), scheme.map(formats), "{dialect} {module}");
                }
            }
        }
    }

    #[test]
    fn the_same_module_of_every_layer_is_one_entry() {
        let declaration =
            declare(&planned("mxfp4", &[("*down_proj", "mxfp8")], &[]), "mxfp4".parse().unwrap());
        let globs: Vec<String> = declaration.layers.iter().map(|(group, _)| group.glob()).collect();
        assert_eq!(globs, ["model.layers.*.mlp.down_proj"]);
        assert_eq!(declaration.exclude, ["lm_head"]);
    }
}

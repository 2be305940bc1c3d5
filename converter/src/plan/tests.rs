use safetensors::Dtype;

use super::*;

fn tensor(name: &str, shape: &[usize]) -> SourceTensor {
    SourceTensor { name: name.to_owned(), dtype: Dtype::BF16, shape: shape.to_vec() }
}

fn model() -> Vec<SourceTensor> {
    let mut tensors = vec![tensor("model.embed_tokens.weight", &[128, 64])];
    for layer in 0..2 {
        for (name, shape) in [
            ("self_attn.q_proj.weight", &[64, 64][..]),
            ("self_attn.q_proj.bias", &[64]),
            ("self_attn.k_proj.weight", &[32, 64]),
            ("self_attn.v_proj.weight", &[32, 64]),
            ("self_attn.o_proj.weight", &[64, 64]),
            ("mlp.gate.weight", &[4, 64]),
            ("mlp.gate_proj.weight", &[96, 64]),
            ("mlp.up_proj.weight", &[96, 64]),
            ("mlp.down_proj.weight", &[64, 96]),
            ("input_layernorm.weight", &[64]),
        ] {
            tensors.push(tensor(&format!("model.layers.{layer}.{name}"), shape));
        }
    }
    tensors.push(tensor("model.norm.weight", &[64]));
    tensors
}

const TIED: SourceTraits = SourceTraits { tied: true, to_bf16: false };
const UNTIED: SourceTraits = SourceTraits { tied: false, to_bf16: false };

fn recipe(format: &str, layers: &[(&str, &str)], exclude: &[&str]) -> Recipe {
    Recipe {
        layers: layers.iter().map(|(p, f)| (p.parse().unwrap(), f.parse().unwrap())).collect(),
        exclude: exclude.iter().map(|p| p.parse().unwrap()).collect(),
        ..Recipe::new(format.parse().unwrap())
    }
}

/// Format of each quantized module, without `model.layers.`.
fn formats(plan: &Plan) -> BTreeMap<String, String> {
    plan.tensors
        .iter()
        .filter_map(|t| match t.action {
            Action::Quantize(scheme) => {
                let module = t.module().unwrap();
                Some((module.trim_start_matches("model.layers.").to_owned(), scheme.to_string()))
            }
            Action::Copy | Action::ToBf16 => None,
        })
        .collect()
}

#[test]
fn quantizes_the_projections_and_nothing_else() {
    let plan = plan(&recipe("mxfp4", &[], &[]), &model(), TIED).unwrap();
    let formats = formats(&plan);
    assert_eq!(formats.len(), 14);
    assert!(formats.values().all(|f| f == "mxfp4"));
    assert!(formats.keys().all(|m| m.ends_with("_proj")));
    assert_eq!(plan.tensors.len(), model().len());
    assert!(!plan.unties_head);
    assert_eq!(plan.linears["lm_head"], None);
    assert_eq!(plan.linears["model.layers.0.mlp.gate"], None, "a router stays as it is, and is declared so");
    assert!(plan.warnings.is_empty());
}

#[test]
fn patterns_choose_formats() {
    let recipe = recipe(
        "w4a6",
        &[("*down_proj", "mxfp8"), ("model.layers.1.mlp.down_proj", "mxfp6_e3m2")],
        &["re:model\\.layers\\.0\\.self_attn"],
    );
    let formats = formats(&plan(&recipe, &model(), TIED).unwrap());
    assert_eq!(formats["0.mlp.down_proj"], "mxfp8_e4m3");
    assert_eq!(formats["1.mlp.down_proj"], "mxfp6_e3m2", "the last match wins");
    assert_eq!(formats["1.self_attn.q_proj"], "mxfp4:mxfp6_e2m3");
    assert!(!formats.contains_key("0.self_attn.q_proj"));
}

#[test]
fn scale_rules_reach_weights_and_activations() {
    let check = |weights: Option<ScaleRounding>,
                 activations: Option<ScaleRounding>,
                 expected: (&str, &str)| {
        let recipe = Recipe {
            scale_rounding: weights,
            activation_scale_rounding: activations,
            ..recipe("w4a8", &[], &[])
        };
        let plan = plan(&recipe, &model(), TIED).unwrap();
        let scheme = plan.linears["model.layers.0.self_attn.q_proj"].unwrap();
        let actual = (scheme.weight.scale_rounding.name(), scheme.activation.unwrap().scale_rounding.name());
        assert_eq!(actual, expected);
    };
    check(None, None, ("even", "rceil"));
    check(Some(ScaleRounding::Floor), None, ("floor", "floor"));
    check(Some(ScaleRounding::Mse), Some(ScaleRounding::Even), ("mse", "even"));
    check(None, Some(ScaleRounding::Ceil), ("even", "ceil"));
}

#[test]
fn a_tied_head_is_made_from_the_embedding() {
    let recipe = recipe("mxfp4", &[("lm_head", "mxfp8")], &[]);
    let tied = plan(&recipe, &model(), TIED).unwrap();
    assert!(tied.unties_head);
    assert_eq!(formats(&tied)["lm_head"], "mxfp8_e4m3");
    assert_eq!(
        tied.tensors[0],
        PlannedTensor { source: 0, name: "model.embed_tokens.weight".into(), action: Action::Copy }
    );
    assert_eq!(tied.tensors[1].source, 0, "from the embedding");

    let mut stored = model();
    stored.push(tensor("lm_head.weight", &[128, 64]));
    let duplicate = plan(&recipe, &stored, TIED).unwrap();
    assert_eq!(duplicate.tensors.iter().filter(|t| t.name == "lm_head.weight").count(), 1);
    let untied = plan(&recipe, &stored, UNTIED).unwrap();
    assert!(!untied.unties_head);
    assert_eq!(untied.tensors.last().unwrap().source, stored.len() - 1);
    assert_eq!(formats(&untied)["lm_head"], "mxfp8_e4m3");
}

#[test]
fn embeddings_only_when_named() {
    let plan = plan(&recipe("mxfp4", &[("model.embed_tokens", "mxint8")], &[]), &model(), TIED).unwrap();
    assert_eq!(formats(&plan)["model.embed_tokens"], "mxint8");
    assert!(!plan.unties_head, "the head stays tied to the quantized embedding");
}

#[test]
fn patterns_without_effect_are_errors() {
    for (layers, exclude, flag) in [
        (&[("*.mlp.fc1", "mxfp8")][..], &[][..], "--layer '*.mlp.fc1'"),
        (&[], &["model.norm"], "--exclude 'model.norm'"),
        (&[("model.layers.0.mlp.gate", "mxfp8")], &[], "--layer 'model.layers.0.mlp.gate'"),
    ] {
        let message = plan(&recipe("mxfp4", layers, exclude), &model(), TIED).unwrap_err().to_string();
        assert!(message.contains(flag), "{message}");
    }
    let untied = plan(&recipe("mxfp4", &[("lm_head", "mxfp8")], &[]), &model(), UNTIED);
    assert!(untied.is_err(), "an untied model without lm_head.weight has no head to quantize");
}

#[test]
fn tensors_that_cannot_be_quantized_are_named() {
    let mut odd = model();
    odd.push(tensor("model.layers.2.mlp.down_proj.weight", &[64, 48]));
    let message = plan(&recipe("mxfp4", &[], &[]), &odd, TIED).unwrap_err().to_string();
    assert!(message.contains("model.layers.2.mlp.down_proj.weight") && message.contains("48"), "{message}");
    assert!(plan(&recipe("mxfp4", &[], &["model.layers.2.*"]), &odd, TIED).is_ok());

    let mut int = model();
    int[1].dtype = Dtype::I32;
    let message = plan(&recipe("mxfp4", &[], &[]), &int, TIED).unwrap_err().to_string();
    assert!(message.contains("q_proj.weight") && message.contains("I32"), "{message}");

    assert_eq!(plan(&recipe("mxfp4", &[], &["*"]), &model(), TIED), Err(PlanError::Nothing));
}

#[test]
fn mixed_fused_groups_are_warned_about() {
    let check = |layers: &[(&str, &str)], exclude: &[&str], expected: usize| {
        let plan = plan(&recipe("mxfp4", layers, exclude), &model(), TIED).unwrap();
        assert_eq!(plan.warnings.len(), expected, "{:?}", plan.warnings);
    };
    check(&[("*down_proj", "mxfp8")], &[], 0);
    check(&[("*.self_attn.[qkv]_proj", "mxfp8")], &[], 0);
    check(&[("*.v_proj", "mxfp8")], &[], 1);
    check(&[("*.k_proj", "mxfp8"), ("*up_proj", "mxfp6")], &[], 2);
    check(&[], &["*gate_proj"], 1);
}

#[test]
fn bad_shapes_and_names_are_refused() {
    let check = |recipe: &Recipe, change: &dyn Fn(&mut Vec<SourceTensor>), expected: &[&str]| {
        let mut tensors = model();
        change(&mut tensors);
        let message = plan(recipe, &tensors, TIED).unwrap_err().to_string();
        for part in expected {
            assert!(message.contains(part), "{message}");
        }
    };
    let head = recipe("mxfp4", &[("lm_head", "mxfp8")], &[]);
    check(&head, &|t| t[0].shape = vec![64], &["model.embed_tokens.weight", "[64]"]);
    check(&head, &|t| t[0].shape = vec![2, 64, 64], &["model.embed_tokens.weight", "[2, 64, 64]"]);
    check(&head, &|t| drop(t.remove(0)), &["lm_head", "embed_tokens"]);
    let all = recipe("mxfp4", &[], &[]);
    check(&all, &|t| t[1].shape = vec![64], &["layers.0.self_attn.q_proj.weight", "[64]"]);
    for suffix in ["weight_scale", "weight_packed"] {
        let name = format!("model.layers.1.mlp.up_proj.{suffix}");
        check(&all, &|t| t.push(tensor(&name, &[96, 2])), &[&name, "name"]);
    }
    let mut flat = model();
    flat[1].shape = vec![64];
    let excluded = plan(&recipe("mxfp4", &[], &["model.layers.0.self_attn.q_proj"]), &flat, TIED).unwrap();
    assert_eq!(excluded.tensors[1].action, Action::Copy);
    assert_eq!(excluded.linears["model.layers.0.self_attn.q_proj"], None, "declared unquantized");
    check(&head, &|t| t.push(tensor("other.embed_tokens.weight", &[128, 64])), &["lm_head.weight"]);
}

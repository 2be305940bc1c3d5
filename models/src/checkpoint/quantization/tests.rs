use kernels::mx::{MxFormat, Rotation, Scheme};
use serde_json::{Value, json};

use super::*;

fn scheme(name: &str) -> Scheme {
    name.parse().unwrap()
}

/// Formats only: what the foreign dialects can say.
fn formats(scheme: Option<Scheme>) -> Option<(MxFormat, Option<MxFormat>)> {
    scheme.map(|s| (s.weight.format, s.activation.map(|a| a.format)))
}

const Q: &str = "model.layers.7.self_attn.q_proj";
const DOWN: &str = "model.layers.11.mlp.down_proj";

fn every_scheme() -> impl Iterator<Item = Scheme> {
    ElementType::ALL.into_iter().flat_map(|weight| {
        let activations = ElementType::ALL.into_iter().map(|e| Some(MxFormat::new(e).into())).chain([None]);
        activations.map(move |activation| Scheme {
            weight: MxFormat::new(weight).into(),
            activation,
            rotation: None,
        })
    })
}

#[test]
fn what_a_dialect_writes_it_reads() {
    for dialect in Dialect::ALL {
        let mut written = 0;
        for default in every_scheme().filter(|s| dialect.expresses(*s)) {
            for layer in every_scheme().filter(|s| dialect.expresses(*s)) {
                let group = LayerGroup::EveryLayer("model.layers.".to_owned(), ".mlp.down_proj".to_owned());
                let declaration = Declaration {
                    default,
                    layers: vec![(group, layer)],
                    exclude: vec!["lm_head".to_owned()],
                };
                let read = Quantization::from_json(&dialect.write(&declaration)).unwrap();
                assert_eq!(read.dialect(), Some(dialect.name()));
                assert_eq!(formats(read.scheme(Q)), formats(Some(default)), "{dialect} {default}");
                assert_eq!(formats(read.scheme(DOWN)), formats(Some(layer)), "{dialect} {layer}");
                assert_eq!(read.scheme("lm_head"), None);
                assert_eq!(read.scheme("model.embed_tokens"), None);
                written += 1;
            }
        }
        assert!(written > 0, "{dialect}");
    }
}

#[test]
fn our_dialect_keeps_scale_rounding() {
    let mut mse = scheme("mxint8:mxint8");
    mse.weight.scale_rounding = kernels::mx::ScaleRounding::Mse;
    let declaration = Declaration { default: mse, layers: Vec::new(), exclude: Vec::new() };
    let read = Quantization::from_json(&Dialect::OcpMx.write(&declaration)).unwrap();
    assert_eq!(read.scheme(Q), Some(mse));
}

#[test]
fn expresses_only_what_readers_know() {
    let check = |dialect: Dialect, name: &str| dialect.expresses(scheme(name));
    assert!(check(Dialect::Quark, "w4a6") && check(Dialect::Quark, "mxfp6_e3m2"));
    assert!(!check(Dialect::Quark, "mxint8") && !check(Dialect::Quark, "mxfp4:mxfp8_e5m2"));
    assert!(check(Dialect::CompressedTensors, "w8a8") && !check(Dialect::CompressedTensors, "mxfp6_e3m2"));
    assert!(every_scheme().all(|s| Dialect::OcpMx.expresses(s)));
}

fn quark_tensor(dtype: &str, dynamic: bool) -> Value {
    json!({"dtype": dtype, "is_dynamic": dynamic, "qscheme": "per_group", "ch_axis": -1, "group_size": 32,
           "scale_format": "e8m0", "scale_calculation_mode": "even"})
}

fn quark(global: &Value) -> Value {
    json!({"quant_method": "quark", "global_quant_config": global, "layer_quant_config": {}, "exclude": [],
           "layer_type_quant_config": {}, "export": {"kv_cache_group": [], "weight_format": "real_quantized"}})
}

#[test]
fn quark_excludes_and_layers() {
    let mut config = quark(
        &json!({"weight": quark_tensor("fp4", false), "input_tensors": quark_tensor("fp6_e2m3", true)}),
    );
    config["exclude"] = json!(["lm_head", "re:model.layers.0\\..*", "*.o_proj"]);
    config["layer_quant_config"] = json!({"*down_proj": {"weight": quark_tensor("fp8_e4m3", false)}});
    let read = Quantization::from_json(&config).unwrap();
    assert_eq!(formats(read.scheme(Q)), formats(Some(scheme("w4a6"))));
    assert_eq!(formats(read.scheme(DOWN)), formats(Some(scheme("mxfp8"))));
    assert_eq!(read.scheme("model.layers.0.mlp.down_proj"), None, "exclude comes before the layers");
    assert_eq!(read.scheme("model.layers.3.self_attn.o_proj"), None);
    assert_eq!(read.scheme("lm_head"), None);
}

/// The refusal of `config`, as `field: reason`.
fn refusal(config: &Value) -> String {
    match Quantization::from_json(config) {
        Ok(read) => panic!("{config} is read as {:?}", read.scheme(Q)),
        Err(refusal) => format!("{}: {}", refusal.field, refusal.reason),
    }
}

#[test]
fn quark_refuses_what_is_not_mx() {
    let weight = quark_tensor("fp4", false);
    let per_tensor = json!({"dtype": "fp8_e4m3", "is_dynamic": false, "qscheme": "per_tensor"});
    let message = refusal(&quark(&json!({"weight": weight, "input_tensors": per_tensor})));
    assert!(
        message.contains("global_quant_config.input_tensors") && message.contains("per_tensor"),
        "{message}"
    );
    for weight in ["int4", "fp8_e5m2", "mx", "int8"] {
        let message = refusal(&quark(&json!({"weight": quark_tensor(weight, false)})));
        assert!(message.contains("weight") && message.contains(weight), "{message}");
    }
    let mut group_128 = quark_tensor("fp4", false);
    group_128["group_size"] = json!(128);
    assert!(refusal(&quark(&json!({"weight": group_128}))).contains("of 128"));
    assert!(refusal(&quark(&json!({"weight": quark_tensor("fp4", true)}))).contains("dynamic"));
    for (field, value) in [
        ("kv_cache_quant_config", json!({"*k_proj": {}})),
        ("softmax_quant_spec", quark_tensor("fp8_e4m3", true)),
        ("layer_type_quant_config", json!({"nn.Linear": {}})),
        ("algo_config", json!([{"name": "rotation"}])),
    ] {
        let mut config = quark(&json!({"weight": weight}));
        config[field] = value;
        assert!(refusal(&config).starts_with(field), "{field}");
    }
    let mut fake = quark(&json!({"weight": weight}));
    fake["export"]["weight_format"] = json!("fake_quantized");
    assert!(refusal(&fake).contains("fake_quantized"));
}

fn ct_group(format: &str, bits: u32) -> Value {
    json!({"targets": ["Linear"], "format": format, "input_activations": null, "output_activations": null,
           "weights": {"num_bits": bits, "type": "float", "symmetric": true, "strategy": "group", "group_size": 32,
                       "dynamic": false, "scale_dtype": "torch.uint8"}})
}

fn ct(groups: &Value) -> Value {
    json!({"quant_method": "compressed-tensors", "format": "mixed-precision", "quantization_status": "compressed",
           "config_groups": groups, "ignore": ["lm_head", "re:.*o_proj"], "kv_cache_scheme": null})
}

#[test]
fn compressed_tensors_targets() {
    let mut eight = ct_group("mxfp8-quantized", 8);
    eight["targets"] = json!(["re:.*down_proj$", Q]);
    let mut six = ct_group("mxfp6-pack-quantized", 6);
    six["targets"] = json!(["re:.*q_proj"]);
    let read = Quantization::from_json(&ct(
        &json!({"a": ct_group("mxfp4-pack-quantized", 4), "b": six, "c": eight}),
    ))
    .unwrap();
    assert_eq!(formats(read.scheme("model.layers.0.mlp.up_proj")), formats(Some(scheme("mxfp4"))));
    assert_eq!(formats(read.scheme(DOWN)), formats(Some(scheme("mxfp8"))));
    assert_eq!(
        formats(read.scheme(Q)),
        formats(Some(scheme("mxfp8"))),
        "a name comes before regular expressions"
    );
    assert_eq!(formats(read.scheme("model.layers.0.self_attn.q_proj")), formats(Some(scheme("mxfp6"))));
    assert_eq!(read.scheme("model.layers.0.self_attn.o_proj"), None);
}

#[test]
fn compressed_tensors_refuses_what_is_not_mx() {
    for format in ["nvfp4-pack-quantized", "pack-quantized", "float-quantized"] {
        assert!(refusal(&ct(&json!({"a": ct_group(format, 4)}))).contains(format));
    }
    assert!(refusal(&ct(&json!({"a": ct_group("mxfp4-pack-quantized", 8)}))).contains("num_bits"));
    let mut token = ct_group("mxfp8-quantized", 8);
    token["input_activations"] =
        json!({"num_bits": 8, "type": "float", "strategy": "token", "dynamic": true, "symmetric": true});
    let message = refusal(&ct(&json!({"a": token})));
    assert!(message.contains("input_activations") && message.contains("token"), "{message}");
    let mut kv = ct(&json!({"a": ct_group("mxfp8-quantized", 8)}));
    kv["kv_cache_scheme"] = json!({"num_bits": 8});
    assert!(refusal(&kv).starts_with("kv_cache_scheme"));
    let mut embedding = ct_group("mxfp8-quantized", 8);
    embedding["targets"] = json!(["Embedding"]);
    assert!(refusal(&ct(&json!({"a": embedding}))).contains("Embedding"));
    let two = json!({"a": ct_group("mxfp8-quantized", 8), "b": ct_group("mxfp4-pack-quantized", 4)});
    assert!(refusal(&ct(&two)).contains("as another group does"), "{}", refusal(&ct(&two)));
}

#[test]
fn the_innermost_malformed_field_is_blamed() {
    let mut bits = ct_group("mxfp4-pack-quantized", 4);
    bits["weights"]["num_bits"] = json!("four");
    let message = refusal(&ct(&json!({"a": bits})));
    assert!(message.starts_with("config_groups.a.weights.num_bits: invalid type"), "{message}");
    let mut ignore = ct(&json!({"a": ct_group("mxfp4-pack-quantized", 4)}));
    ignore["ignore"] = json!(["lm_head", 3]);
    assert!(refusal(&ignore).starts_with("ignore[1]: invalid type"), "{}", refusal(&ignore));
    let mut dtype = quark_tensor("fp4", false);
    dtype["group_size"] = json!("32");
    let message = refusal(&quark(&json!({"weight": dtype})));
    assert!(message.starts_with("global_quant_config.weight.group_size: invalid type"), "{message}");
    let message = refusal(&json!({"quant_method": "compressed-tensors"}));
    assert!(message.contains("config_groups"), "{message}");
}

#[test]
fn compression_config_is_the_same_under_its_older_name() {
    let config = json!({"compression_config": ct(&json!({"a": ct_group("mxfp4-pack-quantized", 4)}))});
    let read = Quantization::read(Path::new("."), &config).unwrap();
    assert_eq!(formats(read.scheme(DOWN)), formats(Some(scheme("mxfp4"))));
}

#[test]
fn modelopt_mxfp8() {
    let config = json!({"quant_method": "modelopt", "quant_algo": "MXFP8", "kv_cache_quant_algo": null,
                        "exclude_modules": ["lm_head", "model.layers.0.self_attn", "*.layers.3.*"]});
    let file = json!({"producer": {"name": "modelopt"}, "quantization": config});
    for read in [Quantization::from_json(&config).unwrap(), modelopt::read_file(&file).unwrap()] {
        assert_eq!(read.scheme(Q), Some(scheme("w8a8")));
        assert_eq!(read.scheme("model.layers.0.self_attn.q_proj"), None);
        assert_eq!(read.scheme("model.layers.3.self_attn.q_proj"), None);
        assert_eq!(read.scheme("lm_head"), None);
    }
    let nvfp4 = json!({"quant_method": "modelopt", "quant_algo": "NVFP4"});
    assert!(refusal(&nvfp4).contains("NVFP4"));
    let fp8_kv = json!({"quant_method": "modelopt", "quant_algo": "MXFP8", "kv_cache_quant_algo": "FP8"});
    assert!(refusal(&fp8_kv).starts_with("kv_cache_quant_algo"));
}

#[test]
fn other_methods_are_refused_by_name() {
    for method in ["gptq", "awq", "mxfp4", "fp8", "bitsandbytes"] {
        assert!(refusal(&json!({"quant_method": method})).contains(method));
    }
    assert!(refusal(&json!({})).contains("quant_method"));
    let typo = json!({"quant_method": "ocp-mx", "version": 1, "wieght": null});
    assert!(refusal(&typo).contains("wieght"));
}

#[test]
fn rotations_are_ocp_mx_alone() {
    let rotated = Scheme { rotation: Some(Rotation::BlockHadamard), ..scheme("w4a6") };
    let expressing: Vec<Dialect> = Dialect::ALL.into_iter().filter(|d| d.expresses(rotated)).collect();
    assert_eq!(expressing, [Dialect::OcpMx]);
    let group = LayerGroup::EveryLayer("model.layers.".to_owned(), ".mlp.down_proj".to_owned());
    for (default, layer) in [(rotated, scheme("mxfp6")), (scheme("mxfp6"), rotated)] {
        let declaration = Declaration { default, layers: vec![(group.clone(), layer)], exclude: Vec::new() };
        let read = Quantization::from_json(&Dialect::OcpMx.write(&declaration)).unwrap();
        assert_eq!(read.scheme(Q), Some(default));
        assert_eq!(read.scheme(DOWN), Some(layer));
    }

    let declaration = Declaration { default: rotated, layers: Vec::new(), exclude: Vec::new() };
    let mut config = Dialect::OcpMx.write(&declaration);
    config["rotation"] = json!("givens");
    let message = refusal(&config);
    assert!(message.starts_with("rotation") && message.contains("givens"), "{message}");
    config["rotation"] = json!("block-hadamard");
    (config["weight"], config["input_tensors"]) = (Value::Null, Value::Null);
    let message = refusal(&config);
    assert!(message.starts_with("rotation") && message.contains("unquantized"), "{message}");
}

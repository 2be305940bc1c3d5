//! What is written is what a direct cast gives, in every format, pair and layout, and is read back as such.

use std::path::Path;

use converter::plan::Recipe;
use converter::{ConvertError, Options, convert};
use kernels::mx::{ElementType, ScaleRounding, Scheme, Values};
use models::checkpoint::quantization::Dialect;
use models::checkpoint::{Checkpoint, LinearTensor};

use crate::common::{assert_direct_cast, convert_to, files, rustdoc_6m};

const PAIRS: [&str; 10] = [
    "w4a4",
    "w4a6",
    "w4a8",
    "w6a6",
    "w6a8",
    "w8a8",
    "mxint8:mxint8",
    "mxfp4:mxint8",
    "mxfp8_e5m2:mxfp8",
    "mxfp6_e3m2:mxfp6_e3m2",
];

/// Asserts that every projection of `output` is the direct cast of `model`'s, in `scheme`, and all else is equal.
fn check(model: &Path, output: &Path, scheme: Scheme) {
    let (plain, packed) = (Checkpoint::open(model).unwrap(), Checkpoint::open(output).unwrap());
    let mut linears = 0;
    for info in plain.tensors() {
        let module = info.name.trim_end_matches(".weight");
        if !module.ends_with("_proj") {
            assert_eq!(plain.dense(&info.name).unwrap(), packed.dense(&info.name).unwrap());
            continue;
        }
        let source = plain.dense(&info.name).unwrap();
        assert_eq!(packed.scheme(module).unwrap(), Some(scheme), "{module}");
        let shape = [info.shape[0], info.shape[1]];
        assert_direct_cast(&packed, module, Values::Bf16(&source.bytes), shape);
        linears += 1;
    }
    assert_eq!(linears, 42);
    let packed_tensors = packed.tensors().count();
    assert_eq!(packed_tensors, plain.tensors().count() + linears, "one scale tensor per linear module");
}

#[test]
fn every_format_and_pair() {
    let root = tempfile::tempdir().unwrap();
    let formats = ElementType::ALL.map(|e| e.spec().name);
    for format in formats.iter().chain(&PAIRS) {
        let output = root.path().join(format.replace(':', "-"));
        let report = convert_to(&rustdoc_6m(), &output, format).unwrap();
        check(&rustdoc_6m(), &output, format.parse().unwrap());
        assert!(report.total.sqnr_db.unwrap() > 10.0, "{format}");
        std::fs::remove_dir_all(&output).unwrap();
    }
}

#[test]
fn every_layout_and_scale_rule() {
    let root = tempfile::tempdir().unwrap();
    for (i, layout) in Dialect::ALL.into_iter().enumerate() {
        for format in ["mxfp4", "mxfp6", "mxfp6_e3m2", "mxfp8", "mxint8", "w4a8", "w8a8"] {
            let rule = ScaleRounding::ALL[i];
            let recipe = Recipe { scale_rounding: Some(rule), ..Recipe::new(format.parse().unwrap()) };
            let output = root.path().join(format!("{layout}-{format}"));
            let options = Options { layout: Some(layout), ..Options::new(rustdoc_6m(), &output, recipe) };
            let mut scheme: Scheme = format.parse().unwrap();
            scheme.weight.scale_rounding = rule;
            if let Some(activation) = &mut scheme.activation {
                activation.scale_rounding = rule;
            }
            match convert(&options, &()) {
                Ok(_) => check(&rustdoc_6m(), &output, scheme),
                Err(ConvertError::Layout { .. }) => assert!(!layout.expresses(scheme), "{layout} {format}"),
                Err(other) => panic!("{layout} {format}: {other}"),
            }
        }
    }
}

#[test]
fn footprints() {
    let root = tempfile::tempdir().unwrap();
    for (format, bits) in [("mxfp4", 4.25), ("mxfp6", 6.25), ("mxfp8", 8.25), ("mxint8", 8.25)] {
        let report = convert_to(&rustdoc_6m(), &root.path().join(format), format).unwrap();
        assert_eq!(report.formats[0].bits_per_weight, bits, "{format}");
    }
}

#[test]
fn threads_and_shards_change_no_byte() {
    let root = tempfile::tempdir().unwrap();
    let run = |name: &str, threads: usize, max_shard_bytes: u64| {
        let output = root.path().join(name);
        let recipe = Recipe::new("mxfp6".parse().unwrap());
        let threads = threads.try_into().unwrap();
        let options = Options { threads, max_shard_bytes, ..Options::new(rustdoc_6m(), &output, recipe) };
        convert(&options, &()).unwrap();
        output
    };
    let one = run("one", 1, u64::MAX);
    let eight = run("eight", 8, u64::MAX);
    assert_eq!(files(&one)["model.safetensors"], files(&eight)["model.safetensors"]);
    assert_eq!(files(&one)["mx_conversion.json"], files(&eight)["mx_conversion.json"]);

    let sharded = run("sharded", 2, 2_500_000);
    let names: Vec<String> = files(&sharded).into_keys().filter(|n| n.starts_with("model")).collect();
    assert_eq!(
        names,
        [
            "model-00001-of-00003.safetensors",
            "model-00002-of-00003.safetensors",
            "model-00003-of-00003.safetensors",
            "model.safetensors.index.json",
        ]
    );
    check(&rustdoc_6m(), &sharded, "mxfp6".parse().unwrap());
}

#[test]
fn mixed_formats_and_an_untied_head() {
    let root = tempfile::tempdir().unwrap();
    let output = root.path().join("out");
    let recipe = Recipe {
        layers: vec![
            ("*.down_proj".parse().unwrap(), "w6a6".parse().unwrap()),
            ("lm_head".parse().unwrap(), "mxfp8".parse().unwrap()),
        ],
        exclude: vec!["model.layers.5.*".parse().unwrap()],
        ..Recipe::new("w4a8".parse().unwrap())
    };
    convert(&Options::new(rustdoc_6m(), &output, recipe), &()).unwrap();
    let (plain, packed) = (Checkpoint::open(&rustdoc_6m()).unwrap(), Checkpoint::open(&output).unwrap());
    assert_eq!(packed.config()["tie_word_embeddings"], false);
    let scheme = |module: &str| packed.linear(module).unwrap().scheme().map(|s| s.to_string());
    assert_eq!(scheme("model.layers.0.mlp.down_proj").unwrap(), "mxfp6_e2m3:mxfp6_e2m3");
    assert_eq!(scheme("model.layers.0.mlp.up_proj").unwrap(), "mxfp4:mxfp8_e4m3");
    assert_eq!(scheme("model.layers.5.mlp.up_proj"), None);
    assert_eq!(scheme("lm_head").unwrap(), "mxfp8_e4m3");
    let embedding = plain.dense("model.embed_tokens.weight").unwrap();
    assert_eq!(packed.dense("model.embed_tokens.weight").unwrap(), embedding);
    let shape = [embedding.shape[0], embedding.shape[1]];
    assert_direct_cast(&packed, "lm_head", Values::Bf16(&embedding.bytes), shape);
}

#[test]
fn a_quantized_embedding_stays_tied() {
    let root = tempfile::tempdir().unwrap();
    let output = root.path().join("out");
    let recipe = Recipe {
        layers: vec![("model.embed_tokens".parse().unwrap(), "mxint8".parse().unwrap())],
        ..Recipe::new("mxfp4".parse().unwrap())
    };
    convert(&Options::new(rustdoc_6m(), &output, recipe), &()).unwrap();
    let packed = Checkpoint::open(&output).unwrap();
    assert_eq!(packed.config()["tie_word_embeddings"], true);
    assert!(matches!(packed.linear("model.embed_tokens").unwrap(), LinearTensor::Mx(_)));
    assert!(!packed.contains("lm_head.weight"));
}

#[test]
fn activation_rules_of_their_own_are_recorded() {
    let root = tempfile::tempdir().unwrap();
    let output = root.path().join("out");
    let recipe = Recipe {
        scale_rounding: Some(ScaleRounding::Mse),
        activation_scale_rounding: Some(ScaleRounding::Ceil),
        ..Recipe::new("w4a8".parse().unwrap())
    };
    convert(&Options::new(rustdoc_6m(), &output, recipe), &()).unwrap();
    let scheme = Checkpoint::open(&output).unwrap().scheme("model.layers.2.mlp.up_proj").unwrap().unwrap();
    assert_eq!(scheme.weight.scale_rounding, ScaleRounding::Mse);
    assert_eq!(scheme.activation.unwrap().scale_rounding, ScaleRounding::Ceil);
}

//! Rotated weights: what is written, who reads it, and that it is the same model.

use converter::calibrate::Calibration;
use converter::plan::Recipe;
use converter::quantize::CalibratedMethod;
use converter::{ConvertError, Options, Report, convert};
use kernels::mx::{Rotation, ScaleRounding};
use models::checkpoint::Checkpoint;
use models::checkpoint::quantization::Dialect;
use serde_json::Value;

use crate::calibrated::text;
use crate::common::rustdoc_6m;
use crate::perplexity::{measure, windows};

fn options(format: &str, output: &std::path::Path) -> Options {
    let rotation = Some(Rotation::BlockHadamard);
    Options::new(rustdoc_6m(), output, Recipe { rotation, ..Recipe::new(format.parse().unwrap()) })
}

fn rotate(format: &str, output: &std::path::Path) -> Result<Report, ConvertError> {
    convert(&options(format, output), &())
}

/// A rotation changes nothing but what is rounded: with eight bits the model is the unquantized one. Activations are
/// rotated before they are quantized: if they were not, nothing would be left of it.
#[test]
fn the_server_undoes_what_is_fused_into_the_weights() {
    let root = tempfile::tempdir().unwrap();
    let windows = windows();
    let unquantized = measure(&rustdoc_6m(), &windows).perplexity;
    for (format, bound) in [("mxint8", 1.002), ("mxint8:mxint8", 1.004), ("mxfp4", 1.05), ("w4a6", 1.06)] {
        let output = root.path().join(format.replace(':', "-"));
        rotate(format, &output).unwrap();
        let quotient = measure(&output, &windows).perplexity / unquantized;
        assert!((0.998..bound).contains(&quotient), "{format}: {quotient} times the perplexity");
    }
}

#[test]
fn rotations_are_declared_where_they_can_be() {
    let root = tempfile::tempdir().unwrap();
    let output = root.path().join("out");
    rotate("mxfp4", &output).unwrap();
    let config: Value = serde_json::from_slice(&std::fs::read(output.join("config.json")).unwrap()).unwrap();
    let declared = &config["quantization_config"];
    assert_eq!(
        (&declared["quant_method"], &declared["rotation"]),
        (&"ocp-mx".into(), &"block-hadamard".into())
    );
    let checkpoint = Checkpoint::open(&output).unwrap();
    let rotation = |module: &str| checkpoint.scheme(module).unwrap().and_then(|scheme| scheme.rotation);
    assert_eq!(rotation("model.layers.2.mlp.down_proj"), Some(Rotation::BlockHadamard));

    for layout in [Dialect::Quark, Dialect::CompressedTensors] {
        let refused = root.path().join(layout.name());
        let options = Options { layout: Some(layout), ..options("mxfp4", &refused) };
        let message = convert(&options, &()).unwrap_err().to_string();
        assert!(message.contains(layout.name()) && message.contains("block-hadamard"), "{message}");
        assert!(!refused.exists());
    }
}

/// Heads and embeddings have no rotated input.
#[test]
fn only_decoder_layers_are_rotated() {
    let root = tempfile::tempdir().unwrap();
    let output = root.path().join("out");
    let mut options = options("mxfp4", &output);
    options.recipe.layers = vec![("lm_head".parse().unwrap(), "mxint8".parse().unwrap())];
    convert(&options, &()).unwrap();
    let checkpoint = Checkpoint::open(&output).unwrap();
    assert_eq!(checkpoint.scheme("lm_head").unwrap().unwrap().rotation, None);
    let quotient = measure(&output, &windows()).perplexity / measure(&rustdoc_6m(), &windows()).perplexity;
    assert!((0.998..1.06).contains(&quotient), "{quotient}");
}

#[test]
fn calibration_works_in_the_rotated_space() {
    let root = tempfile::tempdir().unwrap();
    let text = text(root.path());
    let mut options = options("mxfp4:mxfp6", &root.path().join("out"));
    options.recipe.weight_scale_rounding = Some(ScaleRounding::Mse);
    let calibration = Calibration::new(CalibratedMethod::Gptq, &text);
    options.calibration = Some(Calibration { windows: 48, window_tokens: 128, ..calibration });
    let calibration = convert(&options, &()).unwrap().calibration.unwrap();
    let perplexity = calibration.perplexity;
    assert!(calibration.kept && perplexity.calibrated < perplexity.nearest, "{perplexity:?}");
    // What was compared is what a reader of the checkpoint computes.
    let gains = calibration.stages.iter().map(|stage| stage.nearest_db - stage.method_db);
    assert!(gains.sum::<f64>() > 0.0);
    let windows = windows();
    let quotient =
        measure(&options.output, &windows).perplexity / measure(&rustdoc_6m(), &windows).perplexity;
    assert!((0.99..1.05).contains(&quotient), "{quotient}");
}

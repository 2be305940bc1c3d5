//! Automatic mixes of formats for a real small model.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use converter::eval::{EvalOptions, evaluate};
use models::checkpoint::Checkpoint;
use serde_json::Value;

use crate::calibrated::text;
use crate::common::{files, rustdoc_6m};

/// Decoder layers of the model.
const LAYERS: usize = 6;

/// `mxconvert` on the model with `args`, to `output`.
fn mxconvert(args: &[&str], output: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mxconvert"));
    command.arg(rustdoc_6m()).args(args).arg("-o").arg(output).output().unwrap()
}

fn convert(args: &[&str], output: &Path) {
    let run = mxconvert(args, output);
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
}

/// The last line that it says on standard error: why it gives up.
fn refused(args: &[&str], output: &Path) -> String {
    let run = mxconvert(args, output);
    assert!(!run.status.success() && !output.exists());
    let message = String::from_utf8(run.stderr).unwrap();
    message.lines().last().unwrap().to_owned()
}

/// Bits per weight of the quantized modules, and their formats.
fn bits(folder: &Path) -> (f64, BTreeSet<String>) {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let record: Value = serde_json::from_slice(&files(folder)["mx_conversion.json"]).unwrap();
    let (mut bits, mut elements, mut formats) = (0.0, 0.0, BTreeSet::new());
    for module in record["layers"].as_object().unwrap().keys() {
        let linear = checkpoint.linear(module).unwrap();
        let [rows, cols] = linear.shape();
        let format = linear.scheme().unwrap().weight.format;
        bits += format.bits_per_element() * (rows * cols) as f64;
        elements += (rows * cols) as f64;
        formats.insert(format.to_string());
    }
    (bits / elements, formats)
}

/// A short text, and flags that make calibration short.
fn calibration(root: &Path) -> Vec<String> {
    flags(&text(root))
}

fn flags(text: &Path) -> Vec<String> {
    let flags = ["--calibration-windows", "32", "--calibration-window", "128", "--calibration"];
    flags.into_iter().chain([text.to_str().unwrap()]).map(str::to_owned).collect()
}

fn with<'a>(flags: &[&'a str], calibration: &'a [String]) -> Vec<&'a str> {
    flags.iter().copied().chain(calibration.iter().map(String::as_str)).collect()
}

/// A mix is as large as it may be, better than its size alone would make it, and its recipe makes it again.
#[test]
fn mixes_fit_their_budget_and_can_be_made_again() {
    let root = tempfile::tempdir().unwrap();
    let calibration = calibration(root.path());
    let path = |name: &str| root.path().join(name);
    let candidates = ["--candidates", "mxfp4,mxfp6_e2m3,mxfp6_e3m2", "--method", "nearest"];
    let auto = [&["-f", "auto", "--bits", "5"], &candidates[..]].concat();
    convert(&with(&auto, &calibration), &path("mixed"));
    let (average, formats) = bits(&path("mixed"));
    assert!(average <= 5.0 && average > 4.9, "{average} bits per weight");
    assert!(formats.contains("mxfp4") && formats.len() > 1, "{formats:?}");

    let recipe = path("mixed/mx_recipe.json");
    convert(&["--recipe", recipe.to_str().unwrap()], &path("again"));
    let (mixed, again) = (files(&path("mixed")), files(&path("again")));
    assert_eq!(mixed["model.safetensors"], again["model.safetensors"]);
    assert_eq!(mixed["config.json"], again["config.json"]);

    for format in ["mxfp4", "mxfp6"] {
        convert(&["-f", format], &path(format));
    }
    let checkpoints: Vec<PathBuf> = ["mxfp4", "mixed", "mxfp6"].map(path).into();
    let options = EvalOptions {
        baseline: Some(rustdoc_6m()),
        texts: vec![rustdoc_6m().join("heldout.txt")],
        windows: 8,
        ..EvalOptions::new(checkpoints)
    };
    let evaluation = evaluate(&options, &mut |_| ()).unwrap();
    let divergence = |name: &str| {
        let model = evaluation.models.iter().find(|model| model.checkpoint.ends_with(name)).unwrap();
        model.texts[0].divergence.as_ref().unwrap().kl_mean
    };
    let (small, mixed, large) = (divergence("mxfp4"), divergence("mixed"), divergence("mxfp6"));
    // 5 bits are three eighths of the way from 4.25 to 6.25.
    assert!(mixed < small - 0.5 * (small - large), "{small} {mixed} {large}");
}

/// Calibrated, for activations in MX, beside a module that the user chose a format for; a page tells of it.
#[test]
fn mixes_are_calibrated_around_what_the_user_chose() {
    let root = tempfile::tempdir().unwrap();
    let calibration = calibration(root.path());
    let (output, report) = (root.path().join("mixed"), root.path().join("report"));
    let (page, json) = (report.with_extension("html"), report.with_extension("json"));
    let reports = ["--report", page.to_str().unwrap(), "--report", json.to_str().unwrap()];
    let auto =
        ["-f", "auto:mxfp8", "--bits", "4.75", "--layer", "*.0.mlp.down_proj=mxfp8", "--layout", "quark"];
    convert(&with(&[&auto[..], &reports].concat(), &calibration), &output);
    let checkpoint = Checkpoint::open(&output).unwrap();
    let scheme = |module: &str| checkpoint.linear(module).unwrap().scheme().unwrap();
    assert_eq!(scheme("model.layers.0.mlp.down_proj").to_string(), "mxfp8_e4m3");
    for layer in 0..LAYERS {
        let of = |module: &str| scheme(&format!("model.layers.{layer}.{module}")).to_string();
        assert!(of("mlp.gate_proj").ends_with(":mxfp8_e4m3"));
        assert_eq!(of("mlp.gate_proj"), of("mlp.up_proj"));
        assert_eq!(of("self_attn.q_proj"), of("self_attn.k_proj"));
        assert_eq!(of("self_attn.q_proj"), of("self_attn.v_proj"));
    }
    let report: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert_eq!(report["calibration"]["method"], "gptq");
    let mix = &report["mix"];
    assert!(mix["bits"].as_f64().unwrap() <= 4.75 && mix["predicted_divergence"].as_f64().unwrap() > 0.0);
    // Quark has no place for integers.
    assert!(!mix["formats"].as_array().unwrap().iter().any(|format| format == "mxint8"));
    let groups = mix["groups"].as_array().unwrap();
    assert_eq!(groups.len(), 4 * LAYERS - 1);
    assert!(std::fs::read_to_string(page).unwrap().contains("<h2>The mix</h2>"));
}

/// The smallest mix within a bound on the perplexity; what cannot be reached is said.
#[test]
fn budgets_follow_from_a_bound_on_the_perplexity() {
    let root = tempfile::tempdir().unwrap();
    let calibration = flags(&rustdoc_6m().join("heldout.txt"));
    let (output, json) = (root.path().join("mixed"), root.path().join("report.json"));
    let bound = ["-f", "auto", "--method", "nearest", "--max-ppl-increase"];
    let report = ["0.3%", "--report", json.to_str().unwrap()];
    convert(&with(&[&bound[..], &report].concat(), &calibration), &output);
    let report: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    let (bits, _) = bits(&output);
    let trials: Vec<(f64, f64)> = report["mix"]["trials"]
        .as_array()
        .unwrap()
        .iter()
        .map(|trial| (trial["bits"].as_f64().unwrap(), trial["increase"].as_f64().unwrap()))
        .collect();
    let good = trials.iter().filter(|(_, increase)| *increase <= 0.003).map(|(bits, _)| *bits);
    let best = good.reduce(f64::min).unwrap();
    assert!((best - bits).abs() < 1e-9 && bits < 8.0, "{best} {bits}");
    assert!(trials.iter().any(|(bits, increase)| *increase > 0.003 && *bits < best && best - bits < 0.2));

    let four_bits = ["0.01%", "--candidates", "mxfp4,mxint4"];
    let message = refused(&with(&[&bound[..], &four_bits].concat(), &calibration), &root.path().join("no"));
    assert!(message.contains("--max-ppl-increase 0.01%") && message.contains("4.25 bits"), "{message}");
}

/// Without a text, the errors of the weights decide.
#[test]
fn mixes_need_no_text() {
    let root = tempfile::tempdir().unwrap();
    let output = root.path().join("mixed");
    convert(&["-f", "auto", "--bits", "6"], &output);
    let (average, formats) = bits(&output);
    assert!(average <= 6.0 && average > 5.8 && formats.len() > 1, "{average} {formats:?}");
}

#[test]
fn mistakes_are_named() {
    let root = tempfile::tempdir().unwrap();
    let (output, recipe) = (root.path().join("mixed"), root.path().join("recipe.json"));
    let auto = ["-f", "auto", "--bits"];
    let message = refused(&[&auto[..], &["4"]].concat(), &output);
    assert!(message.contains("--bits 4: the smallest mix of these formats takes 4.250"), "{message}");
    let quark = ["5", "--layout", "quark", "--candidates", "mxfp4,mxint8"];
    let message = refused(&[&auto[..], &quark].concat(), &output);
    assert!(message.contains("--layout quark has no place for mxint8"), "{message}");
    let message = refused(&[&auto[..], &["5", "--layer", "*_proj=mxfp4"]].concat(), &output);
    assert!(message.contains("--format auto") && message.contains("--layer"), "{message}");

    let by_recipe = |content: &str| {
        std::fs::write(&recipe, content).unwrap();
        refused(&["--recipe", recipe.to_str().unwrap()], &output)
    };
    let message = by_recipe("{\"format\": \"mxfp4\",\n \"layers\": {\"*.down_proj\": \"mxfp5\"}}");
    assert!(message.contains("recipe.json") && message.contains("mxfp5"), "{message}");
    assert!(message.contains("'*.down_proj'") && message.contains("line 2"), "{message}");
    let message = by_recipe("{\"format\": \"mxfp4\", \"layers\": {\"model.layers.99.*\": \"mxfp6\"}}");
    assert!(message.contains("recipe.json") && message.contains("'model.layers.99.*'"), "{message}");
    let message = refused(&["--recipe", root.path().join("none").to_str().unwrap()], &output);
    assert!(message.contains("none"), "{message}");
}

//! `mxconvert eval`: checkpoints side by side.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::common::{convert_to, rustdoc_6m};

fn eval(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mxconvert")).arg("eval").args(args).output().unwrap()
}

/// The JSON that a successful run prints.
fn measured(args: &[&str]) -> Value {
    let output = eval(&[args, &["--json"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn heldout() -> String {
    path(&rustdoc_6m().join("heldout.txt"))
}

fn path(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// A converted model in `root`.
fn converted(root: &Path, format: &str) -> PathBuf {
    let output = root.join(format);
    convert_to(&rustdoc_6m(), &output, format).unwrap();
    output
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn checkpoints_caches_and_activations_side_by_side() {
    let root = tempfile::tempdir().unwrap();
    let (original, packed) = (path(&rustdoc_6m()), path(&converted(root.path(), "mxfp4")));
    let text = heldout();
    let common = ["--text", text.as_str(), "--windows", "2"];
    let args = [
        &common,
        &[&packed, &original, "--kv-cache-dtype", "f32,mxfp4", "--activation", "declared,mxfp6"][..],
    ];
    let result = measured(&args.concat());
    assert_eq!(result["baseline"], original.as_str());
    let models = result["models"].as_array().unwrap();
    let row = |i: usize| (models[i]["format"].as_str().unwrap(), models[i]["kv_cache"].as_str().unwrap());
    assert_eq!(
        (0..models.len()).map(row).collect::<Vec<_>>(),
        [
            ("unquantized", "f32"),
            ("mxfp4", "f32"),
            ("mxfp4", "mxfp4"),
            ("mxfp4:mxfp6_e2m3", "f32"),
            ("mxfp4:mxfp6_e2m3", "mxfp4"),
            ("unquantized", "mxfp4"),
        ]
    );
    assert_eq!(number(&models[0]["bits_per_weight"]), 16.0);
    assert_eq!(number(&models[1]["bits_per_weight"]), 4.25);
    assert!(models[0]["texts"][0]["divergence"].is_null());
    let kl = |i: usize| number(&models[i]["texts"][0]["divergence"]["kl_mean"]);
    assert!(kl(1) < kl(2) && kl(1) < kl(3) && kl(3) < kl(4) && kl(5) < kl(2), "{models:?}");

    // A chosen activation format is what a checkpoint that declares it runs.
    let declared = path(&converted(root.path(), "w4a6"));
    let alone = measured(&[&common[..], &[&declared]].concat());
    assert!(alone["baseline"].is_null());
    assert_eq!(alone["models"][0]["texts"][0]["nll"], models[3]["texts"][0]["nll"]);

    let table = eval(&[&common[..], &[&declared, "--baseline", &original]].concat());
    let table = String::from_utf8(table.stdout).unwrap();
    let lines: Vec<_> = table.lines().collect();
    assert_eq!(lines[0], "heldout.txt: 2 windows of 512 tokens, 1022 scored");
    assert!(lines[1].starts_with("checkpoint") && lines[1].ends_with("same top-1"), "{table}");
    assert!(lines[2].starts_with(&original) && lines[3].contains("mxfp4:mxfp6_e2m3"), "{table}");
    assert_eq!(lines.len(), 4);
}

#[test]
fn tasks_are_answered_by_likelihood() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("continuations.jsonl");
    // The text's own continuations against the same words in other orders: a language model knows.
    let text = std::fs::read_to_string(heldout()).unwrap();
    let words: Vec<_> = text.split_whitespace().collect();
    let lines: String = (0..24)
        .map(|i| {
            let part = |start: usize, length: usize| words[start..start + length].join(" ");
            let mut reversed = words[900 * i + 40..][..8].to_vec();
            reversed.reverse();
            let swapped = format!("{} {}", part(900 * i + 44, 4), part(900 * i + 40, 4));
            let endings = [reversed.join(" "), part(900 * i + 40, 8), swapped];
            let line = json!({"ctx": part(900 * i, 40), "endings": endings, "label": 1});
            format!("{line}\n")
        })
        .collect();
    std::fs::write(&file, lines).unwrap();
    let (original, packed) = (path(&rustdoc_6m()), path(&converted(root.path(), "mxint8")));
    let result = measured(&[&original, &packed, "--tasks", &path(&file)]);
    let task = |i: usize| &result["models"][i]["tasks"][0];
    assert_eq!(task(0)["task"], "continuations");
    assert_eq!(task(0)["items"], 24);
    assert!(number(&task(0)["accuracy_normalized"]) > 0.5, "{result}");
    assert!(task(0)["same_answers"].is_null());
    assert!(number(&task(1)["same_answers"]) > 0.9);
    let first = measured(&[&original, "--tasks", &path(&file), "--max-questions", "5"]);
    assert_eq!(first["models"][0]["tasks"][0]["items"], 5);
}

#[test]
fn what_cannot_be_measured_is_one_line() {
    let root = tempfile::tempdir().unwrap();
    let (original, text) = (path(&rustdoc_6m()), heldout());
    let fails = |args: &[&str], parts: &[&str]| {
        let output = eval(args);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {error}");
        let error = error.lines().last().unwrap_or_default();
        assert!(error.starts_with("error: "), "{args:?}: {error}");
        for part in parts {
            assert!(error.contains(part), "{args:?}: {error}");
        }
    };
    fails(&[&original], &["--text"]);
    fails(&[&original, "--text", "nowhere.txt"], &["nowhere.txt"]);
    fails(&[&original, "--text", &text, "--windows", "500"], &["heldout.txt", "500 windows"]);
    fails(&[&original, "--text", &text, "--window-tokens", "1"], &["--window-tokens", "2 or more"]);
    fails(
        &[&original, "--text", &text, "--window-tokens", "2000", "--windows", "1"],
        &["2000", "1024", "context"],
    );
    fails(&[&original, "--text", &text, "--kv-cache-dtype", "fp8"], &["fp8", "mxfp8"]);
    fails(&[&original, "--text", &text, "--activation", "fp8"], &["fp8", "mxfp8"]);
    fails(&["nowhere", "--text", &text], &["nowhere"]);

    // Another tokenizer: the same tokens in another order.
    let other = root.path().join("other");
    std::fs::create_dir(&other).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(rustdoc_6m().join(name), other.join(name)).unwrap();
    }
    let tokenizer = std::fs::read(rustdoc_6m().join("tokenizer.json")).unwrap();
    let mut tokenizer: Value = serde_json::from_slice(&tokenizer).unwrap();
    tokenizer["pre_tokenizer"] = Value::Null;
    std::fs::write(other.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fails(&[&original, &path(&other), "--text", &text], &["other", "tokenizer"]);
}

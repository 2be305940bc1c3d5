//! The program: exit codes, one-line errors, atomic output.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use safetensors::Dtype;
use serde_json::Value;

use crate::common::{convert_to, names, rustdoc_6m, tiny_config, tiny_llama, write_model};

fn mxconvert(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mxconvert")).args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Asserts exit code 1, one line that starts with `error:` and holds `parts`; returns it.
fn fails(args: &[&str], parts: &[&str]) {
    let output = mxconvert(args);
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {error}");
    assert_eq!(error.trim_end().lines().count(), 1, "{args:?}: {error}");
    assert!(error.starts_with("error: "), "{args:?}: {error}");
    for part in parts {
        assert!(error.contains(part), "{args:?}: {error}");
    }
}

fn tiny(root: &Path) -> String {
    let model = root.join("tiny");
    write_model(&model, &tiny_config(), &tiny_llama(Dtype::BF16), 1);
    model.to_str().unwrap().to_owned()
}

#[test]
fn the_default_output_lies_beside_the_model() {
    let root = tempfile::tempdir().unwrap();
    let model = tiny(root.path());
    let output = mxconvert(&[&model, "--format", "w4a6"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let table = text(&output.stdout);
    assert!(
        table.contains("mxfp4:mxfp6_e2m3") && table.contains("4.25") && table.contains("SQNR"),
        "{table}"
    );
    assert_eq!(names(root.path()), ["tiny", "tiny-w4a6"]);
}

#[test]
fn mistakes_on_the_command_line_are_one_line() {
    let root = tempfile::tempdir().unwrap();
    let model = &tiny(root.path());
    fails(&[model], &["--format"]);
    fails(&[model, "--format", "mxfp5"], &["mxfp5", "--format", "mxfp4"]);
    fails(&[model, "--format", "mxfp4:nvfp4"], &["mxfp4:nvfp4"]);
    fails(&[model, "--format", "mxfp4", "--scale-rounding", "up"], &["--scale-rounding", "up", "rceil"]);
    fails(&[model, "--format", "mxfp4", "--layer", "*down=mxfp8"], &["--layer", "*down"]);
    fails(&[model, "--format", "mxfp4", "--layer", "*down_proj"], &["--layer", "PATTERN=FORMAT"]);
    fails(&[model, "--format", "mxfp4", "--layer", "re:(=mxfp8"], &["--layer", "re:("]);
    fails(&[model, "--format", "mxfp4", "--exclude", "model.layers.7.*"], &["--exclude", "model.layers.7.*"]);
    fails(&[model, "--format", "mxint8", "--layout", "quark"], &["--layout quark", "mxint8"]);
    fails(&[model, "--format", "mxfp4", "--layout", "gguf"], &["--layout", "gguf"]);
    fails(&[model, "--format", "mxfp4", "--method", "gptq"], &["--method", "gptq"]);
    fails(&[model, "--format", "mxfp4", "--max-shard-size", "5XB"], &["--max-shard-size", "5XB"]);
    fails(&[model, "--format", "mxfp4", "--threads", "0"], &["--threads"]);
    fails(&["inspect", "nowhere"], &["nowhere"]);
    fails(&["nowhere", "--format", "mxfp4"], &["error: nowhere: No such file or directory (os error 2)\n"]);
    assert_eq!(names(root.path()), ["tiny"]);
}

#[test]
fn an_existing_output_is_replaced_only_by_force() {
    let root = tempfile::tempdir().unwrap();
    let model = &tiny(root.path());
    let out = root.path().join("out");
    let out_arg = out.to_str().unwrap();
    assert!(mxconvert(&[model, "--format", "mxfp4", "-o", out_arg]).status.success());
    let first = std::fs::read(out.join("model.safetensors")).unwrap();
    fails(&[model, "--format", "mxfp8", "-o", out_arg], &["out", "--force"]);
    assert_eq!(std::fs::read(out.join("model.safetensors")).unwrap(), first);
    // A conversion that fails leaves the old one.
    fails(&[model, "--format", "mxint8", "--layout", "quark", "--force", "-o", out_arg], &["mxint8"]);
    assert_eq!(std::fs::read(out.join("model.safetensors")).unwrap(), first);
    assert!(mxconvert(&[model, "--format", "mxfp8", "--force", "-o", out_arg]).status.success());
    assert_ne!(std::fs::read(out.join("model.safetensors")).unwrap(), first);
    assert_eq!(names(root.path()), ["out", "tiny"]);

    fails(&[model, "--format", "mxfp8", "--force", "-o", model], &["tiny"]);
    std::fs::write(root.path().join("file"), "mine").unwrap();
    let file = root.path().join("file");
    fails(&[model, "--format", "mxfp8", "--force", "-o", file.to_str().unwrap()], &["file"]);
}

#[test]
fn a_dry_run_writes_nothing() {
    let root = tempfile::tempdir().unwrap();
    let model = &tiny(root.path());
    let output = mxconvert(&[model, "--format", "mxfp4", "--dry-run"]);
    assert!(output.status.success());
    assert!(text(&output.stdout).contains("nothing written"));
    assert_eq!(names(root.path()), ["tiny"]);
}

#[test]
fn reports_hold_every_tensor() {
    let root = tempfile::tempdir().unwrap();
    let model = &tiny(root.path());
    let report = root.path().join("report.json");
    let args =
        [model, "--format", "mxfp4", "--layer", "*down_proj=mxint8", "--report", report.to_str().unwrap()];
    assert!(mxconvert(&args).status.success());
    let report: Value = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    let tensors = report["tensors"].as_array().unwrap();
    assert_eq!(tensors.len(), tiny_llama(Dtype::BF16).len());
    let quantized: Vec<&Value> = tensors.iter().filter(|t| t["scheme"] != "unquantized").collect();
    assert_eq!(quantized.len(), 14);
    for tensor in quantized {
        let expected = if tensor["scheme"] == "mxint8" { 35.0..50.0 } else { 15.0..25.0 };
        assert!(expected.contains(&tensor["sqnr_db"].as_f64().unwrap()), "{tensor}");
    }
    assert_eq!(report["layout"], "ocp-mx");
    let sum: u64 = tensors.iter().map(|t| t["bytes_after"].as_u64().unwrap()).sum();
    assert_eq!(report["total"]["bytes_after"], sum);
}

#[test]
fn mixed_fused_projections_are_warned_about() {
    let root = tempfile::tempdir().unwrap();
    let output = mxconvert(&[&tiny(root.path()), "--format", "mxfp4", "--layer", "*.v_proj=mxfp6"]);
    assert!(output.status.success());
    let warning = text(&output.stderr);
    assert!(warning.contains("warning: q_proj, k_proj, v_proj differ"), "{warning}");
}

#[test]
fn inspect_says_what_a_checkpoint_holds() {
    let root = tempfile::tempdir().unwrap();
    let model = &tiny(root.path());
    let out = root.path().join("out");
    let inspect = |dir: &str| -> Value {
        let output = mxconvert(&["inspect", dir, "--json"]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let find = |inspection: &Value, name: &str| -> Value {
        inspection["groups"].as_array().unwrap().iter().find(|g| g["name"] == name).unwrap().clone()
    };
    let plain = inspect(model);
    assert_eq!(plain["dialect"], Value::Null);
    assert_eq!(find(&plain, "model.layers.*.mlp.up_proj")["format"], "BF16");
    for (layout, format, bits) in [
        ("quark", "mxfp4", 4.25),
        ("compressed-tensors", "mxfp4", 4.25),
        ("compressed-tensors", "mxfp6", 6.25),
        ("compressed-tensors", "mxfp8", 8.25),
        ("ocp-mx", "mxint8", 8.25),
    ] {
        let args = [model, "--format", format, "--layout", layout, "--force", "-o", out.to_str().unwrap()];
        assert!(mxconvert(&args).status.success());
        let packed = inspect(out.to_str().unwrap());
        assert_eq!(packed["dialect"], layout);
        let group = find(&packed, "model.layers.*.mlp.up_proj");
        assert_eq!(group["tensors"], 2);
        assert_eq!(group["bits_per_weight"], bits);
        assert!((group["ratio_to_bf16"].as_f64().unwrap() - 16.0 / bits).abs() < 1e-9, "{group}");
        assert_eq!(find(&packed, "model.layers.*.input_layernorm")["format"], "BF16");
        assert_eq!(packed["total"]["elements"], plain["total"]["elements"]);
    }
    let table = text(&mxconvert(&["inspect", out.to_str().unwrap()]).stdout);
    assert!(table.contains("mxint8") && table.contains("8.25") && table.contains("1.94x"), "{table}");
}

/// A model of 400 MB of zeros, which a file system with holes stores in a few kilobytes.
fn large_model(dir: &Path) {
    const LAYERS: usize = 50;
    let (rows, cols) = (2048_usize, 2048_usize);
    let bytes = rows * cols * 2;
    let mut header = serde_json::Map::new();
    for layer in 0..LAYERS {
        header.insert(
            format!("model.layers.{layer}.mlp.up_proj.weight"),
            serde_json::json!({"dtype": "BF16", "shape": [rows, cols], "data_offsets": [layer * bytes, (layer + 1) * bytes]}),
        );
    }
    let header = Value::Object(header).to_string();
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("config.json"), "{\"tie_word_embeddings\": false}").unwrap();
    let path = dir.join("model.safetensors");
    std::fs::write(&path, [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat()).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len((8 + header.len() + LAYERS * bytes) as u64).unwrap();
}

#[test]
fn killed_half_way_nothing_that_looks_like_a_checkpoint_is_left() {
    let root = tempfile::tempdir().unwrap();
    let model = root.path().join("large");
    large_model(&model);
    let args = [model.to_str().unwrap(), "--format", "mxfp4", "--threads", "1"];
    let mut child = Command::new(env!("CARGO_BIN_EXE_mxconvert"))
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let partial = || {
        let found = names(root.path()).into_iter().find(|n| n.starts_with(".large-mxfp4.partial-"));
        found.map(|name| root.path().join(name))
    };
    let deadline = Instant::now() + Duration::from_secs(60);
    while partial().is_none_or(|dir| !dir.join("model.safetensors").exists()) {
        assert!(Instant::now() < deadline, "the conversion does not begin");
        assert!(child.try_wait().unwrap().is_none(), "the conversion ended before it could be killed");
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    assert!(!child.wait().unwrap().success());

    let left = partial().unwrap();
    assert!(!root.path().join("large-mxfp4").exists());
    assert!(!left.join("config.json").exists());
    assert!(models::checkpoint::Checkpoint::open(&left).is_err());

    let output = mxconvert(&args);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(names(root.path()), ["large", "large-mxfp4"], "the killed run's folder is gone");
    models::checkpoint::Checkpoint::open(&root.path().join("large-mxfp4")).unwrap();
}

#[test]
fn conversions_to_one_name_do_not_disturb_each_other() {
    const FORMATS: [&str; 3] = ["mxfp4", "mxfp6", "mxfp8"];
    let root = tempfile::tempdir().unwrap();
    let model = rustdoc_6m();
    let read = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
    let expected: Vec<Vec<u8>> = FORMATS
        .iter()
        .map(|format| {
            let dir = root.path().join(format);
            convert_to(&model, &dir, format).unwrap();
            read(&dir)
        })
        .collect();
    for force in [false, true] {
        let folder = root.path().join(format!("force-{force}"));
        std::fs::create_dir(&folder).unwrap();
        let output = folder.join("out");
        let run = |format: &str| {
            let paths = [model.to_str().unwrap(), output.to_str().unwrap()];
            let mut args = vec![paths[0], "--format", format, "-o", paths[1]];
            args.extend(force.then_some("--force"));
            mxconvert(&args)
        };
        let results: Vec<Output> = std::thread::scope(|scope| {
            let threads: Vec<_> = FORMATS.iter().map(|format| scope.spawn(|| run(format))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let (winners, losers): (Vec<usize>, Vec<usize>) =
            (0..FORMATS.len()).partition(|&i| results[i].status.success());
        if force {
            assert!(losers.is_empty(), "{}", text(&results[losers[0]].stderr));
        } else {
            assert_eq!(winners.len(), 1, "the name is given once");
            for loser in losers {
                let error = text(&results[loser].stderr);
                assert!(error.contains("exists already"), "{error}");
            }
        }
        let bytes = read(&output);
        assert!(winners.iter().any(|&i| bytes == expected[i]), "whole, and of one that succeeded");
        assert_eq!(names(&folder), ["out"], "nothing else is left");
        assert_eq!(names(&output), names(&root.path().join("mxfp4")), "nothing else is in it");
    }
}

#[test]
fn reports_that_cannot_be_written_are_refused_before_the_work() {
    let root = tempfile::tempdir().unwrap();
    let model = &tiny(root.path());
    let missing = root.path().join("nowhere/report.json");
    fails(&[model, "--format", "mxfp4", "--report", missing.to_str().unwrap()], &["--report", "nowhere"]);
    let inside = root.path().join("tiny-mxfp4/report.json");
    fails(
        &[model, "--format", "mxfp4", "--report", inside.to_str().unwrap()],
        &["--report", "in the output"],
    );
    // A conversion that fails leaves no empty report.
    let report = root.path().join("report.json");
    let args = [model, "--format", "mxint8", "--layout", "quark", "--report", report.to_str().unwrap()];
    fails(&args, &["--layout quark"]);
    assert_eq!(names(root.path()), ["tiny"]);
}

#[test]
fn a_dry_run_checks_the_output() {
    let root = tempfile::tempdir().unwrap();
    let model = &tiny(root.path());
    let out = root.path().join("out");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("thesis.tex"), "mine").unwrap();
    let args = [model, "--format", "mxfp4", "--dry-run", "-o", out.to_str().unwrap()];
    fails(&args, &["out", "--force"]);
    fails(&[&args[..], &["--force"]].concat(), &["out", "thesis.tex"]);
}

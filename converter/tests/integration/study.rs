//! `mxconvert study`, and reports as HTML pages.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::common::{convert_to, rustdoc_6m};

fn mxconvert(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mxconvert")).args(args).output().unwrap()
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

/// One file, no script, nothing from elsewhere, every element closed.
fn check_page(html: &str) {
    assert!(html.starts_with("<!doctype html>") && html.contains("<html lang=\"en\">"));
    for absent in ["<script", "http:", "https:", "url(", "@import", "NaN", "inf "] {
        assert!(!html.contains(absent), "{absent}");
    }
    for element in ["table", "tr", "td", "th", "figure", "svg", "p", "h2", "circle", "title"] {
        let open =
            html.matches(&format!("<{element}>")).count() + html.matches(&format!("<{element} ")).count();
        let start = format!("<{element} ");
        let attributes = html.split(start.as_str()).skip(1).filter_map(|rest| rest.split('>').next());
        let empty = attributes.filter(|attributes| attributes.ends_with('/'));
        assert_eq!(open - empty.count(), html.matches(&format!("</{element}>")).count(), "{element}");
    }
}

#[test]
fn a_study_of_weights_and_activations() {
    let root = tempfile::tempdir().unwrap();
    let page = root.path().join("study.html");
    let (model, heldout) = (rustdoc_6m(), rustdoc_6m().join("heldout.txt"));
    let args = ["study", model.to_str().unwrap(), "--text", heldout.to_str().unwrap(), "--layers", "1"];
    let output = mxconvert(&[&args[..], &["--output", page.to_str().unwrap()]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let html = text(&page);
    check_page(&html);
    assert!(html.matches("<figure>").count() >= 10 && html.contains("prefers-color-scheme:dark"));

    let study: Value = serde_json::from_str(&text(&root.path().join("study.json"))).unwrap();
    let outcomes = study["outcomes"].as_array().unwrap();
    let find = |element: &str, rule: &str, block: u64| {
        let is = |outcome: &&Value| {
            outcome["element"] == element
                && outcome["scale_rounding"] == rule
                && outcome["block"] == block
                && outcome["rounding"] == "nearest"
                && outcome["symmetry"] == "symmetric"
                && outcome["organisation"] == "1xk"
        };
        outcomes.iter().find(is).unwrap()
    };
    let sqnr = |outcome: &Value, operand: &str| outcome[operand]["sqnr_db"].as_f64().unwrap();
    for operand in ["weights", "activations"] {
        // A bit of mantissa is 6 dB; more bits, smaller blocks and a search never lose.
        let ratio = |element, rule, block| sqnr(find(element, rule, block), operand);
        assert!(ratio("mxint8", "even", 32) > ratio("mxfp6_e2m3", "even", 32) + 6.0);
        assert!(ratio("mxfp6_e2m3", "even", 32) > ratio("mxfp4", "even", 32) + 6.0);
        assert!(ratio("mxint4", "floor", 8) > ratio("mxint4", "floor", 128) + 1.0);
        assert!(ratio("mxfp4", "mse", 32) >= ratio("mxfp4", "even", 32));
    }
    // The conversion itself measures the same weights, all of them.
    let report = convert_to(&model, &root.path().join("packed"), "mxfp4").unwrap();
    let whole = report.formats[0].sqnr_db.unwrap();
    assert!((sqnr(find("mxfp4", "even", 32), "weights") - whole).abs() < 0.5, "{whole}");
    assert_eq!(study["findings"].as_array().unwrap().len(), 6);
}

#[test]
fn what_cannot_be_studied_is_one_line() {
    let root = tempfile::tempdir().unwrap();
    let packed = root.path().join("packed");
    convert_to(&rustdoc_6m(), &packed, "mxfp6").unwrap();
    let page = root.path().join("study.html");
    let fails = |args: &[&str], part: &str| {
        let output = mxconvert(&[&["study", "--output", page.to_str().unwrap()], args].concat());
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(
            error.starts_with("error: ") && error.contains(part) && error.lines().count() == 1,
            "{error}"
        );
        assert!(!page.exists());
    };
    fails(&[packed.to_str().unwrap()], "packed: quantized");
    fails(&["nowhere"], "nowhere");
    fails(&[rustdoc_6m().to_str().unwrap(), "--text", "nowhere.txt"], "nowhere.txt");
    fails(&[rustdoc_6m().to_str().unwrap(), "--layers", "0"], "--layers");
}

#[test]
fn a_conversion_as_a_page_with_what_it_costs() {
    let root = tempfile::tempdir().unwrap();
    let (page, json, output) =
        (root.path().join("report.html"), root.path().join("report.json"), root.path().join("packed"));
    let (model, heldout) = (rustdoc_6m(), rustdoc_6m().join("heldout.txt"));
    let [page_arg, json_arg, output_arg, model, heldout] =
        [&page, &json, &output, &model, &heldout].map(|path| path.to_str().unwrap());
    let args = [model, "--format", "mxfp4", "--output", output_arg, "--layer", "*.2.mlp.down_proj=mxfp8"];
    let result = mxconvert(
        &[&args[..], &["--report", page_arg, "--report", json_arg, "--evaluate", heldout]].concat(),
    );
    assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
    let html = text(&page);
    check_page(&html);
    assert!(html.contains("<td class=\"best\">mxfp8_e4m3</td>"), "the module that differs is marked");
    let report: Value = serde_json::from_str(&text(&json)).unwrap();
    let models = report["evaluation"]["models"].as_array().unwrap();
    let perplexity = |i: usize| models[i]["texts"][0]["perplexity"].as_f64().unwrap();
    assert!((perplexity(0) - 34.4347).abs() < 0.005 && perplexity(1) > perplexity(0), "{models:?}");
    assert!(html.contains(&format!("<td>{:.4}</td>", perplexity(1))));
    assert!(String::from_utf8(result.stdout).unwrap().contains("same top-1"));
}

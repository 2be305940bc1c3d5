//! Perplexity against the reference of `tests/golden/ppl_rustdoc_6m.json`.

use std::num::NonZeroUsize;
use std::path::Path;

use converter::TextTokenizer;
use converter::eval::{Baseline, Perplexity, Windows, divergence, perplexity};
use kernels::{Device, KvCacheDtype};
use models::checkpoint::Checkpoint;
use serde_json::Value;

use crate::common::{convert_to, rustdoc_6m};

const WINDOWS: usize = 10;
const WINDOW: usize = 512;

/// The reference's row of a scheme; `null` stands for the unquantized model.
fn reference(weight: Option<&str>, activation: Option<&str>, rounding: Option<&str>) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/ppl_rustdoc_6m.json");
    let file: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let is = |row: &Value, key: &str, value: Option<&str>| row[key].as_str() == value;
    let mut rows = file["schemes"].as_array().unwrap().iter();
    let row = rows.find(|row| {
        is(row, "weight", weight)
            && is(row, "activation", activation)
            && (weight.is_none() || is(row, "scale_rounding", rounding))
    });
    row.unwrap().clone()
}

pub(crate) fn windows() -> Windows {
    let tokenizer = TextTokenizer::open(&rustdoc_6m()).unwrap();
    Windows::read(&tokenizer, &rustdoc_6m().join("heldout.txt"), WINDOWS, WINDOW).unwrap()
}

pub(crate) fn measure(folder: &Path, windows: &Windows) -> Perplexity {
    let threads = NonZeroUsize::new(2).unwrap();
    let backend = kernels::open(Device::Cpu { threads: threads.get() }).unwrap();
    let model = models::load(&*backend, &Checkpoint::open(folder).unwrap()).unwrap();
    perplexity(&*backend, &*model, windows, KvCacheDtype::F32, threads).unwrap()
}

/// Compares the perplexity and every window.
fn check(actual: &Perplexity, expected: &Value, tolerance: f64) {
    let number = |value: &Value| value.as_f64().unwrap();
    let near = |actual: f64, expected: f64, what: &str| {
        assert!((actual / expected - 1.0).abs() < tolerance, "{what}: {actual}, reference {expected}");
    };
    near(actual.perplexity, number(&expected["perplexity"]), "perplexity");
    assert_eq!(actual.tokens, WINDOWS * (WINDOW - 1));
    let nll = expected["nll"].as_array().unwrap();
    assert_eq!(actual.nll.len(), nll.len());
    for (actual, expected) in actual.nll.iter().zip(nll) {
        near(*actual, number(expected), "window");
    }
}

#[test]
fn unquantized() {
    check(&measure(&rustdoc_6m(), &windows()), &reference(None, None, None), 1e-4);
}

#[test]
fn quantized() {
    let root = tempfile::tempdir().unwrap();
    let windows = windows();
    for (format, weight, activation, rounding, tolerance) in [
        ("mxfp4", "mxfp4", None, "even", 1e-4),
        ("w8a8", "mxfp8_e4m3", Some("mxfp8_e4m3"), "rceil", 2e-3),
        ("w4a6", "mxfp4", Some("mxfp6_e2m3"), "even", 2e-3),
    ] {
        let output = root.path().join(format);
        convert_to(&rustdoc_6m(), &output, format).unwrap();
        let expected = reference(Some(weight), activation, Some(rounding));
        check(&measure(&output, &windows), &expected, tolerance);
    }
}

#[test]
fn divergence_grows_with_what_is_lost_and_is_none_from_oneself() {
    let threads = NonZeroUsize::new(2).unwrap();
    let tokenizer = TextTokenizer::open(&rustdoc_6m()).unwrap();
    // No multiple of a step, nor of a chunk of logits.
    let windows = Windows::read(&tokenizer, &rustdoc_6m().join("heldout.txt"), 5, 150).unwrap();
    let backend = kernels::open(Device::Cpu { threads: 2 }).unwrap();
    let load = |folder: &Path| models::load(&*backend, &Checkpoint::open(folder).unwrap()).unwrap();
    let original = load(&rustdoc_6m());
    let (mut baseline, expected) = Baseline::measure(&*backend, &*original, &windows, threads).unwrap();
    let mut measure = |folder: &Path, kv_cache| {
        divergence(&*backend, &*load(folder), &windows, kv_cache, &mut baseline, threads).unwrap()
    };
    let (perplexity, itself) = measure(&rustdoc_6m(), KvCacheDtype::F32);
    assert_eq!(perplexity, expected);
    assert_eq!((itself.kl_mean, itself.top1_agreement), (0.0, 1.0));

    let root = tempfile::tempdir().unwrap();
    let mut last = 0.0;
    for format in ["mxint8", "mxfp6", "mxfp4", "w4a4"] {
        let output = root.path().join(format);
        convert_to(&rustdoc_6m(), &output, format).unwrap();
        let (_, loss) = measure(&output, KvCacheDtype::F32);
        assert!(loss.kl_mean > 2.0 * last, "{format}: {loss:?} after {last}");
        assert!(loss.kl_99th_percentile > loss.kl_mean && loss.top1_agreement < 1.0, "{loss:?}");
        last = loss.kl_mean;
    }
    let (_, cache) = measure(&rustdoc_6m(), KvCacheDtype::Mxfp4);
    assert!(cache.kl_mean > 0.0 && cache.top1_agreement < 1.0, "{cache:?}");
}

#[test]
fn texts_that_cannot_be_measured_are_refused_by_name() {
    let tokenizer = TextTokenizer::open(&rustdoc_6m()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let short = folder.path().join("short.txt");
    std::fs::write(&short, "A few words.").unwrap();
    let error = Windows::read(&tokenizer, &short, 2, 512).unwrap_err().to_string();
    assert!(error.contains("short.txt") && error.contains("take 1024"), "{error}");
    let missing = Windows::read(&tokenizer, &folder.path().join("none.txt"), 1, 8).unwrap_err();
    assert!(missing.to_string().contains("none.txt"));
    let binary = folder.path().join("binary");
    std::fs::write(&binary, [0xFF, 0xFE, 0x00]).unwrap();
    assert!(Windows::read(&tokenizer, &binary, 1, 8).unwrap_err().to_string().contains("binary"));
    let error = TextTokenizer::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json"), "{error}");
}

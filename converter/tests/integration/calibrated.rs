//! Calibrated conversions of a real small model.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use converter::calibrate::{Calibration, CalibrationReport};
use converter::plan::Recipe;
use converter::quantize::CalibratedMethod;
use converter::{ConvertError, Options, Report, convert};
use kernels::mx::ScaleRounding;

use crate::common::{files, names, rustdoc_6m};

/// Writes a text to calibrate on, of the kind that the model knows: this project's own sources.
pub(crate) fn text(dir: &Path) -> PathBuf {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels/src/mx");
    let mut paths: Vec<_> = std::fs::read_dir(sources).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let text: String = paths.iter().map(|path| std::fs::read_to_string(path).unwrap()).collect();
    let path = dir.join("text.txt");
    std::fs::write(&path, text).unwrap();
    path
}

fn options(format: &str, output: &Path, calibration: Calibration) -> Options {
    let recipe =
        Recipe { weight_scale_rounding: Some(ScaleRounding::Mse), ..Recipe::new(format.parse().unwrap()) };
    let calibration = Calibration { windows: 48, window_tokens: 128, ..calibration };
    Options { calibration: Some(calibration), ..Options::new(rustdoc_6m(), output, recipe) }
}

fn run(format: &str, root: &Path, calibration: Calibration) -> (Report, CalibrationReport) {
    let output = root.join(format.replace(':', "-"));
    let report = convert(&options(format, &output, calibration), &()).unwrap();
    let calibration = report.calibration.clone().unwrap();
    (report, calibration)
}

#[test]
fn calibration_lowers_output_errors_and_perplexity() {
    let root = tempfile::tempdir().unwrap();
    let text = text(root.path());
    for (format, drift_correction) in [("mxfp4", 0.0), ("mxfp4:mxfp6", 0.5)] {
        let calibration = Calibration { drift_correction, ..Calibration::new(CalibratedMethod::Gptq, &text) };
        let (_, calibration) = run(format, root.path(), calibration);
        let perplexity = calibration.perplexity;
        let divergence = calibration.divergence;
        assert!(perplexity.calibrated < perplexity.nearest, "{format}: {perplexity:?}");
        assert!(
            calibration.kept && divergence.calibrated < 0.9 * divergence.nearest,
            "{format}: {divergence:?}"
        );
        assert_eq!((calibration.windows, calibration.held_out), (45, 3));
        let gains = calibration.stages.iter().map(|stage| stage.nearest_db - stage.method_db);
        assert!(gains.sum::<f64>() > 0.0, "{format}");
        for stage in calibration.stages {
            let better = stage.method_db <= stage.nearest_db;
            assert_eq!(stage.kept, if better { "gptq" } else { "nearest" }, "{stage:?}");
            // Without what earlier modules left, every module gains.
            assert!(better || drift_correction > 0.0, "{format}: {stage:?}");
        }
    }
}

#[test]
fn error_diffusion_lowers_output_errors() {
    let root = tempfile::tempdir().unwrap();
    let text = text(root.path());
    let calibration = Calibration::new(CalibratedMethod::ErrorDiffusion, &text);
    let (report, calibration) =
        run("mxfp4", root.path(), Calibration { drift_correction: 0.0, ..calibration });
    let gains = calibration.stages.iter().map(|stage| stage.nearest_db - stage.method_db);
    assert!(gains.sum::<f64>() / calibration.stages.len() as f64 > 1.0);
    // What spreads errors is, element by element, further away than the nearest values.
    assert!(report.total.sqnr_db.unwrap() < 19.0);
}

/// Killed at some layer and run again, a conversion gives the same bytes, and leaves nothing else.
#[test]
fn a_killed_calibration_goes_on_where_it_was() {
    let root = tempfile::tempdir().unwrap();
    let text = text(root.path());
    let command = |output: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mxconvert"));
        command.arg(rustdoc_6m()).args([
            "-f",
            "mxfp4",
            "--calibration-windows",
            "48",
            "--calibration-window",
            "128",
        ]);
        command.arg("--calibration").arg(&text).arg("-o").arg(output);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        command
    };
    let (whole, killed) = (root.path().join("whole"), root.path().join("killed"));
    assert!(command(&whole).status().unwrap().success());

    let first_layer = root.path().join(".killed.calibration/layer-00000.safetensors");
    let mut child = command(&killed).spawn().unwrap();
    let patience = Instant::now() + Duration::from_secs(300);
    while !first_layer.exists() && Instant::now() < patience {
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(first_layer.exists() && !killed.exists(), "killed too late");
    let written = std::fs::metadata(&first_layer).unwrap().modified().unwrap();
    let mut child = command(&killed).spawn().unwrap();
    while !killed.exists() && child.try_wait().unwrap().is_none() {
        if let Ok(metadata) = std::fs::metadata(&first_layer) {
            assert_eq!(metadata.modified().unwrap(), written, "the first layer was made again");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(child.wait().unwrap().success());
    assert_eq!(files(&whole), files(&killed));
    assert_eq!(names(root.path()), ["killed", "text.txt", "whole"]);
}

#[test]
fn what_cannot_be_calibrated_is_said() {
    let root = tempfile::tempdir().unwrap();
    let text = text(root.path());
    let short = root.path().join("short.txt");
    std::fs::write(&short, "A few words.").unwrap();
    let fail = |calibration: Calibration| -> String {
        let recipe = Recipe::new("mxfp4".parse().unwrap());
        let options = Options {
            calibration: Some(calibration),
            ..Options::new(rustdoc_6m(), root.path().join("out"), recipe)
        };
        let error: ConvertError = convert(&options, &()).unwrap_err();
        assert!(!root.path().join("out").exists());
        error.to_string()
    };
    let gptq = |text: &Path| Calibration::new(CalibratedMethod::Gptq, text);
    assert!(fail(gptq(&short)).contains("short.txt: 4 tokens"), "{}", fail(gptq(&short)));
    assert!(fail(gptq(Path::new(""))).contains("--calibration FILE"));
    assert!(fail(gptq(Path::new("/nowhere.txt"))).contains("/nowhere.txt"));
    let long = Calibration { window_tokens: 1 << 20, ..gptq(&text) };
    assert!(fail(long).contains("--calibration-window 1048576"));
}

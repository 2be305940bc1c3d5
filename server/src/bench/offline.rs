//! Measures whole steps on a device, without HTTP and without a scheduler.

use std::io::Write;

use config::{ConfigError, ServerConfig, Settings};
use kernels::mx::Scheme;
use kernels::{Device, PlainRead};
use models::checkpoint::{Checkpoint, CheckpointError};
use models::{LinearInfo, ModelError, synthetic};

use super::BenchError;
use super::args::{ModelSource, OfflineBench, OutputFormat};
use super::measure::{Runs, repeat};
use super::plan::{Test, tests};
use super::report::{Table, write_json};
use super::statistics::Summary;
use crate::device::{self, ShareOfCpu};
use crate::engine::{EngineError, EngineOptions, OfflineBatch, OfflineSizes};

/// Why a model cannot be measured.
#[derive(Debug, thiserror::Error)]
pub enum OfflineBenchError {
    /// A flag has a value outside its range, or asks for a device that is not there.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The folder's files.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The device.
    #[error(transparent)]
    Device(#[from] kernels::Error),
    /// A knob that has no effect on the device.
    #[error(transparent)]
    Share(#[from] ShareOfCpu),
    /// Sequences too long for the model, or too little memory.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Runs all tests for each number of threads; writes each result when it is there.
pub(super) fn run(bench: &OfflineBench, format: OutputFormat, out: &mut dyn Write) -> Result<(), BenchError> {
    let tests = tests(bench);
    let mut table = Table::new(&[
        "model", "formats", "device", "test", "batch", "t/s", "median", "GB/s", "of read", "ms/step",
    ]);
    let mut records = Vec::new();
    for &threads in &bench.threads {
        let config = server_config(bench, threads).map_err(OfflineBenchError::from)?;
        let (mut offline, device, description) = load(&bench.model, &tests, &config)?;
        let model = ModelFacts::of(&bench.model, &offline, description);
        let plain_read = match device {
            Device::Cpu { threads } if tests.iter().any(Test::only_generates) => PlainRead::new(threads),
            _ => None,
        };
        for &test in &tests {
            let runs = repeat(&mut offline, test, bench.repetitions, bench.warmup, plain_read.as_ref());
            let result = TestResult::new(test, &runs, &model);
            match format {
                OutputFormat::Md => table.row(out, &result.cells(&model))?,
                OutputFormat::Json => records.push(result.json(&model, &runs)),
            }
        }
    }
    if format == OutputFormat::Json {
        write_json(out, records)?;
    }
    Ok(())
}

/// The server's settings that matter here, checked as the server checks them.
fn server_config(bench: &OfflineBench, threads: Option<usize>) -> Result<ServerConfig, ConfigError> {
    let settings = Settings {
        device: bench.device,
        threads,
        kv_cache_dtype: bench.kv_cache_dtype,
        max_num_batched_tokens: bench.max_num_batched_tokens,
        ..Settings::default()
    };
    ServerConfig::resolve(Settings::default(), settings)
}

/// The model on its device with room for the largest test, and the device, also in words.
fn load(
    source: &ModelSource,
    tests: &[Test],
    config: &ServerConfig,
) -> Result<(OfflineBatch, Device, String), OfflineBenchError> {
    let device = device::choose(config);
    let EngineOptions { max_num_batched_tokens, kv_cache_dtype, .. } =
        device::engine_options(config, device)?;
    let backend = kernels::open(device)?;
    let model = match source {
        ModelSource::Folder(folder) => models::load(backend.as_ref(), &Checkpoint::open(folder)?)?,
        ModelSource::Synthetic { shape, linears, head } => {
            let formats = synthetic::Formats { linears: *linears, head: *head };
            synthetic::load(backend.as_ref(), &shape.config(), formats)?
        }
    };
    let description = backend.description();
    let sizes = OfflineSizes {
        sequences: tests.iter().map(|test| test.batch).max().unwrap_or(1),
        tokens_per_sequence: tests.iter().map(Test::tokens_per_sequence).max().unwrap_or(1),
        max_num_batched_tokens,
        kv_cache_dtype,
    };
    Ok((OfflineBatch::new((backend, model), sizes)?, device, description))
}

/// What is the same for all tests of a model.
struct ModelFacts {
    name: String,
    formats: String,
    device: String,
    parameters: usize,
    /// Bytes of the linear layers and the head: what one decode step reads.
    linear_bytes: usize,
    /// Multiplications and additions per token in the decoder's linear layers.
    layer_operations: usize,
}

impl ModelFacts {
    fn of(source: &ModelSource, offline: &OfflineBatch, device: String) -> Self {
        let name = match source {
            ModelSource::Folder(folder) => {
                let name = folder.file_name().unwrap_or(folder.as_os_str());
                name.to_string_lossy().into_owned()
            }
            ModelSource::Synthetic { shape, .. } => shape.name.to_owned(),
        };
        let model = offline.model();
        let linears = model.linear_info();
        let (head, layers): (Vec<&LinearInfo>, Vec<&LinearInfo>) =
            linears.iter().partition(|linear| linear.group.ends_with("head"));
        Self {
            name,
            formats: format!("{}, head {}", schemes(&layers), schemes(&head)),
            device,
            parameters: model.parameters(),
            linear_bytes: linears.iter().map(|linear| linear.bytes).sum(),
            layer_operations: layers.iter().map(|linear| 2 * linear.parameters).sum(),
        }
    }
}

/// The schemes of `linears`, each once.
fn schemes(linears: &[&LinearInfo]) -> String {
    let name = |scheme: Option<Scheme>| scheme.map_or_else(|| "bf16".to_owned(), |scheme| scheme.to_string());
    let mut names: Vec<String> = linears.iter().map(|linear| name(linear.scheme)).collect();
    names.sort();
    names.dedup();
    names.join(" + ")
}

/// One test's outcome.
struct TestResult {
    test: Test,
    tokens_per_sec: Summary,
    /// Bytes of weights read per second; of tests that only generate.
    weight_bytes_per_sec: Option<f64>,
    /// Operations of linear layers per second; of tests that only compute prompts.
    operations_per_sec: Option<f64>,
    /// Bytes per second that the same threads read from memory between the runs; where that is what limits them.
    read_bytes_per_sec: Option<f64>,
    /// Seconds of one decode step; of tests that only generate.
    step_secs: Option<f64>,
}

impl TestResult {
    fn new(test: Test, runs: &Runs, model: &ModelFacts) -> Self {
        let rates: Vec<f64> = runs.seconds.iter().map(|seconds| test.tokens() as f64 / seconds).collect();
        let tokens_per_sec = Summary::of(&rates);
        let steps_per_sec = test.only_generates().then(|| tokens_per_sec.median / test.batch as f64);
        let operations = model.layer_operations as f64;
        Self {
            test,
            weight_bytes_per_sec: steps_per_sec.map(|rate| rate * model.linear_bytes as f64),
            read_bytes_per_sec: (!runs.reads.is_empty()).then(|| Summary::of(&runs.reads).median),
            operations_per_sec: (test.generated == 0).then_some(tokens_per_sec.median * operations),
            step_secs: steps_per_sec.map(f64::recip),
            tokens_per_sec,
        }
    }

    fn cells(&self, model: &ModelFacts) -> Vec<String> {
        let Summary { mean, std, median } = self.tokens_per_sec;
        let optional = |value: Option<f64>| value.map_or_else(String::new, |value| format!("{value:.2}"));
        vec![
            model.name.clone(),
            model.formats.clone(),
            model.device.clone(),
            self.test.to_string(),
            self.test.batch.to_string(),
            format!("{mean:.2} ± {std:.2}"),
            format!("{median:.2}"),
            optional(self.weight_bytes_per_sec.map(|rate| rate / 1e9)),
            self.share_of_read().map_or_else(String::new, |share| format!("{:.0} %", 100.0 * share)),
            optional(self.step_secs.map(|secs| secs * 1e3)),
        ]
    }

    /// Of a plain read, what the weights are read with.
    fn share_of_read(&self) -> Option<f64> {
        Some(self.weight_bytes_per_sec? / self.read_bytes_per_sec?)
    }

    fn json(&self, model: &ModelFacts, runs: &Runs) -> serde_json::Value {
        let Summary { mean, std, median } = self.tokens_per_sec;
        serde_json::json!({
            "model": model.name,
            "formats": model.formats,
            "device": model.device,
            "parameters": model.parameters,
            "linear_bytes": model.linear_bytes,
            "test": self.test.to_string(),
            "batch": self.test.batch,
            "depth": self.test.depth,
            "n_prompt": self.test.prompt,
            "n_gen": self.test.generated,
            "seconds": runs.seconds,
            "tokens_per_sec": { "mean": mean, "std": std, "median": median },
            "weight_bytes_per_sec": self.weight_bytes_per_sec,
            "read_bytes_per_sec": self.read_bytes_per_sec,
            "weight_bytes_per_token": self.test.only_generates()
                .then(|| model.linear_bytes as f64 / self.test.batch as f64),
            "layer_operations_per_sec": self.operations_per_sec,
        })
    }
}

//! One conversion, from the open source to the renamed output.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use half::bf16;
use kernels::DenseDtype;
use kernels::mx::{Cast, ElementRounding, Energy, Values};
use models::checkpoint::dense_dtype;
use models::checkpoint::quantization::Dialect;
use safetensors::Dtype;

use crate::calibrate::{self, CalibratedModules, Calibration};
use crate::error::ConvertError;
use crate::files::{self, Provenance};
use crate::finite::{self, first_non_finite};
use crate::layout;
use crate::output::{Output, Target};
use crate::plan::{Action, Plan, Recipe, plan};
use crate::progress::Progress;
use crate::quantize::{DirectCast, QuantizeError, Quantizer, Rows};
use crate::report::Report;
use crate::sink::Sink;
use crate::source::Source;
use crate::staging::{self, Staging};

/// What to convert, to what, and how.
#[derive(Debug, Clone)]
pub struct Options {
    /// A Hugging Face folder or a llama GGUF file.
    pub model: PathBuf,
    /// The folder to make.
    pub output: PathBuf,
    /// Formats and scale rules.
    pub recipe: Recipe,
    /// How to calibrate; `None` casts directly.
    pub calibration: Option<Calibration>,
    /// How elements are rounded, where they are cast directly.
    pub element_rounding: ElementRounding,
    /// JSON dialect; `None` is the default for the formats.
    pub layout: Option<Dialect>,
    /// Bytes of tensors in one safetensors file.
    pub max_shard_bytes: u64,
    /// Worker threads.
    pub threads: NonZeroUsize,
    /// Replace an existing checkpoint.
    pub force: bool,
    /// Plan, check and report, write nothing.
    pub dry_run: bool,
}

impl Options {
    /// Direct cast of `model` by `recipe`, all cores, into `output`, which must not exist.
    pub fn new(model: impl Into<PathBuf>, output: impl Into<PathBuf>, recipe: Recipe) -> Self {
        Self {
            model: model.into(),
            output: output.into(),
            recipe,
            calibration: None,
            element_rounding: ElementRounding::NearestEven,
            layout: None,
            max_shard_bytes: 5_000_000_000,
            threads: std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
            force: false,
            dry_run: false,
        }
    }
}

/// `MODEL-FORMAT` beside the model, without `.gguf`; the colon of a format pair becomes a dash.
pub fn default_output(model: &Path, format: &str) -> PathBuf {
    let named = if model.file_name().is_some() {
        model.to_owned()
    } else {
        // `.` or `..`: the folder's real name.
        std::fs::canonicalize(model).unwrap_or_else(|_| model.to_owned())
    };
    let name = named.file_name().unwrap_or_default().to_string_lossy();
    let stem = name.strip_suffix(".gguf").unwrap_or(&name);
    named.with_file_name(format!("{stem}-{}", format.replace(':', "-")))
}

/// Converts a checkpoint.
///
/// # Errors
/// See [`ConvertError`], also for what then has the output's name.
pub fn convert(options: &Options, progress: &dyn Progress) -> Result<Report, ConvertError> {
    let start = Instant::now();
    let source = Source::open(&options.model)?;
    let make_plan = |recipe: &Recipe| {
        plan(recipe, source.tensors(), source.traits())
            .map_err(|error| ConvertError::Plan { path: source.path_of(error.tensor()), error })
    };
    let mut plan = make_plan(&options.recipe)?;
    let layout = layout::choose(options.layout, &plan)?;
    let output = Output::new(&plan, source.tensors(), layout, options.max_shard_bytes);
    for warning in &plan.warnings {
        progress.warn(warning);
    }
    let mut report = Report::new(options, &source, &plan, &output, layout);
    if options.dry_run {
        let needed = output.total_bytes();
        staging::check_only(&options.output, &options.model, options.force, needed)?;
        return Ok(report);
    }

    let staging = Staging::begin(&options.output, &options.model, options.force)?;
    staging::check_space(staging.dir(), &options.output, output.total_bytes())?;
    let calibrated = match &options.calibration {
        None => None,
        Some(calibration) => {
            let (output, threads) = (&options.output, options.threads);
            let job = calibrate::Job { source: &source, plan: &plan, calibration, output, threads, progress };
            Some(job.run()?)
        }
    };
    let kept = calibrated.as_ref().filter(|(_, report)| report.kept).map(|(modules, _)| modules);
    if calibrated.is_some() && kept.is_none() {
        progress.warn(
            "calibration came out worse than direct cast on text held out: the weights are cast directly",
        );
        // Without the scale search that belongs to calibration.
        plan = make_plan(&Recipe { weight_scale_rounding: None, ..options.recipe.clone() })?;
    }

    let sink = Sink::create(staging.dir(), &output, &options.output)?;
    let direct = DirectCast { rounding: options.element_rounding };
    let job = Job {
        source: &source,
        plan: &plan,
        output: &output,
        sink: &sink,
        direct: &direct,
        calibrated: kept,
        progress,
    };
    let outcome = job.run(options.threads)?;
    sink.sync()?;
    report.calibration = calibrated.as_ref().map(|(_, report)| report.clone());
    report.finish(&outcome.energies, start.elapsed());
    let provenance = Provenance { options, layout, method: report.method(), sha256: &outcome.sha256 };
    for note in files::write(staging.dir(), &source, &plan, &output, &provenance, &report)? {
        progress.warn(&note);
    }
    staging.commit()?;
    if let Some((modules, _)) = calibrated {
        modules.remove();
    }
    progress.finish();
    Ok(report)
}

/// Everything the workers share.
struct Job<'a> {
    source: &'a Source,
    plan: &'a Plan,
    output: &'a Output,
    sink: &'a Sink,
    direct: &'a DirectCast,
    /// Weights that it holds come from there.
    calibrated: Option<&'a CalibratedModules>,
    progress: &'a dyn Progress,
}

/// What the workers found out.
struct Outcome {
    /// By planned tensor.
    energies: Vec<Energy>,
    /// Name and digest of each weight file.
    sha256: Vec<(String, String)>,
}

/// A unit of work.
enum Task {
    /// SHA-256 of a weight file.
    Hash(usize),
    /// A byte range of a planned tensor's source.
    Piece { tensor: usize, range: Range<u64> },
}

/// What a task yields.
enum Done {
    Hash(String),
    Piece(Energy),
}

/// A worker's buffers, reused from piece to piece.
#[derive(Default)]
struct Scratch {
    values: Vec<u8>,
    codes: Vec<u8>,
    scales: Vec<u8>,
}

impl Job<'_> {
    /// Runs all tasks; the first error, in task order, stops the workers.
    fn run(&self, threads: NonZeroUsize) -> Result<Outcome, ConvertError> {
        let files = self.source.weight_files();
        let tasks = self.tasks()?;
        let total = self.plan.tensors.iter().map(|t| self.source.tensors()[t.source].bytes()).sum();
        self.progress.begin(total);

        let next = AtomicUsize::new(0);
        let stop = AtomicBool::new(false);
        let results: Mutex<Vec<(usize, Result<Done, ConvertError>)>> = Mutex::new(Vec::new());
        let work = || {
            let mut scratch = Scratch::default();
            let mut done = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(task) = tasks.get(index) else { break };
                let result = match task {
                    Task::Hash(file) => files::sha256(&files[*file], &stop).map(Done::Hash),
                    Task::Piece { tensor, range } => {
                        self.piece(*tensor, range, &mut scratch).map(Done::Piece)
                    }
                };
                stop.fetch_or(result.is_err(), Ordering::Relaxed);
                done.push((index, result));
            }
            results.lock().unwrap_or_else(PoisonError::into_inner).append(&mut done);
        };
        std::thread::scope(|scope| {
            for _ in 1..threads.get().min(tasks.len()) {
                scope.spawn(work);
            }
            work();
        });

        let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
        results.sort_by_key(|(index, _)| *index);
        let mut outcome =
            Outcome { energies: vec![Energy::default(); self.plan.tensors.len()], sha256: Vec::new() };
        for (index, result) in results {
            match (&tasks[index], result?) {
                (Task::Piece { tensor, .. }, Done::Piece(energy)) => outcome.energies[*tensor] += energy,
                (Task::Hash(file), Done::Hash(digest)) => {
                    let name = files[*file].file_name().unwrap_or_default().to_string_lossy().into_owned();
                    outcome.sha256.push((name, digest));
                }
                (Task::Piece { .. }, Done::Hash(_)) | (Task::Hash(_), Done::Piece(_)) => {
                    unreachable!("a task yields its own kind of result")
                }
            }
        }
        Ok(outcome)
    }

    /// Each file's hash just before its tensors: whoever comes second finds the bytes in the page cache.
    fn tasks(&self) -> Result<Vec<Task>, ConvertError> {
        let mut tasks = Vec::new();
        let mut hashed = 0;
        for (tensor, planned) in self.plan.tensors.iter().enumerate() {
            let source = &self.source.tensors()[planned.source];
            let file = self.source.file_of(source)?;
            while hashed <= file {
                tasks.push(Task::Hash(hashed));
                hashed += 1;
            }
            let pieces = self.source.pieces(source);
            tasks.extend(pieces.into_iter().map(|range| Task::Piece { tensor, range }));
        }
        tasks.extend((hashed..self.source.weight_files().len()).map(Task::Hash));
        Ok(tasks)
    }

    /// Reads, converts and writes one piece.
    fn piece(&self, tensor: usize, range: &Range<u64>, s: &mut Scratch) -> Result<Energy, ConvertError> {
        let planned = &self.plan.tensors[tensor];
        self.source.read(planned.source, range, &mut s.values)?;
        let energy = match (planned.action, self.output.targets[tensor]) {
            (Action::Quantize(scheme), Target::Mx { codes, scales }) => {
                let first_index = self.quantize(planned.source, &planned.name, scheme.weight, range, s)?;
                let format = scheme.weight.format;
                let bits = u64::from(format.element.spec().bits);
                self.sink.write(codes, first_index.index * bits / 8, &s.codes)?;
                self.sink.write(scales, first_index.index / format.block.size() as u64, &s.scales)?;
                first_index.energy
            }
            (Action::ToBf16, Target::Dense(slot)) => {
                s.codes.clear();
                s.codes.extend(s.values.chunks_exact(4).flat_map(|b| {
                    bf16::from_f32(f32::from_le_bytes([b[0], b[1], b[2], b[3]])).to_le_bytes()
                }));
                // After rounding, which can overflow.
                self.check_finite(planned.source, Dtype::BF16, range.start / 4, &s.codes)?;
                self.sink.write(slot, range.start / 2, &s.codes)?;
                Energy::default()
            }
            (Action::Copy, Target::Dense(slot)) => {
                let dtype = self.source.tensors()[planned.source].dtype;
                let first_index = range.start * 8 / dtype.bitsize() as u64;
                self.check_finite(planned.source, dtype, first_index, &s.values)?;
                self.sink.write(slot, range.start, &s.values)?;
                Energy::default()
            }
            (Action::Quantize(_), Target::Dense(_)) | (Action::Copy | Action::ToBf16, Target::Mx { .. }) => {
                unreachable!("the output has codes and scales for what is quantized, and for nothing else")
            }
        };
        self.progress.advance(range.end - range.start);
        Ok(energy)
    }

    /// Quantizes `s.values`, whole rows that start at byte `range.start` of the tensor, into `s.codes`, `s.scales`.
    fn quantize(
        &self,
        source: usize,
        name: &str,
        cast: Cast,
        range: &Range<u64>,
        s: &mut Scratch,
    ) -> Result<Quantized, ConvertError> {
        let tensor = &self.source.tensors()[source];
        let dtype = dense_dtype(tensor.dtype).expect("the plan quantizes BF16, F16 and F32 only");
        let values = match dtype {
            DenseDtype::Bf16 => Values::Bf16(&s.values),
            DenseDtype::F16 => Values::F16(&s.values),
            DenseDtype::F32 => Values::F32(&s.values),
        };
        let first_index = range.start / dtype.size_bytes() as u64;
        let elements = s.values.len() / dtype.size_bytes();
        s.codes.resize(cast.format.code_bytes(elements), 0);
        s.scales.resize(cast.format.scale_bytes(elements), 0);
        let rows = Rows { tensor: name, values, first_index };
        let quantizer: &dyn Quantizer = match self.calibrated {
            Some(calibrated) if calibrated.contains(name) => calibrated,
            _ => self.direct,
        };
        let energy = quantizer
            .quantize(cast, rows, &mut s.codes, &mut s.scales)
            .map_err(|error| quantize_error(self.source, source, error))?;
        Ok(Quantized { index: first_index, energy })
    }

    /// Refuses NaN and Inf in values that are written as they are; `first_index` is the first one's in the tensor.
    fn check_finite(
        &self,
        source: usize,
        dtype: Dtype,
        first_index: u64,
        bytes: &[u8],
    ) -> Result<(), ConvertError> {
        match first_non_finite(dtype, bytes) {
            None => Ok(()),
            Some((index, value)) => Err(finite::error(self.source, source, first_index + index, value)),
        }
    }
}

fn quantize_error(source: &Source, tensor: usize, error: QuantizeError) -> ConvertError {
    match error {
        QuantizeError::NonFinite(bad) => finite::error(source, tensor, bad.index as u64, bad.value),
        QuantizeError::Io { path, error } => ConvertError::Io { path, error },
    }
}

/// A quantized piece.
struct Quantized {
    /// Index in the tensor of its first element.
    index: u64,
    energy: Energy,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_outputs() {
        let check = |model: &str, format: &str, expected: &str| {
            assert_eq!(default_output(Path::new(model), format), Path::new(expected));
        };
        check("a/model", "mxfp4", "a/model-mxfp4");
        check("model/", "w4a6", "model-w4a6");
        check("m.Q4_1.gguf", "mxfp4:mxfp6", "m.Q4_1-mxfp4-mxfp6");
    }
}

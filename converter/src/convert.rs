//! One conversion, from the open source to the renamed output.

mod job;
mod piece;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Instant;

use kernels::mx::ElementRounding;
use models::checkpoint::quantization::Dialect;

use job::Job;

use crate::calibrate::{self, Calibration};
use crate::error::ConvertError;
use crate::files::{self, Provenance};
use crate::layout;
use crate::mix::{self, Mix, MixReport};
use crate::output::Output;
use crate::permute::{self, Permute};
use crate::plan::{Recipe, plan};
use crate::progress::Progress;
use crate::quantize::DirectCast;
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
    /// Choose the formats of the modules of decoder layers that no pattern of the recipe names.
    pub mix: Option<Mix>,
    /// Reorder channels between modules where that helps.
    pub permute: Option<Permute>,
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
            mix: None,
            permute: None,
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
    let Some(mix) = &options.mix else { return convert_source(options, None, source, start, progress) };
    // Before the measuring, which takes a while.
    staging::check_only(&options.output, &options.model, options.force, 0)?;
    let Options { recipe, layout, threads, .. } = options;
    let job = mix::Job { source: &source, recipe, mix, layout: *layout, threads: *threads, progress };
    let (recipe, report) = job.run()?;
    convert_source(&Options { recipe, ..options.clone() }, Some(report), source, start, progress)
}

/// As [`convert()`], by the recipe as it is, which `mix` says the origin of.
fn convert_source(
    options: &Options,
    mix: Option<MixReport>,
    mut source: Source,
    start: Instant,
    progress: &dyn Progress,
) -> Result<Report, ConvertError> {
    let make_plan = |recipe: &Recipe, source: &Source| {
        plan(recipe, source.tensors(), source.traits())
            .map_err(|error| ConvertError::Plan { path: source.path_of(error.tensor()), error })
    };
    let mut plan = make_plan(&options.recipe, &source)?;
    let layout = layout::choose(options.layout, &plan)?;
    let output = Output::new(&plan, source.tensors(), layout, options.max_shard_bytes);
    for warning in &plan.warnings {
        progress.warn(warning);
    }
    let mut report = Report { mix, ..Report::new(options, &source, &plan, &output, layout) };
    if options.dry_run {
        let needed = output.total_bytes();
        staging::check_only(&options.output, &options.model, options.force, needed)?;
        return Ok(report);
    }

    let staging = Staging::begin(&options.output, &options.model, options.force)?;
    staging::check_space(staging.dir(), &options.output, output.total_bytes())?;
    let threads = options.threads;
    if let Some(permute) = &options.permute {
        let (orders, permutation) =
            permute::Job { source: &source, plan: &plan, permute, threads, progress }.run()?;
        source.reorder(orders);
        report.permutation = Some(permutation);
    }
    let calibrated = match &options.calibration {
        None => None,
        Some(calibration) => {
            let output = &options.output;
            let job = calibrate::Job { source: &source, plan: &plan, calibration, output, threads, progress };
            Some(job.run()?)
        }
    };
    let kept = calibrated.as_ref().filter(|(_, report)| report.kept).map(|(modules, _)| modules);
    if calibrated.is_some() && kept.is_none() {
        progress.warn(
            "calibration came out further from the source than direct cast on text held out: the weights are cast directly",
        );
        // Without the scale search that belongs to calibration.
        plan = make_plan(&Recipe { weight_scale_rounding: None, ..options.recipe.clone() }, &source)?;
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
    let outcome = job.run(threads)?;
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

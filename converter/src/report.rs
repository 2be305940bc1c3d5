//! What a conversion did to each tensor, as a table and as JSON.

pub(crate) mod chart;
mod html;
mod mix;
pub(crate) mod page;

use std::fmt;
use std::time::Duration;

use kernels::mx::Energy;
use models::checkpoint::quantization::Dialect;
use serde::Serialize;

use crate::calibrate::CalibrationReport;
use crate::convert::Options;
use crate::eval::Evaluation;
use crate::mix::MixReport;
use crate::output::Output;
use crate::permute::PermutationReport;
use crate::plan::{Action, Plan};
use crate::source::Source;

/// Name of the row of tensors that were not quantized.
const UNQUANTIZED: &str = "unquantized";

/// The result of a conversion, or of a dry run.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The source, as given.
    pub source: String,
    /// The output.
    pub output: String,
    /// Scheme of the linear modules; `auto` for a mix that the converter chose.
    pub format: String,
    /// JSON dialect.
    pub layout: &'static str,
    /// Nothing was written.
    pub dry_run: bool,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// By scheme, then what was not quantized.
    pub formats: Vec<Totals>,
    /// All tensors.
    pub total: Totals,
    /// How the formats were chosen, if that was left to the converter.
    pub mix: Option<MixReport>,
    /// Which channels changed places, if they were to.
    pub permutation: Option<PermutationReport>,
    /// What calibration came to, if there was one.
    pub calibration: Option<CalibrationReport>,
    /// Source and output side by side on a text, if that was asked for.
    pub evaluation: Option<Evaluation>,
    /// What the user should know.
    pub warnings: Vec<String>,
    /// Every tensor, in the source's order.
    pub tensors: Vec<TensorReport>,
}

/// One tensor.
#[derive(Debug, Clone, Serialize)]
pub struct TensorReport {
    /// Name in Hugging Face's terms.
    pub name: String,
    /// `mxfp4:mxfp6_e2m3`, or `unquantized`.
    pub scheme: String,
    /// Shape, row-major.
    pub shape: Vec<usize>,
    /// Bytes in the source.
    pub bytes_before: u64,
    /// Bytes in the output, scales included.
    pub bytes_after: u64,
    /// Signal to quantization noise ratio; absent where nothing was lost or quantized.
    pub sqnr_db: Option<f64>,
    #[serde(skip)]
    energy: Energy,
}

/// Sums over tensors.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Totals {
    /// Scheme, `unquantized` or `total`.
    pub name: String,
    /// Tensors.
    pub tensors: usize,
    /// Elements.
    pub elements: u64,
    /// Bytes in the source.
    pub bytes_before: u64,
    /// Bytes in the output, scales included.
    pub bytes_after: u64,
    /// `8 * bytes_after / elements`.
    pub bits_per_weight: f64,
    /// Over all elements that were quantized.
    pub sqnr_db: Option<f64>,
    #[serde(skip)]
    energy: Energy,
}

impl Report {
    /// What the plan will do; SQNR comes with [`finish`](Self::finish).
    pub(crate) fn new(
        options: &Options,
        source: &Source,
        plan: &Plan,
        output: &Output,
        layout: Dialect,
    ) -> Self {
        let tensors = plan
            .tensors
            .iter()
            .zip(&output.bytes)
            .map(|(planned, &bytes_after)| TensorReport {
                name: planned.name.clone(),
                scheme: match planned.action {
                    Action::Quantize(scheme) => scheme.to_string(),
                    Action::Copy | Action::ToBf16 => UNQUANTIZED.to_owned(),
                },
                shape: source.tensors()[planned.source].shape.clone(),
                bytes_before: source.stored_bytes(planned.source),
                bytes_after,
                sqnr_db: None,
                energy: Energy::default(),
            })
            .collect();
        let mut report = Self {
            source: options.model.display().to_string(),
            output: options.output.display().to_string(),
            format: if options.mix.is_some() { "auto".to_owned() } else { options.recipe.scheme.to_string() },
            layout: layout.name(),
            dry_run: options.dry_run,
            seconds: 0.0,
            formats: Vec::new(),
            total: Totals::default(),
            mix: None,
            permutation: None,
            calibration: None,
            evaluation: None,
            warnings: plan.warnings.clone(),
            tensors,
        };
        report.sum();
        report
    }

    /// Adds what the conversion measured, by planned tensor.
    pub(crate) fn finish(&mut self, energies: &[Energy], elapsed: Duration) {
        self.seconds = elapsed.as_secs_f64();
        for (tensor, energy) in self.tensors.iter_mut().zip(energies) {
            tensor.energy = *energy;
            tensor.sqnr_db = finite_sqnr(*energy);
        }
        self.sum();
    }

    /// The method whose result was written.
    pub(crate) fn method(&self) -> &'static str {
        self.calibration.as_ref().filter(|calibration| calibration.kept).map_or("nearest", |c| c.method)
    }

    fn sum(&mut self) {
        let mut formats: Vec<Totals> = Vec::new();
        let mut total = Totals { name: "total".to_owned(), ..Totals::default() };
        for tensor in &self.tensors {
            let index = formats.iter().position(|t| t.name == tensor.scheme).unwrap_or_else(|| {
                formats.push(Totals { name: tensor.scheme.clone(), ..Totals::default() });
                formats.len() - 1
            });
            formats[index].add(tensor);
            total.add(tensor);
        }
        formats.sort_by_key(|t| t.name == UNQUANTIZED);
        self.formats = formats;
        self.total = total;
    }
}

impl Totals {
    fn add(&mut self, tensor: &TensorReport) {
        self.tensors += 1;
        self.elements += tensor.shape.iter().map(|&dim| dim as u64).product::<u64>();
        self.bytes_before += tensor.bytes_before;
        self.bytes_after += tensor.bytes_after;
        self.bits_per_weight = 8.0 * self.bytes_after as f64 / self.elements.max(1) as f64;
        self.energy += tensor.energy;
        self.sqnr_db = finite_sqnr(self.energy);
    }
}

/// JSON has no infinity: a lossless quantization has no SQNR.
fn finite_sqnr(energy: Energy) -> Option<f64> {
    (energy.noise > 0.0).then(|| energy.sqnr_db())
}

/// `18.72`, or a dash.
pub(crate) fn decibels(sqnr: Option<f64>) -> String {
    sqnr.map_or_else(|| "-".to_owned(), |db| format!("{db:.2}"))
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.formats.iter().map(|t| t.name.len()).max().unwrap_or(0).max(11);
        writeln!(
            f,
            "{:width$} {:>8} {:>15} {:>15} {:>12} {:>9}",
            "format", "tensors", "bytes before", "bytes after", "bits/weight", "SQNR dB"
        )?;
        for t in self.formats.iter().chain([&self.total]) {
            let (name, sqnr) = (&t.name, decibels(t.sqnr_db));
            writeln!(
                f,
                "{name:width$} {:>8} {:>15} {:>15} {:>12.2} {sqnr:>9}",
                t.tensors, t.bytes_before, t.bytes_after, t.bits_per_weight
            )?;
        }
        if let Some(mix) = &self.mix {
            writeln!(f, "{}", mix::summary(mix))?;
        }
        if let Some(permutation) = &self.permutation {
            writeln!(f, "{}", permutation.summary())?;
        }
        if let Some(calibration) = &self.calibration {
            let (perplexity, divergence) = (calibration.perplexity, calibration.divergence);
            writeln!(
                f,
                "{} on {} windows of {}; perplexity of {} others: {:.3} unquantized, {:.3} nearest, {:.3} calibrated; \
                 divergence {:.4} nearest, {:.4} calibrated",
                calibration.method,
                calibration.windows,
                calibration.text,
                calibration.held_out,
                perplexity.unquantized,
                perplexity.nearest,
                perplexity.calibrated,
                divergence.nearest,
                divergence.calibrated,
            )?;
        }
        if self.dry_run {
            write!(f, "{} (layout {}): dry run, nothing written", self.output, self.layout)
        } else {
            write!(f, "{} (layout {}) in {:.1} s", self.output, self.layout, self.seconds)?;
            self.evaluation.as_ref().map_or(Ok(()), |evaluation| write!(f, "\n\n{evaluation}"))
        }
    }
}

//! The design space of Microscaling formats, measured on one model: data type, element rounding, scale rule, symmetry,
//! block size and block shape, on weights and on the activations that a text causes.
//!
//! It follows "An Empirical Study of Microscaling Formats for Low-Precision LLM Training" (ARITH 2025), whose findings
//! it checks one by one.

mod design;
mod findings;
mod grid;
mod html;
mod measure;
mod quantizer;
mod sample;
mod spread;

use std::fmt;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Instant;

use kernels::mx::ElementType;
use models::ModelError;
use models::checkpoint::CheckpointError;
use serde::Serialize;

pub use design::{BLOCKS, Design, Organisation, Rounding, Symmetry};
pub use findings::{Finding, Verdict};
pub use measure::{Errors, Operand};
pub use sample::default_output;
pub use spread::Spread;

use crate::eval::{EvalError, table::table};
use crate::text_tokenizer::TokenizerError;
use measure::Sample;

/// What to study.
#[derive(Debug, Clone)]
pub struct StudyOptions {
    /// An unquantized checkpoint folder.
    pub model: PathBuf,
    /// A text that causes activations; `None` studies weights alone.
    pub text: Option<PathBuf>,
    /// Decoder layers sampled.
    pub layers: NonZeroUsize,
    /// Threads.
    pub threads: NonZeroUsize,
}

impl StudyOptions {
    /// Weights of four layers of `model`, on all cores.
    pub fn new(model: impl Into<PathBuf>) -> Self {
        Self {
            model: model.into(),
            text: None,
            layers: NonZeroUsize::MIN.saturating_add(3),
            threads: std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
        }
    }
}

/// Why a study failed. Every message is one line and names the file or flag.
#[derive(Debug, thiserror::Error)]
pub enum StudyError {
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The text, or the device.
    #[error(transparent)]
    Eval(#[from] EvalError),
    /// The folder's tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The model cannot be loaded.
    #[error("{}: {error}", path.display())]
    Model {
        /// Its folder.
        path: PathBuf,
        /// Why.
        error: Box<ModelError>,
    },
    /// There is nothing to learn from values that are quantized already.
    #[error("{}: quantized; the unquantized checkpoint is wanted", path.display())]
    Quantized {
        /// The folder.
        path: PathBuf,
    },
    /// A layer has not the modules that decoders have.
    #[error("{}: layer {layer} has no matrix {kind}.weight in BF16, F16 or F32", path.display())]
    NoModule {
        /// The folder.
        path: PathBuf,
        /// The layer.
        layer: usize,
        /// `down_proj`.
        kind: String,
    },
    /// A weight is not a number.
    #[error("{}: tensor {tensor} holds {value}", path.display())]
    NonFinite {
        /// The folder.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// NaN or an infinity.
        value: f32,
    },
    /// The tokenizer is not the model's.
    #[error("{}: token {token} of the text is beyond the vocabulary", path.display())]
    Vocabulary {
        /// The folder.
        path: PathBuf,
        /// The token.
        token: u32,
    },
}

/// Everything that was measured.
#[derive(Debug, Clone, Serialize)]
pub struct Study {
    /// The folder, as given.
    pub model: String,
    /// The text, as given.
    pub text: Option<String>,
    /// The layers that were sampled.
    pub layers: Vec<usize>,
    /// Weight elements that were quantized by each design.
    pub weight_elements: usize,
    /// Activation elements.
    pub activation_elements: usize,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// What the published study found, and whether it holds here.
    pub findings: Vec<Finding>,
    /// How far the magnitudes of a block lie apart.
    pub spreads: Vec<Spread>,
    /// Every design.
    pub outcomes: Vec<Outcome>,
}

/// One design's errors.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// The design.
    #[serde(flatten)]
    pub design: Design,
    /// Stored bits per element, scales included.
    pub bits_per_element: f64,
    /// On weights.
    pub weights: Errors,
    /// On activations, if there was a text.
    pub activations: Option<Errors>,
}

/// Measures every design on samples of the model; `tell` hears how many tensors of how many are done.
///
/// # Errors
/// See [`StudyError`].
pub fn study(options: &StudyOptions, tell: &(dyn Fn(usize, usize) + Sync)) -> Result<Study, StudyError> {
    let start = Instant::now();
    let StudyOptions { model, text, layers, threads } = options;
    let (layers, groups) = sample::sample(model, text.as_deref(), *layers, *threads)?;
    let samples = Sample::all(&groups);
    let designs = Design::all();
    let measured = measure::measure(&samples, &designs, *threads, &|done| tell(done, samples.len()));
    let elements = |operand| {
        let of = samples.iter().filter(|sample| sample.operand == operand);
        of.map(|sample| sample.matrix.values.len()).sum()
    };
    let outcomes = designs.iter().enumerate().map(|(index, design)| Outcome {
        design: *design,
        bits_per_element: design.bits_per_element(),
        weights: measured.weights[index],
        activations: measured.activations.as_ref().map(|errors| errors[index]),
    });
    let mut study = Study {
        model: model.display().to_string(),
        text: text.as_ref().map(|text| text.display().to_string()),
        layers,
        weight_elements: elements(Operand::Weight),
        activation_elements: elements(Operand::Activation),
        seconds: 0.0,
        findings: Vec::new(),
        spreads: spread::spreads(&samples),
        outcomes: outcomes.collect(),
    };
    study.findings = findings::findings(&study);
    study.seconds = start.elapsed().as_secs_f64();
    Ok(study)
}

impl Study {
    /// The errors of `design` on an operand, if both were measured.
    pub fn errors(&self, operand: Operand, design: &Design) -> Option<&Errors> {
        let outcome = self.outcomes.iter().find(|outcome| outcome.design == *design)?;
        match operand {
            Operand::Weight => Some(&outcome.weights),
            Operand::Activation => outcome.activations.as_ref(),
        }
    }

    /// SQNR of `design` on an operand, in dB.
    pub fn sqnr_db(&self, operand: Operand, design: &Design) -> Option<f64> {
        self.errors(operand, design).map(|errors| errors.sqnr_db)
    }

    /// The operands that were measured.
    pub fn operands(&self) -> Vec<Operand> {
        let both = [Operand::Weight, Operand::Activation];
        both.into_iter()
            .filter(|&operand| self.sqnr_db(operand, &Design::ocp(ElementType::E2m1)).is_some())
            .collect()
    }
}

/// The formats as checkpoints have them, and the findings.
impl fmt::Display for Study {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cell = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"));
        let rows: Vec<_> = (ElementType::ALL.iter())
            .map(|&element| {
                let design = Design::ocp(element);
                let mut row = vec![element.spec().name.to_owned(), design.scale_rounding.to_string()];
                for operand in [Operand::Weight, Operand::Activation] {
                    let errors = self.errors(operand, &design);
                    row.push(cell(errors.map(|errors| errors.sqnr_db)));
                    row.push(cell(errors.and_then(|errors| errors.output_sqnr_db)));
                }
                row
            })
            .collect();
        let header =
            ["format", "scale rule", "weights, SQNR dB", "outputs", "activations, SQNR dB", "outputs"];
        f.write_str(&table(&header, 2, &rows))?;
        for finding in &self.findings {
            write!(f, "\n{}: {}\n  {}", finding.verdict.name(), finding.claim, finding.figures)?;
        }
        Ok(())
    }
}

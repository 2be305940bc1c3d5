//! How a mix came about, for reports.

use kernels::mx::MxFormat;
use serde::Serialize;

use super::group::{Group, bits_per_weight};
use super::{Mix, Target};

/// An automatic mix.
#[derive(Debug, Clone, Serialize)]
pub struct MixReport {
    /// The most bits per weight that were asked for.
    pub budget: Option<f64>,
    /// The largest increase of perplexity that was asked for, as a share.
    pub max_perplexity_increase: Option<f64>,
    /// Bits per weight of the modules that were mixed, scales included.
    pub bits: f64,
    /// File name of the text that errors were measured on; without one, they are those of the weights alone.
    pub text: Option<String>,
    /// The sum of what direct cast does to the model's predictions in each group alone: mean Kullback-Leibler divergence,
    /// in nats. Absent without a text.
    pub predicted_divergence: Option<f64>,
    /// The formats to choose from.
    pub formats: Vec<String>,
    /// Mixes that were tried on held-out windows, by direct cast.
    pub trials: Vec<Trial>,
    /// The groups, in the order of execution.
    pub groups: Vec<GroupReport>,
}

/// A mix that was tried.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Trial {
    /// Bits per weight.
    pub bits: f64,
    /// Perplexity of held-out windows.
    pub perplexity: f64,
    /// By how much that is more than the unquantized model's, as a share of it.
    pub increase: f64,
}

/// Modules that got one format.
#[derive(Debug, Clone, Serialize)]
pub struct GroupReport {
    /// The modules.
    pub modules: Vec<String>,
    /// Elements of all of them.
    pub elements: u64,
    /// What they got.
    pub format: String,
    /// By format of [`MixReport::formats`].
    pub candidates: Vec<CandidateReport>,
}

/// What a format would do to a group, by direct cast.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct CandidateReport {
    /// Error of the outputs (without a text: of the weights) relative to them, in dB; absent if there is none.
    pub error_db: Option<f64>,
    /// Divergence of the model's predictions, in nats; absent without a text.
    pub divergence: Option<f64>,
}

impl MixReport {
    pub(super) fn new(mix: &Mix, groups: &[Group], chosen: &[MxFormat], trials: Vec<Trial>) -> Self {
        let measured = mix.text.is_some();
        let index = |format: &MxFormat| mix.formats.iter().position(|other| other == format);
        let costs = groups.iter().zip(chosen).filter_map(|(group, format)| Some(group.cost(index(format)?)));
        let (budget, max_perplexity_increase) = match mix.target {
            Target::Bits(bits) => (Some(bits), None),
            Target::PerplexityIncrease(share) => (None, Some(share)),
        };
        let file_name =
            |text: &super::MixText| text.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Self {
            budget,
            max_perplexity_increase,
            bits: bits_per_weight(groups, chosen),
            text: mix.text.as_ref().map(file_name),
            predicted_divergence: measured.then(|| costs.sum()),
            formats: mix.formats.iter().map(ToString::to_string).collect(),
            trials,
            groups: groups
                .iter()
                .zip(chosen)
                .map(|(g, format)| GroupReport::new(g, *format, measured))
                .collect(),
        }
    }
}

impl GroupReport {
    fn new(group: &Group, format: MxFormat, measured: bool) -> Self {
        let candidate = |index: usize| CandidateReport {
            error_db: Some(group.errors[index])
                .filter(|error| *error > 0.0)
                .map(|error| 10.0 * error.log10()),
            divergence: measured.then(|| group.cost(index)),
        };
        Self {
            modules: group.modules.clone(),
            elements: group.elements,
            format: format.to_string(),
            candidates: (0..group.errors.len()).map(candidate).collect(),
        }
    }
}

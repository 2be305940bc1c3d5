//! An automatic mix of formats: what each group of modules costs in bytes and in error, format by format, and the choice
//! with the least error that fits a budget.

mod error;
mod group;
mod knapsack;
mod measure;
mod probe;
mod recipe;
mod report;
mod search;

use std::num::NonZeroUsize;
use std::path::PathBuf;

use kernels::mx::{Cast, MxFormat, Scheme};
use models::ModelConfig;
use models::checkpoint::quantization::Dialect;

pub use error::MixError;
pub(crate) use error::percent;
pub use recipe::{RecipeError, read_recipe, render_recipe};
pub use report::{CandidateReport, GroupReport, MixReport, Trial};

use crate::calibrate::{CalibrationError, CalibrationWindows};
use crate::error::ConvertError;
use crate::layout;
use crate::plan::{Recipe, plan};
use crate::pool::in_pool;
use crate::progress::Progress;
use crate::source::Source;
use group::{Group, choose};
use measure::Measurement;

/// The formats that a mix is made of by default: the OCP formats, in each width those of integers and of floats.
const DEFAULT_FORMATS: [&str; 5] = ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxint8"];

/// Windows of text that are enough to tell groups and formats apart, and their length in tokens.
const WINDOWS: usize = 4;
const WINDOW_TOKENS: usize = 256;

/// How to mix.
#[derive(Debug, Clone, PartialEq)]
pub struct Mix {
    /// How large the result is.
    pub target: Target,
    /// The formats to choose from.
    pub formats: Vec<MxFormat>,
    /// What errors are measured on; without it, those of the weights alone count.
    pub text: Option<MixText>,
}

/// What a mix is to reach.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    /// The least error in this many bits per weight of the modules that are mixed, scales included.
    Bits(f64),
    /// The fewest bits whose direct cast raises the perplexity of held-out windows by this share at most.
    PerplexityIncrease(f64),
}

/// A text that a mix is measured on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MixText {
    /// The file.
    pub path: PathBuf,
    /// As for calibration: how many windows it is cut into. Those that calibration holds out are used to try mixes.
    pub windows: usize,
    /// Tokens of such a window.
    pub window_tokens: usize,
}

impl Mix {
    /// The formats to choose from if none are named: those that `layout` has a place for, with this activation format.
    pub fn default_formats(layout: Option<Dialect>, activation: Option<Cast>) -> Vec<MxFormat> {
        let formats = DEFAULT_FORMATS.iter().map(|name| name.parse().expect("is a format"));
        let fits = |format: &MxFormat| {
            let scheme = Scheme { weight: Cast::from(*format), activation, rotation: None };
            layout.is_none_or(|layout| layout.expresses(scheme))
        };
        formats.filter(fits).collect()
    }
}

/// A recipe that is to become a mix, and the model it is for.
pub(crate) struct Job<'a> {
    pub(crate) source: &'a Source,
    pub(crate) recipe: &'a Recipe,
    pub(crate) mix: &'a Mix,
    /// The layout asked for.
    pub(crate) layout: Option<Dialect>,
    pub(crate) threads: NonZeroUsize,
    pub(crate) progress: &'a dyn Progress,
}

impl Job<'_> {
    /// The recipe with a format for every module of the decoder layers that none of its patterns names.
    pub(crate) fn run(&self) -> Result<(Recipe, MixReport), ConvertError> {
        in_pool(self.threads, || self.run_in_pool())
    }

    fn run_in_pool(&self) -> Result<(Recipe, MixReport), ConvertError> {
        self.check_layout()?;
        self.check_budget()?;
        let config = ModelConfig::parse(self.source.config()).map_err(models::ModelError::from);
        let config = config.map_err(CalibrationError::from)?;
        let groups = self.measure(&config)?;
        if groups.is_empty() {
            return Err(MixError::NothingToMix.into());
        }
        let (formats, trials) = match self.mix.target {
            Target::Bits(bits) => (choose(&groups, &self.mix.formats, bits)?, Vec::new()),
            Target::PerplexityIncrease(share) => search::search(self, &config, &groups, share)?,
        };
        let report = MixReport::new(self.mix, &groups, &formats, trials);
        Ok((self.recipe_of(&groups, &formats), report))
    }

    /// A mix that no layout takes should not be measured first.
    fn check_layout(&self) -> Result<(), ConvertError> {
        let Some(layout) = self.layout else { return Ok(()) };
        let schemes = self.mix.formats.iter().map(|format| self.scheme(*format));
        match schemes.into_iter().find(|scheme| !layout.expresses(*scheme)) {
            None => Ok(()),
            Some(scheme) => {
                Err(ConvertError::Layout { layout, what: crate::error::Unexpressed::Scheme(scheme) })
            }
        }
    }

    /// Nor one that is too large in any case.
    fn check_budget(&self) -> Result<(), MixError> {
        let widths = self.mix.formats.iter().map(|format| format.bits_per_element());
        let least = widths.fold(f64::INFINITY, f64::min);
        match self.mix.target {
            Target::Bits(bits) if bits < least => Err(MixError::OverBudget { bits, least }),
            _ => Ok(()),
        }
    }

    /// What every format costs in every group.
    fn measure(&self, config: &ModelConfig) -> Result<Vec<Group>, ConvertError> {
        let planned = plan(self.recipe, self.source.tensors(), self.source.traits())
            .map_err(|error| ConvertError::Plan { path: self.source.path_of(error.tensor()), error })?;
        let schemes = layout::schemes(&planned);
        let named = |module: &str| self.recipe.layers.iter().any(|(pattern, _)| pattern.matches(module));
        let measurement = Measurement {
            source: self.source,
            config,
            casts: self
                .mix
                .formats
                .iter()
                .map(|f| self.recipe.with_rounding(self.scheme(*f)).weight)
                .collect(),
            mixed: &|module| schemes.contains_key(module) && !named(module),
            threads: self.threads,
            progress: self.progress,
        };
        let Some(text) = &self.mix.text else { return measurement.by_weights() };
        let tokens = WINDOW_TOKENS.min(text.window_tokens);
        // One more, which is held out.
        let windows = CalibrationWindows::of(self.source, config, &text.path, WINDOWS + 1, tokens)?;
        measurement.on_text(&windows.tokens[..windows.seen()])
    }

    /// `format` for weights, with the recipe's activations.
    fn scheme(&self, format: MxFormat) -> Scheme {
        Scheme { weight: Cast::from(format), activation: self.recipe.scheme.activation, rotation: None }
    }

    /// The recipe with `formats` for `groups`.
    fn recipe_of(&self, groups: &[Group], formats: &[MxFormat]) -> Recipe {
        let chosen = groups.iter().zip(formats).flat_map(|(group, format)| {
            let pattern = |module: &String| module.parse().expect("a module's name is a pattern");
            group.modules.iter().map(move |module| (pattern(module), self.scheme(*format)))
        });
        // The user's own come last: they win.
        let layers = chosen.chain(self.recipe.layers.iter().cloned()).collect();
        Recipe { layers, ..self.recipe.clone() }
    }
}

//! Calibration: runs the model on text, layer by layer, and quantizes each module with what its inputs are then, those
//! of the model as far as it is quantized. Memory: one layer, and the activations of the windows.

mod error;
mod gram;
mod held_out;
mod layer;
mod modules;
mod store;
pub(crate) mod streams;
mod sums;
mod text;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Instant;

use kernels::Device;
use models::ModelConfig;
use models::staged::{Ends, Stager, WindowState};
use serde::Serialize;
use serde_json::json;
use sha2::{Digest, Sha256};

pub use error::CalibrationError;
pub(crate) use gram::product_transposed;
pub use held_out::{HeldOutDivergence, HeldOutPerplexity};
pub(crate) use layer::nearest_cast;
pub(crate) use modules::CalibratedModules;
pub use store::StageRecord;
pub(crate) use store::Store;
pub(crate) use sums::{Finished, Inputs, OutputError, Sums};
pub(crate) use text::CalibrationWindows;

use self::layer::Calibrator;
use crate::error::ConvertError;
use crate::layout;
use crate::plan::Plan;
use crate::pool::in_pool;
use crate::progress::Progress;
use crate::quantize::CalibratedMethod;
use crate::source::Source;

/// About as many windows are enough to see drift on: more of them take time, and show the same.
const DRIFT_WINDOWS: usize = 42;

/// How to calibrate.
#[derive(Debug, Clone, PartialEq)]
pub struct Calibration {
    /// The method.
    pub method: CalibratedMethod,
    /// A text like those that the model will see.
    pub text: PathBuf,
    /// CalibrationWindows of text, at most.
    pub windows: usize,
    /// Tokens of a window.
    pub window_tokens: usize,
    /// How much of what earlier modules got wrong a module is to make up for: 0 nothing, 1 all that it can (as GPTAQ, Li
    /// et al., arXiv 2504.02692, does). A half is best: the correction itself does not carry over to other texts whole.
    pub drift_correction: f32,
}

impl Calibration {
    /// `method` on 128 windows of 512 tokens, with half of the drift corrected.
    pub fn new(method: CalibratedMethod, text: impl Into<PathBuf>) -> Self {
        Self { method, text: text.into(), windows: 128, window_tokens: 512, drift_correction: 0.5 }
    }
}

/// What calibration came to.
#[derive(Debug, Clone, Serialize)]
pub struct CalibrationReport {
    /// The method: `gptq`, `error-diffusion`.
    pub method: &'static str,
    /// File name of the text.
    pub text: String,
    /// CalibrationWindows that modules were quantized on.
    pub windows: usize,
    /// CalibrationWindows that results were compared on.
    pub held_out: usize,
    /// Tokens of a window.
    pub window_tokens: usize,
    /// On the held-out windows.
    pub perplexity: HeldOutPerplexity,
    /// On the held-out windows.
    pub divergence: HeldOutDivergence,
    /// False: the whole came out further from the source than direct cast, by the divergence on the held-out windows, and
    /// direct cast is what was written.
    pub kept: bool,
    /// Wall-clock seconds, of this run.
    pub seconds: f64,
    /// The groups of modules, in the order of execution.
    pub stages: Vec<StageRecord>,
}

/// Everything a calibration needs.
pub(crate) struct Job<'a> {
    pub(crate) source: &'a Source,
    pub(crate) plan: &'a Plan,
    pub(crate) calibration: &'a Calibration,
    /// Where the output will be.
    pub(crate) output: &'a Path,
    pub(crate) threads: NonZeroUsize,
    pub(crate) progress: &'a dyn Progress,
}

impl Job<'_> {
    /// Quantizes the decoder layers, or goes on where an earlier run was interrupted.
    pub(crate) fn run(&self) -> Result<(CalibratedModules, CalibrationReport), ConvertError> {
        in_pool(self.threads, || self.run_in_pool())
    }

    fn run_in_pool(&self) -> Result<(CalibratedModules, CalibrationReport), ConvertError> {
        let start = Instant::now();
        let config = ModelConfig::parse(self.source.config()).map_err(models::ModelError::from);
        let config = config.map_err(CalibrationError::from)?;
        let windows = self.windows(&config)?;
        let store = Store::open(self.output, &self.settings(&windows)?)?;

        let backend =
            kernels::open(Device::Cpu { threads: self.threads.get() }).map_err(CalibrationError::from)?;
        let ends = streams::end_parameters(self.source)?;
        let ends = Ends::load(&*backend, &ends, &config).map_err(CalibrationError::from)?;
        let mut stager = Stager::new(&*backend, &config, self.calibration.window_tokens)
            .map_err(CalibrationError::from)?;
        let states: Vec<WindowState> = windows
            .tokens
            .iter()
            .map(|window| stager.embed(&ends, window))
            .collect::<Result<_, _>>()
            .map_err(CalibrationError::from)?;
        let mut calibrator = Calibrator {
            job: self,
            backend: &*backend,
            config: &config,
            schemes: layout::schemes(self.plan),
            seen: windows.seen(),
            original: self.originals(&states, windows.seen()),
            nearest: states[windows.seen()..].to_vec(),
            quantized: states,
            stager,
        };
        let mut stages = Vec::new();
        let mut fresh = None;
        for index in 0..config.num_layers {
            let stored = store.layer(index)?;
            let began = stored.is_none().then(|| *fresh.get_or_insert((index, Instant::now())));
            let result = calibrator.layer(index, stored.as_ref())?;
            if let Some((first, began)) = began {
                store.save(index, &result)?;
                let left =
                    began.elapsed() / (index - first + 1) as u32 * (config.num_layers - index - 1) as u32;
                self.progress.calibrated(index + 1, config.num_layers, left);
            }
            stages.extend(result.stages);
        }
        let (perplexity, divergence) = calibrator.compare(&ends, &windows);
        let report = CalibrationReport {
            method: self.calibration.method.name(),
            text: self.calibration.text.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            windows: windows.seen(),
            held_out: windows.held_out,
            window_tokens: self.calibration.window_tokens,
            perplexity,
            divergence,
            kept: divergence.favours_calibration(),
            seconds: start.elapsed().as_secs_f64(),
            stages,
        };
        Ok((CalibratedModules::open(store, config.num_layers)?, report))
    }

    /// The windows that the unquantized model runs on, too: those held out, and where drift is corrected some of those
    /// `seen`, as many as are spread evenly.
    fn originals(&self, states: &[WindowState], seen: usize) -> Vec<Option<WindowState>> {
        let step = ((seen + DRIFT_WINDOWS / 2) / DRIFT_WINDOWS).max(1);
        let shows_drift =
            |window: usize| self.calibration.drift_correction > 0.0 && window.is_multiple_of(step);
        let runs = |window: usize| window >= seen || shows_drift(window);
        states.iter().enumerate().map(|(window, state)| runs(window).then(|| state.clone())).collect()
    }

    fn windows(&self, config: &ModelConfig) -> Result<CalibrationWindows, CalibrationError> {
        let Calibration { text, windows, window_tokens, .. } = self.calibration;
        if text.as_os_str().is_empty() {
            return Err(CalibrationError::NoText { method: self.calibration.method.name() });
        }
        CalibrationWindows::of(self.source, config, text, *windows, *window_tokens)
    }

    /// What a stored layer depends on.
    fn settings(&self, windows: &CalibrationWindows) -> Result<serde_json::Value, CalibrationError> {
        let mut tokens = Sha256::new();
        for token in windows.tokens.iter().flatten() {
            tokens.update(token.to_le_bytes());
        }
        let tokens: String = tokens.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        let mut files = Vec::new();
        for path in self.source.weight_files() {
            let metadata = std::fs::metadata(&path).map_err(CalibrationError::io(&path))?;
            let modified =
                metadata.modified().ok().and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
            files.push(json!({
                "path": path.display().to_string(),
                "bytes": metadata.len(),
                "modified_secs": modified.map(|time| time.as_secs_f64()),
            }));
        }
        let schemes: serde_json::Map<String, serde_json::Value> = layout::schemes(self.plan)
            .into_iter()
            .map(|(module, scheme)| {
                (module.to_owned(), json!(models::checkpoint::RecordedScheme::from(scheme)))
            })
            .collect();
        Ok(json!({
            "tool_version": env!("CARGO_PKG_VERSION"),
            "method": self.calibration.method.name(),
            "drift_correction": self.calibration.drift_correction,
            "window_tokens": self.calibration.window_tokens,
            "held_out": windows.held_out,
            "tokens_sha256": tokens,
            "files": files,
            "channel_orders_sha256": self.source.orders().digest(),
            "schemes": schemes,
        }))
    }
}

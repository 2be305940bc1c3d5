//! Several checkpoints, KV caches and activation formats, measured on the same tokens.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Instant;

use kernels::{Backend, Device, KvCacheDtype};
use models::checkpoint::{ActivationChoice, Checkpoint};
use models::{LinearInfo, Model};

use crate::text_tokenizer::TextTokenizer;

use super::task::{Task, TaskScore, answer};
use super::{
    Baseline, Divergence, EvalError, Evaluation, ModelResult, Perplexity, TaskResult, TextResult, Windows,
    divergence, perplexity,
};

/// What to evaluate, and how.
#[derive(Debug, Clone)]
pub struct EvalOptions {
    /// Checkpoint folders.
    pub checkpoints: Vec<PathBuf>,
    /// The checkpoint to compare with; `None` takes the first unquantized one of `checkpoints`, if any.
    pub baseline: Option<PathBuf>,
    /// Text files.
    pub texts: Vec<PathBuf>,
    /// Task files, see [`Task::read`].
    pub tasks: Vec<PathBuf>,
    /// Windows of each text; at least 1.
    pub windows: usize,
    /// Tokens of a window; at least 2.
    pub window_tokens: usize,
    /// How keys and values are stored: each checkpoint is measured with each of them.
    pub kv_caches: Vec<KvCacheDtype>,
    /// Activation formats: each quantized checkpoint is measured with each of them.
    pub activations: Vec<ActivationChoice>,
    /// Questions of each task; `None` is all.
    pub max_questions: Option<usize>,
    /// Threads.
    pub threads: NonZeroUsize,
}

impl EvalOptions {
    /// `checkpoints` on no text or task yet: 10 windows of 512 tokens, F32 KV cache, declared activations, all cores.
    pub fn new(checkpoints: Vec<PathBuf>) -> Self {
        Self {
            checkpoints,
            baseline: None,
            texts: Vec::new(),
            tasks: Vec::new(),
            windows: 10,
            window_tokens: 512,
            kv_caches: vec![KvCacheDtype::F32],
            activations: vec![ActivationChoice::Declared],
            max_questions: None,
            threads: std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
        }
    }
}

/// Measures all checkpoints on the CPU. Two at most are in memory: the baseline, and the one that is measured.
/// `tell` hears what is being done.
///
/// # Errors
/// See [`EvalError`].
pub fn evaluate(options: &EvalOptions, tell: &mut dyn FnMut(&str)) -> Result<Evaluation, EvalError> {
    let backend = kernels::open(Device::Cpu { threads: options.threads.get() })?;
    let baseline_folder = find_baseline(options)?;
    let first = baseline_folder.as_deref().or(options.checkpoints.first().map(PathBuf::as_path));
    let Some(first) = first else {
        return Ok(Evaluation::empty(options));
    };
    let material = Material::read(first, options)?;
    let mut evaluation = Evaluation::empty(options);
    let measure = Measure { backend: &*backend, material: &material, options };

    let original = baseline_folder.as_deref().map(|folder| measure.load(folder, ActivationChoice::Declared));
    let original = original.transpose()?;
    let mut comparison = None;
    if let (Some(folder), Some(model)) = (&baseline_folder, &original) {
        let (comparison_made, result) = measure.baseline(folder, &**model, tell)?;
        comparison = Some(comparison_made);
        evaluation.baseline = Some(folder.display().to_string());
        evaluation.models.push(result);
    }
    for folder in &options.checkpoints {
        let is_baseline = baseline_folder.as_ref() == Some(folder);
        for (index, &activations) in options.activations.iter().enumerate() {
            let checkpoint = Checkpoint::open(folder)?;
            // Activation formats belong to quantized modules.
            if checkpoint.quantization().dialect().is_none() && index > 0 {
                continue;
            }
            let others = options.kv_caches.iter().filter(|&&kv| !is_baseline || kv != KvCacheDtype::F32);
            let others: Vec<_> = others.copied().collect();
            if others.is_empty() {
                continue;
            }
            let model = measure.load(folder, activations)?;
            for kv_cache in others {
                let result = measure.model(folder, &*model, kv_cache, comparison.as_mut(), tell)?;
                evaluation.models.push(result);
            }
        }
    }
    Ok(evaluation)
}

impl Evaluation {
    fn empty(options: &EvalOptions) -> Self {
        let EvalOptions { windows, window_tokens, .. } = *options;
        Self { windows, window_tokens, baseline: None, models: Vec::new() }
    }
}

/// The checkpoint to compare with.
fn find_baseline(options: &EvalOptions) -> Result<Option<PathBuf>, EvalError> {
    if options.baseline.is_some() {
        return Ok(options.baseline.clone());
    }
    for folder in &options.checkpoints {
        if Checkpoint::open(folder)?.quantization().dialect().is_none() {
            return Ok(Some(folder.clone()));
        }
    }
    Ok(None)
}

/// Texts and tasks as tokens.
#[derive(Debug)]
struct Material {
    /// [`TextTokenizer::digest`] of what made them.
    tokenizer: [u8; 32],
    /// With the names of the files.
    texts: Vec<(String, Windows)>,
    tasks: Vec<Task>,
}

impl Material {
    /// With the tokenizer of the checkpoint in `folder`.
    fn read(folder: &Path, options: &EvalOptions) -> Result<Self, EvalError> {
        let tokenizer = TextTokenizer::open(folder)?;
        let text = |path: &PathBuf| {
            let windows = Windows::read(&tokenizer, path, options.windows, options.window_tokens)?;
            Ok((path.file_name().unwrap_or_default().to_string_lossy().into_owned(), windows))
        };
        let task = |path: &PathBuf| Task::read(&tokenizer, path, options.max_questions);
        Ok(Self {
            tokenizer: TextTokenizer::digest(folder)?,
            texts: options.texts.iter().map(text).collect::<Result<_, EvalError>>()?,
            tasks: options.tasks.iter().map(task).collect::<Result<_, EvalError>>()?,
        })
    }

    fn has_tokens_of(&self, other: &Self) -> bool {
        self.texts == other.texts && self.tasks == other.tasks
    }

    /// Refuses a model that cannot run these tokens, or would have others.
    fn check(&self, folder: &Path, model: &dyn Model, options: &EvalOptions) -> Result<(), EvalError> {
        let same = TextTokenizer::digest(folder)? == self.tokenizer
            || Self::read(folder, options)?.has_tokens_of(self);
        if !same {
            let reason = "its tokenizer makes other tokens of the same text".to_owned();
            return Err(EvalError::Incomparable { path: folder.to_owned(), reason });
        }
        let config = model.config();
        let windows = self.texts.iter().map(|(name, windows)| (name.as_str(), windows.length()));
        for (name, tokens) in windows.chain(self.tasks.iter().map(|task| (task.name(), task.longest()))) {
            if tokens > config.max_model_len {
                return Err(EvalError::Context {
                    what: name.to_owned(),
                    tokens,
                    path: folder.to_owned(),
                    limit: config.max_model_len,
                });
            }
        }
        let texts = self.texts.iter().flat_map(|(_, windows)| windows.iter());
        let largest = texts.chain(self.tasks.iter().flat_map(Task::tokens)).flatten().max();
        match largest {
            Some(&token) if token as usize >= config.vocab_size => Err(EvalError::Incomparable {
                path: folder.to_owned(),
                reason: format!("token {token} is beyond its vocabulary of {}", config.vocab_size),
            }),
            _ => Ok(()),
        }
    }
}

/// What the baseline said.
struct Comparison<'a> {
    vocab_size: usize,
    /// By text.
    texts: Vec<Baseline<'a>>,
    /// By task.
    answers: Vec<Vec<usize>>,
}

/// Everything that measurements have in common.
struct Measure<'a> {
    backend: &'a dyn Backend,
    material: &'a Material,
    options: &'a EvalOptions,
}

impl Measure<'_> {
    fn load(&self, folder: &Path, activations: ActivationChoice) -> Result<Box<dyn Model>, EvalError> {
        let mut checkpoint = Checkpoint::open(folder)?;
        checkpoint.set_activations(activations);
        let model = models::load(self.backend, &checkpoint)
            .map_err(|error| EvalError::Model { path: folder.to_owned(), error: Box::new(error) })?;
        self.material.check(folder, &*model, self.options)?;
        Ok(model)
    }

    /// The baseline's own row, and what the others are compared with.
    fn baseline<'m>(
        &'m self,
        folder: &Path,
        model: &'m dyn Model,
        tell: &mut dyn FnMut(&str),
    ) -> Result<(Comparison<'m>, ModelResult), EvalError> {
        let start = Instant::now();
        let mut result = ModelResult::new(folder, model, KvCacheDtype::F32);
        let vocab_size = model.config().vocab_size;
        let mut comparison = Comparison { vocab_size, texts: Vec::new(), answers: Vec::new() };
        for (name, windows) in &self.material.texts {
            tell(&result.describe(name));
            let (baseline, perplexity) =
                Baseline::measure(self.backend, model, windows, self.options.threads)?;
            comparison.texts.push(baseline);
            result.push_text(name, perplexity, None);
        }
        for task in &self.material.tasks {
            tell(&result.describe(task.name()));
            let score = answer(self.backend, model, task, KvCacheDtype::F32, self.options.threads)?;
            comparison.answers.push(score.answers.clone());
            result.push_task(task, score, None);
        }
        result.seconds = start.elapsed().as_secs_f64();
        Ok((comparison, result))
    }

    /// The row of a model.
    fn model(
        &self,
        folder: &Path,
        model: &dyn Model,
        kv_cache: KvCacheDtype,
        mut comparison: Option<&mut Comparison<'_>>,
        tell: &mut dyn FnMut(&str),
    ) -> Result<ModelResult, EvalError> {
        let start = Instant::now();
        let (backend, threads) = (self.backend, self.options.threads);
        let mut result = ModelResult::new(folder, model, kv_cache);
        if let Some(comparison) = &comparison
            && comparison.vocab_size != model.config().vocab_size
        {
            let (ours, theirs) = (model.config().vocab_size, comparison.vocab_size);
            return Err(EvalError::Incomparable {
                path: folder.to_owned(),
                reason: format!("its vocabulary has {ours} tokens, the baseline's {theirs}"),
            });
        }
        for (index, (name, windows)) in self.material.texts.iter().enumerate() {
            tell(&result.describe(name));
            let (perplexity, distance) = match &mut comparison {
                Some(comparison) => {
                    let baseline = &mut comparison.texts[index];
                    let (perplexity, distance) =
                        divergence(backend, model, windows, kv_cache, baseline, threads)?;
                    (perplexity, Some(distance))
                }
                None => (perplexity(backend, model, windows, kv_cache, threads)?, None),
            };
            result.push_text(name, perplexity, distance);
        }
        for (index, task) in self.material.tasks.iter().enumerate() {
            tell(&result.describe(task.name()));
            let score = answer(backend, model, task, kv_cache, threads)?;
            let same = comparison.as_ref().map(|comparison| same(&comparison.answers[index], &score.answers));
            result.push_task(task, score, same);
        }
        result.seconds = start.elapsed().as_secs_f64();
        Ok(result)
    }
}

/// Share of equal answers.
fn same(a: &[usize], b: &[usize]) -> f64 {
    a.iter().zip(b).filter(|(a, b)| a == b).count() as f64 / a.len() as f64
}

impl ModelResult {
    fn new(folder: &Path, model: &dyn Model, kv_cache: KvCacheDtype) -> Self {
        let info = model.linear_info();
        let (format, bits_per_weight) = formats(&info);
        Self {
            checkpoint: folder.display().to_string(),
            format,
            kv_cache: kv_cache.name(),
            bits_per_weight,
            seconds: 0.0,
            texts: Vec::new(),
            tasks: Vec::new(),
        }
    }

    /// `model (mxfp4, bf16 cache): text.txt`.
    fn describe(&self, material: &str) -> String {
        format!("{} ({}, {} KV cache): {material}", self.checkpoint, self.format, self.kv_cache)
    }

    fn push_text(&mut self, name: &str, perplexity: Perplexity, divergence: Option<Divergence>) {
        self.texts.push(TextResult { text: name.to_owned(), perplexity, divergence });
    }

    fn push_task(&mut self, task: &Task, score: TaskScore, same_answers: Option<f64>) {
        self.tasks.push(TaskResult { task: task.name().to_owned(), score, same_answers });
    }
}

/// Formats and bits per weight of the linear layers; of the head only if it is quantized.
fn formats(info: &[LinearInfo]) -> (String, f64) {
    let any = info.iter().any(|row| row.scheme.is_some());
    let counted: Vec<_> =
        info.iter().filter(|row| row.scheme.is_some() || row.group.contains('+') || row.layers > 1).collect();
    let (parameters, bytes) = counted.iter().fold((0, 0), |(p, b), row| (p + row.parameters, b + row.bytes));
    let bits = 8.0 * bytes as f64 / (parameters as f64).max(1.0);
    let mut names: Vec<String> = Vec::new();
    for row in counted.iter().filter(|row| row.scheme.is_some() || !any) {
        let name = row.scheme.map_or_else(|| "unquantized".to_owned(), |scheme| scheme.to_string());
        if !names.contains(&name) {
            names.push(name);
        }
    }
    (names.join(" + "), bits)
}

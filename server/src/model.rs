//! A loaded model as HTTP sees it: an engine, a tokenizer, a chat template, names and defaults.

use std::path::Path;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use config::{GenerationConfig as DefaultsFrom, ReasoningParser, ServerConfig, ToolCallParser};
use models::checkpoint::{Checkpoint, CheckpointError};
use models::{ConfigError, GenerationConfig, ModelConfig, ModelError};

use crate::answer::ToolFormat;
use crate::device::{self, ShareOfCpu, engine_options};
use crate::engine::{EngineError, EngineHandle, check_model_len};
use crate::grammar::GrammarCompiler;
use crate::telemetry::{EngineMetrics, Telemetry};
use crate::tokenizer::{ChatTemplate, TemplateError, Tokenizer, TokenizerError};

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The folder is not there.
    #[error("{}: no such folder", .0.display())]
    NoFolder(std::path::PathBuf),
    /// The path is a file.
    #[error("{}: not a folder; mxserve takes a Hugging Face folder (mxconvert makes one of a GGUF file)", .0.display())]
    NotAFolder(std::path::PathBuf),
    /// `config.json` or the weights' files.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// `config.json` or `generation_config.json` says what this server does not do.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The tokenizer's files.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The file given as `--chat-template`.
    #[error("--chat-template: {0}")]
    Template(#[from] TemplateError),
    /// `--chat-template` for a model without a tokenizer.
    #[error("--chat-template has no effect: {} has no tokenizer.json", .0.display())]
    TemplateWithoutTokenizer(std::path::PathBuf),
    /// A share of GPU memory for a model on the CPU.
    #[error(transparent)]
    Share(#[from] ShareOfCpu),
    /// The device, the weights, or the sizes.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// What can go wrong on the engine's thread.
#[derive(Debug, thiserror::Error)]
enum OpenError {
    #[error(transparent)]
    Device(#[from] kernels::Error),
    #[error(transparent)]
    Model(#[from] ModelError),
}

/// A loaded model.
#[derive(Debug)]
pub struct ServedModel {
    /// Names that requests may use; the first one is the main one.
    pub(crate) names: Vec<String>,
    /// The folder, as it was given.
    pub(crate) root: String,
    /// When it was loaded, in seconds since 1970.
    pub(crate) created: u64,
    /// What runs it.
    pub(crate) engine: EngineHandle,
    /// Sequences that the engine takes at a time, running and waiting.
    pub(crate) max_sequences: usize,
    /// `None`: prompts are token ids, answers have no text.
    pub(crate) tokenizer: Option<Arc<Tokenizer>>,
    /// Structured output; as the tokenizer.
    pub(crate) grammars: Option<Arc<GrammarCompiler>>,
    /// Or why there is none.
    pub(crate) chat_template: Result<ChatTemplate, String>,
    /// How the model writes calls of tools; `None`: nothing says that it can.
    pub(crate) tool_format: Option<ToolFormat>,
    /// Whether the model may think before it answers, between `<think>` and `</think>`.
    pub(crate) reasons: bool,
    /// Defaults of the sampling parameters, and the end-of-sequence tokens.
    pub(crate) defaults: GenerationConfig,
}

/// The names that requests may use for the model in `folder`.
pub fn served_names(config: &ServerConfig, folder: &Path) -> Vec<String> {
    if !config.served_model_name.is_empty() {
        return config.served_model_name.clone();
    }
    let path = folder.display().to_string();
    // `.` and `..` have no name of their own.
    let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    let name = folder.file_name().map(|name| name.to_string_lossy().into_owned());
    let mut names: Vec<String> = name.into_iter().chain([path]).collect();
    names.dedup();
    names
}

/// A model's folder, read as far as it can be without its weights.
pub(crate) struct Opened {
    checkpoint: Checkpoint,
    tokenizer: Option<Arc<Tokenizer>>,
    chat_template: Result<ChatTemplate, String>,
    defaults: GenerationConfig,
}

impl Opened {
    /// Reads and checks everything but the weights.
    ///
    /// # Errors
    /// See [`LoadError`].
    pub(crate) fn open(config: &ServerConfig, folder: &Path) -> Result<Self, LoadError> {
        if !folder.exists() {
            return Err(LoadError::NoFolder(folder.to_owned()));
        }
        if !folder.is_dir() {
            return Err(LoadError::NotAFolder(folder.to_owned()));
        }
        let checkpoint = Checkpoint::open(folder)?;
        let model_config = ModelConfig::parse(checkpoint.config())?;
        // The engine would refuse it too, after it has loaded the weights.
        check_model_len(config.max_model_len.unwrap_or(1), model_config.max_model_len)?;
        let tokenizer = Tokenizer::load(folder)?.map(Arc::new);
        let chat_template = load_template(config, folder, tokenizer.as_deref())?;
        let mut defaults = GenerationConfig::read(folder, &model_config)?;
        if config.generation_config == DefaultsFrom::Vllm {
            defaults =
                GenerationConfig { eos_token_ids: defaults.eos_token_ids, ..GenerationConfig::default() };
        }
        Ok(Self { checkpoint, tokenizer, chat_template, defaults })
    }
}

impl ServedModel {
    /// Loads the model in `folder`; takes as long as reading it.
    ///
    /// # Errors
    /// See [`LoadError`].
    pub fn load(config: &ServerConfig, folder: &Path, telemetry: &Arc<Telemetry>) -> Result<Self, LoadError> {
        let Opened { checkpoint, tokenizer, chat_template, defaults } = Opened::open(config, folder)?;
        let device = device::choose(config);
        let observer = Box::new(EngineMetrics::new(telemetry));
        let engine = EngineHandle::start(engine_options(config, device)?, observer, move || {
            let start = Instant::now();
            let backend = kernels::open(device)?;
            let device_secs = start.elapsed().as_secs_f64();
            let model = models::load(backend.as_ref(), &checkpoint)?;
            let weights_secs = start.elapsed().as_secs_f64() - device_secs;
            tracing::debug!(device_secs, weights_secs, "loaded the model");
            Ok::<_, OpenError>((backend, model))
        })?;
        let grammars = tokenizer.as_ref().map(|tokenizer| {
            let vocab_size = engine.info().vocab_size;
            let compiler =
                GrammarCompiler::new(Arc::clone(tokenizer), vocab_size, defaults.eos_token_ids.clone());
            Arc::new(compiler)
        });
        Ok(Self {
            names: served_names(config, folder),
            root: folder.display().to_string(),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            max_sequences: engine.info().max_num_seqs.saturating_add(config.max_num_queued_reqs),
            engine,
            tokenizer,
            grammars,
            tool_format: tool_format(config, chat_template.as_ref().ok()),
            reasons: reasons(config, chat_template.as_ref().ok()),
            chat_template,
            defaults,
        })
    }
}

/// How the model writes calls of tools, if its template tells it of any.
fn tool_format(config: &ServerConfig, template: Option<&ChatTemplate>) -> Option<ToolFormat> {
    let source = template.map(ChatTemplate::source).filter(|source| source.contains("tools"))?;
    match config.tool_call_parser {
        ToolCallParser::Auto => ToolFormat::of_template(source),
        ToolCallParser::Hermes => Some(ToolFormat::Hermes),
        ToolCallParser::Llama3Json => Some(ToolFormat::Llama3Json),
        ToolCallParser::Mistral => Some(ToolFormat::Mistral),
    }
}

fn reasons(config: &ServerConfig, template: Option<&ChatTemplate>) -> bool {
    match config.reasoning_parser {
        ReasoningParser::Auto => template.is_some_and(|template| template.source().contains("</think>")),
        ReasoningParser::None => false,
        ReasoningParser::Think => true,
    }
}

/// The chat template, or why there is none. A template that was asked for must work; the model's own may be beyond
/// this Jinja, and then only chats are refused.
fn load_template(
    config: &ServerConfig,
    folder: &Path,
    tokenizer: Option<&Tokenizer>,
) -> Result<Result<ChatTemplate, String>, LoadError> {
    let file = config.chat_template.as_deref();
    let Some(tokenizer) = tokenizer else {
        return match file {
            Some(_) => Err(LoadError::TemplateWithoutTokenizer(folder.to_owned())),
            None => Ok(Err("this model has no tokenizer; it takes token ids, at /v1/completions".to_owned())),
        };
    };
    match ChatTemplate::load(folder, tokenizer, file) {
        Ok(Some(template)) => Ok(Ok(template)),
        Ok(None) => {
            Ok(Err("this model has no chat template; use /v1/completions, or --chat-template".to_owned()))
        }
        Err(error) if file.is_some() => Err(error.into()),
        Err(error) => {
            tracing::warn!("chats will be refused: {error}");
            Ok(Err(format!("the model's chat template cannot be used: {error}")))
        }
    }
}

//! `mxconvert eval`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;
use converter::eval::EvalOptions;
use kernels::KvCacheDtype;
use models::checkpoint::ActivationChoice;

use super::Invocation;

#[derive(Debug, Args)]
pub(super) struct EvalArgs {
    /// Checkpoint folders, quantized or not.
    #[arg(required = true, value_name = "CHECKPOINT")]
    checkpoints: Vec<PathBuf>,

    /// The checkpoint to compare with [default: the first unquantized one].
    #[arg(long, value_name = "CHECKPOINT")]
    baseline: Option<PathBuf>,

    /// Text whose perplexity is measured; may be repeated.
    #[arg(long, value_name = "FILE", required_unless_present = "tasks")]
    text: Vec<PathBuf>,

    /// Multiple-choice questions: jsonl with question, choices, label (PIQA, ARC) or ctx, endings, label (HellaSwag).
    #[arg(long, value_name = "FILE", num_args = 1..)]
    tasks: Vec<PathBuf>,

    /// Windows of each text, side by side from its beginning; each is scored alone.
    #[arg(long, value_name = "N", default_value = "10")]
    windows: NonZeroUsize,

    /// Tokens of a window.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = window_tokens)]
    window_tokens: usize,

    /// How keys and values are stored: bf16, f32, mxfp8, mxint8, mxfp4; with several, each checkpoint is measured with
    /// each.
    #[arg(long, value_name = "DTYPE,…", value_delimiter = ',', default_value = "f32")]
    kv_cache_dtype: Vec<KvCacheDtype>,

    /// Activation format of quantized layers: declared, none, or a format; with several, each quantized checkpoint is
    /// measured with each.
    #[arg(long, value_name = "FORMAT,…", value_delimiter = ',', default_value = "declared")]
    activation: Vec<ActivationChoice>,

    /// Questions of each task [default: all].
    #[arg(long, value_name = "N")]
    max_questions: Option<NonZeroUsize>,

    /// Threads [default: all cores].
    #[arg(long)]
    threads: Option<NonZeroUsize>,

    /// Print JSON, with every window.
    #[arg(long)]
    json: bool,
}

impl EvalArgs {
    pub(super) fn into_invocation(self) -> Invocation {
        let mut options = EvalOptions {
            baseline: self.baseline,
            texts: self.text,
            tasks: self.tasks,
            windows: self.windows.get(),
            window_tokens: self.window_tokens,
            kv_caches: self.kv_cache_dtype,
            activations: self.activation,
            max_questions: self.max_questions.map(NonZeroUsize::get),
            ..EvalOptions::new(self.checkpoints)
        };
        options.threads = self.threads.unwrap_or(options.threads);
        Invocation::Eval { options: Box::new(options), json: self.json }
    }
}

/// A window scores all of its tokens but the first.
fn window_tokens(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(tokens @ 2..) => Ok(tokens),
        _ => Err("a number of tokens, 2 or more, is expected".to_owned()),
    }
}

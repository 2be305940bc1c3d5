//! The flags of `mxserve bench`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use config::DeviceChoice;
use kernels::KvCacheDtype;
use kernels::mx::Scheme;
use models::synthetic::Shape;

use super::BenchError;

/// What to measure.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Folder of the model
    #[arg(value_name = "MODEL", conflicts_with_all = ["shape", "url"])]
    model: Option<PathBuf>,

    /// Sizes of a known model, with random weights: smollm2-135m, llama-1b, qwen3-4b, llama-8b, llama-70b-tp8
    #[arg(long, conflicts_with = "url")]
    shape: Option<Shape>,

    /// How results are written
    #[arg(short, long, default_value = "md")]
    pub(super) output: OutputFormat,

    #[command(flatten)]
    offline: OfflineFlags,

    #[command(flatten)]
    http: HttpFlags,
}

/// Flags for a model on a device.
#[derive(Debug, Args)]
#[command(next_help_heading = "Offline")]
struct OfflineFlags {
    /// Scheme of a synthetic model's linear layers: mxfp4, mxfp6:mxint8, … [default: BF16]
    #[arg(long, value_name = "SCHEME", requires = "shape")]
    format: Option<Scheme>,

    /// Scheme of a synthetic model's output head [default: BF16]
    #[arg(long, value_name = "SCHEME", requires = "shape")]
    head_format: Option<Scheme>,

    /// Lengths of prompts to compute; 0 for none
    #[arg(short = 'p', long, value_name = "TOKENS", value_delimiter = ',', default_values_t = [512])]
    n_prompt: Vec<usize>,

    /// Numbers of tokens to generate; 0 for none
    #[arg(short = 'n', long, value_name = "TOKENS", value_delimiter = ',', default_values_t = [128])]
    n_gen: Vec<usize>,

    /// A prompt and a number of tokens to generate after it, timed together: 512,128
    #[arg(long, value_name = "PROMPT,GEN", value_parser = pair)]
    pg: Vec<(usize, usize)>,

    /// Numbers of sequences to compute together
    #[arg(short, long, value_name = "N", value_delimiter = ',', default_values_t = [1])]
    batch: Vec<usize>,

    /// Tokens of context before those that are generated
    #[arg(short, long, value_name = "TOKENS", value_delimiter = ',', default_values_t = [0])]
    depth: Vec<usize>,

    /// Repetitions of each test
    #[arg(short, long, value_name = "N", default_value_t = 5)]
    repetitions: usize,

    /// Do not run each test once before timing it
    #[arg(long)]
    no_warmup: bool,

    /// Threads of the CPU backend [default: one per core]
    #[arg(short, long, value_name = "N", value_delimiter = ',')]
    threads: Vec<usize>,

    /// Device to run on: auto, cpu, cuda or cuda:N [default: auto]
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceChoice>,

    /// Element type of the KV cache: bf16, f32, mxfp8, mxint8, mxfp4 [default: bf16]
    #[arg(long, value_name = "DTYPE")]
    kv_cache_dtype: Option<KvCacheDtype>,

    /// Tokens computed in one step [default: the device's, 256 on the CPU]
    #[arg(long, value_name = "N")]
    max_num_batched_tokens: Option<usize>,
}

/// Flags for a server.
#[derive(Debug, Args)]
#[command(next_help_heading = "Over HTTP")]
struct HttpFlags {
    /// Measure the OpenAI-style server at this address: http://127.0.0.1:8000
    #[arg(long)]
    url: Option<reqwest::Url>,

    /// Name of the model to ask for [default: the first one that the server reports]
    #[arg(long, value_name = "NAME", requires = "url")]
    served_model: Option<String>,

    /// Bearer token
    #[arg(long, env = "MXSERVE_BENCH_API_KEY", hide_env_values = true, value_name = "KEY")]
    api_key: Option<String>,

    /// Requests at a time
    #[arg(long, value_name = "N", requires = "url", default_value_t = 1)]
    concurrency: usize,

    /// Requests in all [default: as many as at a time]
    #[arg(long, value_name = "N", requires = "url")]
    num_prompts: Option<usize>,

    /// Words of each prompt, about as many tokens
    #[arg(long, value_name = "WORDS", requires = "url", default_value_t = 128)]
    input_len: usize,

    /// Tokens of each answer
    #[arg(long, value_name = "TOKENS", requires = "url", default_value_t = 128)]
    output_len: usize,

    /// Chooses the prompts: another seed, other prompts. A server that caches prefixes has those of the same run before
    #[arg(long, value_name = "N", requires = "url", default_value_t = 0)]
    seed: u64,
}

/// How results are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum OutputFormat {
    /// A Markdown table.
    Md,
    /// A JSON array.
    Json,
}

/// What is measured, offline.
#[derive(Debug)]
pub(super) struct OfflineBench {
    pub(super) model: ModelSource,
    pub(super) prompts: Vec<usize>,
    pub(super) generations: Vec<usize>,
    pub(super) both: Vec<(usize, usize)>,
    pub(super) batches: Vec<usize>,
    pub(super) depths: Vec<usize>,
    pub(super) repetitions: usize,
    pub(super) warmup: bool,
    /// Numbers of threads; `None` is the default.
    pub(super) threads: Vec<Option<usize>>,
    pub(super) device: Option<DeviceChoice>,
    pub(super) kv_cache_dtype: Option<KvCacheDtype>,
    pub(super) max_num_batched_tokens: Option<usize>,
}

/// Where the weights come from.
#[derive(Debug)]
pub(super) enum ModelSource {
    /// A checkpoint.
    Folder(PathBuf),
    /// Random weights.
    Synthetic { shape: Shape, linears: Option<Scheme>, head: Option<Scheme> },
}

/// What is measured, over HTTP.
#[derive(Debug)]
pub(super) struct HttpBench {
    pub(super) url: reqwest::Url,
    pub(super) model: Option<String>,
    pub(super) api_key: Option<String>,
    pub(super) concurrency: usize,
    pub(super) requests: usize,
    pub(super) input_words: usize,
    pub(super) output_tokens: usize,
    pub(super) seed: u64,
}

/// One of the two.
pub(super) enum Mode {
    Offline(Box<OfflineBench>),
    Http(HttpBench),
}

impl BenchArgs {
    /// Sorts the flags out.
    pub(super) fn mode(self) -> Result<Mode, BenchError> {
        if let Some(url) = self.http.url.clone() {
            return self.http.resolve(url).map(Mode::Http);
        }
        let flags = self.offline;
        let model = match (self.model, self.shape) {
            (Some(folder), _) => ModelSource::Folder(folder),
            (None, Some(shape)) => {
                ModelSource::Synthetic { shape, linears: flags.format, head: flags.head_format }
            }
            (None, None) => {
                let message = "what is to be measured? mxserve bench MODEL, --shape NAME or --url URL";
                return Err(BenchError::Arguments(message.to_owned()));
            }
        };
        for (flag, values) in [("--batch", flags.batch.as_slice()), ("--repetitions", &[flags.repetitions])] {
            if values.contains(&0) {
                return Err(BenchError::Arguments(format!("{flag} must be at least 1")));
            }
        }
        let threads =
            if flags.threads.is_empty() { vec![None] } else { flags.threads.into_iter().map(Some).collect() };
        let some = |lengths: Vec<usize>| lengths.into_iter().filter(|&tokens| tokens > 0).collect();
        Ok(Mode::Offline(Box::new(OfflineBench {
            model,
            prompts: some(flags.n_prompt),
            generations: some(flags.n_gen),
            both: flags.pg,
            batches: flags.batch,
            depths: flags.depth,
            repetitions: flags.repetitions,
            warmup: !flags.no_warmup,
            threads,
            device: flags.device,
            kv_cache_dtype: flags.kv_cache_dtype,
            max_num_batched_tokens: flags.max_num_batched_tokens,
        })))
    }
}

impl HttpFlags {
    fn resolve(self, url: reqwest::Url) -> Result<HttpBench, BenchError> {
        let requests = self.num_prompts.unwrap_or(self.concurrency);
        for (flag, value) in [
            ("--concurrency", self.concurrency),
            ("--num-prompts", requests),
            ("--input-len", self.input_len),
            ("--output-len", self.output_len),
        ] {
            if value == 0 {
                return Err(BenchError::Arguments(format!("{flag} must be at least 1")));
            }
        }
        Ok(HttpBench {
            url,
            model: self.served_model,
            api_key: self.api_key,
            concurrency: self.concurrency,
            requests,
            input_words: self.input_len,
            output_tokens: self.output_len,
            seed: self.seed,
        })
    }
}

/// `512,128`, both at least 1.
fn pair(text: &str) -> Result<(usize, usize), String> {
    let parsed = text.split_once(',').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    parsed.filter(|&(a, b)| a > 0 && b > 0).ok_or_else(|| "two positive numbers, as 512,128".to_owned())
}

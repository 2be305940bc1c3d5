//! The engine with a real model on the CPU backend, and on a GPU where there is one.

mod gpu;
mod lifecycle;
mod results;

use std::path::Path;
use std::sync::OnceLock;

use kernels::{Device, TokenLogprobs};
use models::checkpoint::Checkpoint;
use server::engine::{
    EngineHandle, EngineObserver, EngineOptions, FinishReason, GenerateRequest, KvCacheSize, Loaded,
    NgramLookup, Pooling, Sampling, Scheduling, StopConditions, TokenEvent, Usage,
};
use tokio::sync::mpsc::UnboundedReceiver;

/// The bundled model: Llama, 6 layers, 4096 tokens, context 1024.
const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/models/rustdoc-6m");

/// Backend and model, as the server loads them.
fn load() -> Result<Loaded, Box<dyn std::error::Error + Send + Sync>> {
    load_on(Device::Cpu { threads: 2 })
}

fn load_on(device: Device) -> Result<Loaded, Box<dyn std::error::Error + Send + Sync>> {
    let backend = kernels::open(device)?;
    let model = models::load(backend.as_ref(), &Checkpoint::open(Path::new(MODEL))?)?;
    Ok((backend, model))
}

/// An engine that nobody observes.
fn start(options: EngineOptions) -> EngineHandle {
    start_observed(options, Box::new(()))
}

fn start_observed(options: EngineOptions, observer: Box<dyn EngineObserver>) -> EngineHandle {
    EngineHandle::start(options, observer, load).expect("the bundled model loads")
}

/// Small limits, so that tests start quickly: 16 sequences, steps of 64 tokens, a KV cache of `kv_blocks` blocks.
fn options(kv_blocks: usize) -> EngineOptions {
    EngineOptions {
        max_num_seqs: 16,
        max_num_batched_tokens: 64,
        kv_cache: KvCacheSize::Blocks(kv_blocks),
        ..EngineOptions::default()
    }
}

/// Tokens of a text that the model was not trained on.
fn text_tokens() -> &'static [u32] {
    static TOKENS: OnceLock<Vec<u32>> = OnceLock::new();
    TOKENS.get_or_init(|| {
        let folder = Path::new(MODEL);
        let tokenizer =
            tokenizers::Tokenizer::from_file(folder.join("tokenizer.json")).expect("tokenizer.json");
        let text = std::fs::read_to_string(folder.join("heldout.txt")).expect("heldout.txt");
        let text: String = text.chars().take(20_000).collect();
        tokenizer.encode(text, false).expect("text encodes").get_ids().to_vec()
    })
}

/// A greedy request for exactly `max_tokens` tokens after `prompt_len` tokens of text.
fn request(prompt_len: usize, max_tokens: usize) -> GenerateRequest {
    GenerateRequest {
        id: format!("{prompt_len}+{max_tokens}"),
        prompt: text_tokens()[..prompt_len].to_vec(),
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        stop: StopConditions { max_tokens, ..StopConditions::default() },
        scheduling: Scheduling::default(),
        logprobs: None,
        prompt_logprobs: None,
        pooling: None,
    }
}

/// Everything that was heard of a sequence.
#[derive(Debug, Default, PartialEq)]
struct Heard {
    /// Once the prompt is done.
    cached_tokens: Option<usize>,
    prompt: Option<Vec<TokenLogprobs>>,
    tokens: Vec<u32>,
    logprobs: Vec<TokenLogprobs>,
    embedding: Option<Vec<f32>>,
    end: Option<(FinishReason, Usage)>,
}

impl Heard {
    /// As it would be without a prefix cache.
    fn but_for_the_cache(mut self) -> Self {
        self.cached_tokens = self.cached_tokens.map(|_| 0);
        if let Some((_, usage)) = &mut self.end {
            usage.cached_tokens = 0;
        }
        self
    }
}

/// Listens until the channel closes; checks the order of events.
fn hear(mut events: UnboundedReceiver<TokenEvent>) -> Heard {
    let mut heard = Heard::default();
    while let Some(event) = events.blocking_recv() {
        assert_eq!(heard.end, None, "{event:?} after the end");
        match event {
            TokenEvent::Prompt { cached_tokens, logprobs } => {
                assert!(
                    heard.tokens.is_empty() && heard.cached_tokens.is_none(),
                    "the prompt comes first, and once"
                );
                heard.cached_tokens = Some(cached_tokens);
                heard.prompt = logprobs;
            }
            TokenEvent::Token { id, logprobs, .. } => {
                heard.tokens.push(id);
                heard.logprobs.extend(logprobs);
            }
            TokenEvent::Embedding(vector) => heard.embedding = Some(vector),
            TokenEvent::Finished { reason, usage } => heard.end = Some((reason, usage)),
        }
    }
    heard
}

/// Runs one request to its end.
fn run(engine: &EngineHandle, request: GenerateRequest) -> Heard {
    hear(engine.submit(request).expect("the engine takes it"))
}

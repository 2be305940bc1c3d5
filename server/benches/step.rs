//! What a step costs beside the model: scheduling, block tables, sampling parameters, events, metrics. The model here
//! computes nothing, and its eight logits are all zero.
//!
//! `cargo bench -p server --bench step`: on one core of a Zen 4, 0.06 ms greedy, 0.07 ms sampled, 0.10 ms penalized and
//! 0.57 ms drafted, where each of 256 sequences looks for its last tokens in 512 to 1000 others. Rows of logits that are
//! changed on the host (penalties, biases, masks) are copied there and back, which grows with the vocabulary; with the
//! eight tokens of this one, it hardly counts.

use std::hint::black_box;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use kernels::{Backend, Device};
use models::{KvCache, LinearInfo, Model, ModelConfig, Observer, StepInputs, Workspace};
use server::engine::{
    EngineHandle, EngineOptions, GenerateRequest, KvCacheSize, Loaded, NgramLookup, Sampling, Scheduling,
    StopConditions,
};
use server::telemetry::{EngineMetrics, Telemetry};

/// Sequences that run.
const SEQUENCES: usize = 256;

/// Tokens of each prompt.
const PROMPT: usize = 512;

/// Steps that one measurement takes.
const STEPS: u64 = 500;

/// A decoder that leaves all logits zero.
struct Null(ModelConfig);

impl Model for Null {
    fn config(&self) -> &ModelConfig {
        &self.0
    }
    fn forward_observed(
        &self,
        _: &dyn Backend,
        step: &StepInputs,
        _: &mut KvCache,
        _: &mut Workspace,
        _: &mut dyn Observer,
    ) {
        black_box(step);
    }
    fn logits(&self, _: &dyn Backend, rows: &[u32], _: &mut Workspace) {
        black_box(rows);
    }
    fn linear_info(&self) -> Vec<LinearInfo> {
        Vec::new()
    }
    fn parameters(&self) -> usize {
        0
    }
}

fn load() -> Result<Loaded, Box<dyn std::error::Error + Send + Sync>> {
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 32,
        "intermediate_size": 32,
        "max_position_embeddings": 4096,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "vocab_size": 8,
    });
    let backend = kernels::open(Device::Cpu { threads: 1 })?;
    Ok((backend, Box::new(Null(ModelConfig::parse(&config)?))))
}

fn requests(sampling: &Sampling) -> Vec<GenerateRequest> {
    let request = |index: usize| GenerateRequest {
        id: index.to_string(),
        prompt: (0..PROMPT).map(|at| ((at * (index + 3)) >> 2) as u32 % 8).collect(),
        sampling: Sampling { seed: index as u64, ..sampling.clone() },
        stop: StopConditions { max_tokens: usize::MAX, ..StopConditions::default() },
        scheduling: Scheduling::default(),
        logprobs: None,
        prompt_logprobs: None,
        pooling: None,
    };
    (0..SEQUENCES).map(request).collect()
}

/// Time of a step in which every sequence gets a token, while a thread hears of all of them.
fn step_time(options: EngineOptions, sampling: &Sampling) -> Duration {
    let telemetry = Arc::new(Telemetry::new("bench").expect("metrics"));
    let engine =
        EngineHandle::start(options, Box::new(EngineMetrics::new(&telemetry)), load).expect("an engine");
    let mut channels = engine.submit_all(requests(sampling)).expect("room for all");
    let listener = thread::spawn(move || {
        while !channels.is_empty() {
            for channel in &mut channels {
                while channel.try_recv().is_ok() {}
            }
            channels.retain(|channel| !channel.is_closed());
            thread::sleep(Duration::from_millis(1));
        }
    });
    let wait = |reached: &dyn Fn() -> bool| {
        while !reached() {
            thread::sleep(Duration::from_micros(100));
        }
        (Instant::now(), engine.stats().steps)
    };
    let prompts = (SEQUENCES * PROMPT) as u64;
    let (start, first) = wait(&|| engine.stats().prompt_tokens == prompts);
    let (end, last) = wait(&|| engine.stats().steps >= first + STEPS);
    engine.shutdown();
    listener.join().expect("the listener ends");
    (end - start) / (last - first) as u32
}

fn steps(c: &mut Criterion) {
    let options = EngineOptions {
        max_num_seqs: SEQUENCES,
        max_num_batched_tokens: 2048,
        kv_cache: KvCacheSize::Blocks(SEQUENCES * 256),
        ..EngineOptions::default()
    };
    let lookup = NgramLookup { num_speculative_tokens: 4, max: 4, min: 2 };
    let speculating = EngineOptions { speculation: Some(lookup), ..options };
    let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
    let penalized = Sampling { repetition_penalty: 1.1, ..Sampling::default() };
    let mut group = c.benchmark_group(format!("step of {SEQUENCES} sequences"));
    group.sample_size(10);
    for (name, options, sampling) in [
        ("greedy", options, &greedy),
        ("sampled", options, &Sampling::default()),
        ("penalized", options, &penalized),
        ("drafted", speculating, &Sampling::default()),
    ] {
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|iterations| step_time(options, sampling) * iterations as u32);
        });
    }
    group.finish();
}

criterion_group!(benches, steps);
criterion_main!(benches);

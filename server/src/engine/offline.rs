//! Steps of chosen batches, without scheduler, clients or a thread of their own: what benchmarks measure. What a step
//! does is the server's [`ModelRunner`].

use std::sync::Arc;

use kernels::{KvCacheDtype, MemoryAccount};
use models::Model;

use super::block_manager::{BlockManager, blocks_for};
use super::error::EngineError;
use super::handle::Loaded;
use super::mask_workers::Constraints;
use super::options::{EngineOptions, KvCacheSize};
use super::request::{GenerateRequest, Sampling, Scheduling, StopConditions};
use super::runner::{ModelRunner, StepOutput};
use super::scheduler::{Batch, BatchItem};
use super::sequence::{Sequence, SequenceId};

/// How large an [`OfflineBatch`] may become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OfflineSizes {
    /// Most sequences.
    pub sequences: usize,
    /// Most tokens of each, prompt and output.
    pub tokens_per_sequence: usize,
    /// Most tokens that one step computes.
    pub max_num_batched_tokens: usize,
    /// How keys and values are stored.
    pub kv_cache_dtype: KvCacheDtype,
}

/// A model, and sequences of equal length that it computes together.
pub struct OfflineBatch {
    runner: ModelRunner,
    memory: Arc<MemoryAccount>,
    blocks: BlockManager,
    sizes: OfflineSizes,
    running: Vec<Sequence>,
    /// None: nothing offline follows a grammar.
    constraints: Constraints,
    batch: Batch,
    output: StepOutput,
}

impl OfflineBatch {
    /// Allocates the KV cache and the memory of steps.
    ///
    /// # Errors
    /// A size is zero, sequences are longer than the model was made for, or the device is out of memory.
    pub fn new((backend, model): Loaded, sizes: OfflineSizes) -> Result<Self, EngineError> {
        let options = EngineOptions {
            max_model_len: Some(sizes.tokens_per_sequence),
            max_num_seqs: sizes.sequences,
            // A decode step has a row for each sequence.
            max_num_batched_tokens: sizes.max_num_batched_tokens.max(sizes.sequences),
            kv_cache: KvCacheSize::Blocks(sizes.sequences * blocks_for(sizes.tokens_per_sequence)),
            kv_cache_dtype: sizes.kv_cache_dtype,
            ..EngineOptions::default()
        };
        let memory = Arc::clone(backend.memory());
        let (runner, engine_sizes) = ModelRunner::new(backend, model, &options)?;
        Ok(Self {
            runner,
            memory,
            blocks: BlockManager::new(engine_sizes.kv_blocks),
            sizes: OfflineSizes { max_num_batched_tokens: options.max_num_batched_tokens, ..sizes },
            running: Vec::with_capacity(sizes.sequences),
            constraints: Constraints::default(),
            batch: Batch::default(),
            output: StepOutput::default(),
        })
    }

    /// The model.
    pub fn model(&self) -> &dyn Model {
        self.runner.model()
    }

    /// Bytes held on the device now, by component.
    pub fn memory(&self) -> &MemoryAccount {
        &self.memory
    }

    /// Forgets all sequences and begins with these prompts; nothing of them is computed yet.
    ///
    /// # Panics
    /// There are more prompts, or longer ones, than the sizes allow, or an empty one.
    pub fn start(&mut self, prompts: &[Vec<u32>]) {
        for sequence in &mut self.running {
            self.blocks.release(&mut sequence.block_table);
        }
        self.running.clear();
        assert!(prompts.len() <= self.sizes.sequences, "{} sequences", prompts.len());
        for (id, prompt) in (0..).zip(prompts) {
            assert!(!prompt.is_empty() && prompt.len() <= self.sizes.tokens_per_sequence, "{}", prompt.len());
            let request = GenerateRequest {
                id: String::new(),
                prompt: prompt.clone(),
                sampling: Sampling { temperature: 0.0, ..Sampling::default() },
                stop: StopConditions { max_tokens: usize::MAX, ..StopConditions::default() },
                scheduling: Scheduling::default(),
                logprobs: None,
                prompt_logprobs: None,
                pooling: None,
            };
            let mut sequence = Sequence::new(SequenceId(id), request, usize::MAX);
            // All blocks at once: their bookkeeping is no part of a step.
            let held = self.blocks.grow(&mut sequence.block_table, self.sizes.tokens_per_sequence);
            assert!(held, "the cache has blocks for all sequences");
            self.running.push(sequence);
        }
    }

    /// Computes the sequences up to token `end`, one after the other, in steps of up to `max_num_batched_tokens`
    /// tokens; draws a token for those that are known no further.
    ///
    /// # Panics
    /// A sequence has fewer than `end` tokens.
    pub fn prefill(&mut self, end: usize) {
        let mut index = 0;
        while index < self.running.len() {
            self.batch.items.clear();
            let mut budget = self.sizes.max_num_batched_tokens;
            while index < self.running.len() && budget > 0 {
                let sequence = &self.running[index];
                assert!(end <= sequence.tokens().len(), "tokens up to {end} are known");
                let missing = end.saturating_sub(sequence.computed());
                let tokens = missing.min(budget);
                if tokens > 0 {
                    let samples = tokens == sequence.remaining();
                    self.batch.items.push(BatchItem { index, tokens, drafts: 0, samples });
                }
                budget -= tokens;
                index += usize::from(tokens == missing);
            }
            self.run();
        }
    }

    /// Computes one token of each sequence and draws the next: prompts have been computed but for the last token.
    ///
    /// # Panics
    /// The sequences are as long as the sizes allow.
    pub fn decode(&mut self) {
        self.batch.items.clear();
        let items =
            (0..self.running.len()).map(|index| BatchItem { index, tokens: 1, drafts: 0, samples: true });
        self.batch.items.extend(items);
        self.run();
    }

    /// Waits for everything that was started.
    pub fn wait(&self) {
        self.runner.wait();
    }

    fn run(&mut self) {
        if self.batch.items.is_empty() {
            return;
        }
        self.runner.launch(&self.running, &self.batch);
        self.runner.finish(&self.running, &self.batch, &mut self.constraints, &mut self.output);
        let mut drawn = self.output.tokens.iter();
        for item in &self.batch.items {
            let sequence = &mut self.running[item.index];
            // There is no client to hear that its prompt is done.
            let _ = sequence.advance(item.tokens);
            if item.samples {
                sequence.push(*drawn.next().expect("a token for each item that samples"));
            }
        }
    }

    /// The tokens of each sequence so far, prompt and output.
    pub fn tokens(&self) -> impl Iterator<Item = &[u32]> {
        self.running.iter().map(Sequence::tokens)
    }
}

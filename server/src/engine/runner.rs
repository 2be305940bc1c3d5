//! Runs one batch on the device: the model over all rows, then a token for each sequence that is due, then the
//! log-probabilities of prompts.

use kernels::{Backend, KvCacheDtype, TokenLogprobs};
use models::{KvCache, Model, StepInputs, StepSequence, Workspace};

use super::block_manager::blocks_for;
use super::options::Sizes;
use super::sampler::{Drawn, Sampler};
use super::scheduler::Batch;
use super::sequence::Sequence;

/// Most rows of logits that are held at a time. Enough for the head's product to be efficient; 64 rows of the largest
/// vocabularies (256 Ki) are 64 MiB.
const MAX_LOGIT_ROWS: usize = 64;

/// The device, the model, and the memory that steps use: allocated once.
pub(super) struct ModelRunner {
    backend: Box<dyn Backend>,
    model: Box<dyn Model>,
    kv_cache: KvCache,
    step: StepInputs,
    workspace: Workspace,
    sampler: Sampler,
    /// Rows of the current chunk of logits; kept for its memory.
    rows: Vec<u32>,
}

/// What a step brought. Kept between steps for its memory.
#[derive(Debug, Default)]
pub(super) struct StepOutput {
    /// One for each item that samples, in order.
    pub(super) drawn: Vec<Drawn>,
    /// The tokens of `drawn`.
    pub(super) tokens: Vec<u32>,
    /// Log-probabilities of prompt tokens, in order, with the index of their sequence among the running ones.
    pub(super) prompt_logprobs: Vec<(usize, TokenLogprobs)>,
}

/// A prompt token to score: row `row` of the step predicts it.
struct PromptRow {
    row: u32,
    target: u32,
    /// Index of the sequence among the running ones.
    index: usize,
    top: usize,
}

impl ModelRunner {
    /// Allocates the KV cache and the memory of steps.
    ///
    /// # Errors
    /// Out of memory.
    pub(super) fn new(
        backend: Box<dyn Backend>,
        model: Box<dyn Model>,
        sizes: Sizes,
        kv_cache_dtype: KvCacheDtype,
    ) -> kernels::Result<Self> {
        let device = backend.as_ref();
        let config = model.config();
        let Sizes { limits, max_model_len, kv_blocks } = sizes;
        // A step has no more sequences than tokens.
        let max_sequences = limits.max_num_seqs.min(limits.max_num_batched_tokens);
        let max_tokens = limits.max_num_batched_tokens;
        let logit_rows = MAX_LOGIT_ROWS.min(max_tokens);
        Ok(Self {
            kv_cache: KvCache::new(device, config, kv_blocks, kv_cache_dtype)?,
            step: StepInputs::new(device, max_tokens, max_sequences, blocks_for(max_model_len))?,
            workspace: Workspace::new(device, config, max_tokens, logit_rows)?,
            sampler: Sampler::new(device, config.vocab_size, logit_rows)?,
            rows: Vec::with_capacity(logit_rows),
            backend,
            model,
        })
    }

    /// Computes `batch`, a plan for the sequences `running`.
    pub(super) fn run(&mut self, running: &[Sequence], batch: &Batch, output: &mut StepOutput) {
        let steps: Vec<StepSequence<'_>> = batch
            .items
            .iter()
            .map(|item| {
                let sequence = &running[item.index];
                let first = sequence.computed();
                StepSequence {
                    tokens: &sequence.tokens()[first..first + item.tokens],
                    first_position: first,
                    block_table: sequence.block_table.blocks(),
                }
            })
            .collect();
        self.step.fill(self.backend.as_ref(), &steps);
        self.model.forward(self.backend.as_ref(), &self.step, &mut self.kv_cache, &mut self.workspace);
        self.sample(running, batch, output);
        self.score_prompts(running, batch, output);
    }

    /// Draws a token for each item that samples, from the logits of its last row.
    fn sample(&mut self, running: &[Sequence], batch: &Batch, output: &mut StepOutput) {
        output.drawn.clear();
        let mut end = 0;
        let due: Vec<(u32, &Sequence)> = batch
            .items
            .iter()
            .filter_map(|item| {
                end += item.tokens;
                item.samples.then(|| (end as u32 - 1, &running[item.index]))
            })
            .collect();
        for chunk in due.chunks(self.workspace.max_logit_rows()) {
            self.logits(chunk.iter().map(|&(row, _)| row));
            let sequences: Vec<&Sequence> = chunk.iter().map(|&(_, sequence)| sequence).collect();
            let logits = self.workspace.logits_mut();
            self.sampler.draw(self.backend.as_ref(), logits, &sequences, &mut output.drawn);
        }
        output.tokens.clear();
        output.tokens.extend(output.drawn.iter().map(|drawn| drawn.token));
    }

    /// Scores the prompt tokens that rows of this batch predict, for the sequences that want it.
    fn score_prompts(&mut self, running: &[Sequence], batch: &Batch, output: &mut StepOutput) {
        output.prompt_logprobs.clear();
        let wanted = prompt_rows(running, batch);
        for chunk in wanted.chunks(self.workspace.max_logit_rows()) {
            self.logits(chunk.iter().map(|wanted| wanted.row));
            let mut first = 0;
            // One call for as many alternatives; neighbours in the batch usually ask for the same number.
            for group in chunk.chunk_by(|a, b| a.top == b.top) {
                let rows: Vec<usize> = (first..first + group.len()).collect();
                let targets: Vec<u32> = group.iter().map(|wanted| wanted.target).collect();
                let logits = self.workspace.logits();
                let vocab = self.model.config().vocab_size;
                let scored = self.backend.logprobs(logits, vocab, &rows, &targets, group[0].top);
                output.prompt_logprobs.extend(group.iter().map(|wanted| wanted.index).zip(scored));
                first += group.len();
            }
        }
    }

    /// Computes the logits of these rows of the step into the workspace.
    fn logits(&mut self, rows: impl Iterator<Item = u32>) {
        self.rows.clear();
        self.rows.extend(rows);
        self.model.logits(self.backend.as_ref(), &self.rows, &mut self.workspace);
    }
}

/// The rows of `batch` whose next token is a prompt token that has not been scored yet.
fn prompt_rows(running: &[Sequence], batch: &Batch) -> Vec<PromptRow> {
    let mut wanted = Vec::new();
    let mut first_row = 0;
    for item in &batch.items {
        let sequence = &running[item.index];
        if let Some((top, unscored)) = sequence.unscored_prompt() {
            let computed = sequence.computed();
            let predicting = computed.max(unscored)..(computed + item.tokens).min(sequence.prompt_len() - 1);
            wanted.extend(predicting.map(|position| PromptRow {
                row: (first_row + position - computed) as u32,
                target: sequence.tokens()[position + 1],
                index: item.index,
                top,
            }));
        }
        first_row += item.tokens;
    }
    wanted
}

//! Runs one batch on the device: the model over all rows, then a token for each sequence that is due, then the
//! log-probabilities of prompts.

use std::time::Instant;

use kernels::{Backend, KvCacheDtype, TokenLogprobs};
use models::{KvCache, Model, OutputRows, StepInputs, StepSequence, Workspace};

use super::block_manager::blocks_for;
use super::decode_graphs::{DecodeGraphs, DecodeStep};
use super::error::EngineError;
use super::mask_workers::Constraints;
use super::options::{EngineInfo, EngineOptions, ModelNeeds, Sizes};
use super::pooling::PoolingState;
use super::request::Pooling;
use super::sampler::{Draw, Drawn, Sampler};
use super::scheduler::Batch;
use super::sequence::Sequence;

/// Rows of logits that are held at a time, if no more sequences run. Enough for the head's product to be efficient; 64
/// rows of the largest vocabularies (256 Ki) are 64 MiB.
const MIN_LOGIT_ROWS: usize = 64;

/// The device, the model, and the memory that steps use: allocated once.
pub(super) struct ModelRunner {
    backend: Box<dyn Backend>,
    model: Box<dyn Model>,
    kv_cache: KvCache,
    step: StepInputs,
    workspace: Workspace,
    sampler: Sampler,
    graphs: DecodeGraphs,
    /// Whether the launched step has left the logits of its rows, one for each sequence, in the workspace.
    has_logits: bool,
    /// Which rows of the launched step have hidden states, and which of these score prompts.
    outputs: Outputs,
    prompt_rows: Vec<PromptRow>,
    /// Rows of the current chunk of logits; kept for its memory.
    rows: Vec<u32>,
}

/// Rows of a step whose hidden states somebody wants, ascending.
#[derive(Debug, Default)]
struct Outputs {
    rows: Vec<u32>,
    /// Whether all rows have hidden states, whoever wants them.
    are_all: bool,
}

/// What a step brought. Kept between steps for its memory.
#[derive(Debug, Default)]
pub(super) struct StepOutput {
    /// For each item that samples, in order, its draws.
    pub(super) drawn: Vec<Drawn>,
    /// The tokens of `drawn`.
    pub(super) tokens: Vec<u32>,
    /// Log-probabilities of prompt tokens, in order, with the index of their sequence among the running ones.
    pub(super) prompt_logprobs: Vec<(usize, TokenLogprobs)>,
    /// Hidden states of prompts that are pooled, `[_, hidden_size]`, with the index of their sequence.
    pub(super) hidden: Vec<(usize, Vec<f32>)>,
}

/// A prompt token to score: row `row` of the step predicts it.
#[derive(Debug)]
struct PromptRow {
    row: usize,
    target: u32,
    /// Index of the sequence among the running ones.
    index: usize,
    top: usize,
}

impl ModelRunner {
    /// Allocates the memory of steps, then the KV cache of what is left, as `options` say. A device that records steps
    /// does so here.
    ///
    /// # Errors
    /// Out of memory, or sizes that do not fit the model.
    pub(super) fn new(
        backend: Box<dyn Backend>,
        model: Box<dyn Model>,
        options: &EngineOptions,
    ) -> Result<(Self, Sizes), EngineError> {
        let (device, config) = (backend.as_ref(), model.config());
        let dtype = options.kv_cache_dtype;
        let limits = options.limits()?;
        if options.speculation.is_some() && device.captures() {
            return Err(EngineError::Speculation(device.description()));
        }
        let max_tokens = limits.max_num_batched_tokens;
        // A step has no more sequences than tokens.
        let max_sequences = limits.max_num_seqs.min(max_tokens);
        let logit_rows = max_sequences.max(MIN_LOGIT_ROWS).min(max_tokens);
        let start = Instant::now();
        let mut workspace = Workspace::new(device, model.as_ref(), max_tokens, logit_rows)?;
        let sampler = Sampler::new(device, config.vocab_size, logit_rows)?;
        if device.captures() {
            let longest = options.max_model_len.unwrap_or(config.max_model_len);
            warm_up(device, model.as_ref(), &mut workspace, [max_tokens, longest], dtype)?;
        }
        let needs = ModelNeeds::of(device, model.as_ref(), dtype)?;
        let sizes = options.sizes(needs, &device.description())?;
        // One block more for the padding of recorded steps.
        let blocks = sizes.kv_blocks + usize::from(device.captures());
        let mut kv_cache = KvCache::new(device, config, blocks, dtype)?;
        let mut step = StepInputs::new(device, max_tokens, max_sequences, blocks_for(sizes.max_model_len))?;
        let decode = DecodeStep {
            backend: device,
            model: model.as_ref(),
            inputs: &mut step,
            kv_cache: &mut kv_cache,
            workspace: &mut workspace,
        };
        let memory_secs = start.elapsed().as_secs_f64();
        let graphs = DecodeGraphs::record(decode, max_sequences, sizes.kv_blocks as u32);
        let graphs_secs = start.elapsed().as_secs_f64() - memory_secs;
        tracing::debug!(memory_secs, graphs_secs, "ready to run steps");
        let rows = Vec::with_capacity(logit_rows);
        Ok((
            Self {
                kv_cache,
                step,
                workspace,
                sampler,
                graphs,
                has_logits: false,
                outputs: Outputs::default(),
                prompt_rows: Vec::new(),
                rows,
                backend,
                model,
            },
            sizes,
        ))
    }

    /// The model.
    pub(super) fn model(&self) -> &dyn Model {
        self.model.as_ref()
    }

    /// What runs, for people and metrics.
    pub(super) fn info(&self, sizes: Sizes, options: &EngineOptions) -> EngineInfo {
        EngineInfo::new(self.backend.as_ref(), self.model.as_ref(), sizes, options)
    }

    /// Whether the device computes while the host goes on, between [`launch`](Self::launch) and
    /// [`finish`](Self::finish).
    pub(super) fn is_asynchronous(&self) -> bool {
        self.backend.captures()
    }

    /// Waits for the device.
    pub(super) fn wait(&self) {
        self.backend.read_f32(self.workspace.logits(), 0, &mut [0.0]);
    }

    /// Starts computing `batch`, a plan for the sequences `running`.
    pub(super) fn launch(&mut self, running: &[Sequence], batch: &Batch) {
        let mut steps: Vec<StepSequence<'_>> = batch
            .items
            .iter()
            .map(|item| {
                let sequence = &running[item.index];
                StepSequence {
                    tokens: sequence.next_tokens(item.tokens),
                    first_position: sequence.computed(),
                    block_table: sequence.block_table.blocks(),
                }
            })
            .collect();
        let backend = self.backend.as_ref();
        let is_decode = batch.items.iter().all(|item| item.tokens == 1 && item.samples);
        let recorded = self.graphs.for_sequences(steps.len()).filter(|_| is_decode);
        self.has_logits = recorded.is_some();
        if let Some((size, graph)) = recorded {
            steps.extend(self.graphs.padding(size - steps.len()));
            self.outputs.take_all();
            self.prompt_rows.clear();
            self.step.fill(backend, &steps, OutputRows::All);
            backend.replay(graph);
        } else {
            self.prompt_rows = prompt_rows(running, batch);
            self.outputs.find(running, batch, &self.prompt_rows, self.workspace.max_logit_rows());
            self.step.fill(backend, &steps, self.outputs.of_step());
            self.model.forward(backend, &self.step, &mut self.kv_cache, &mut self.workspace);
        }
    }

    /// Draws tokens and scores prompts of `batch`, which was [launched](Self::launch) for the same sequences; waits for
    /// the device and for the masks of `constraints`.
    pub(super) fn finish(
        &mut self,
        running: &[Sequence],
        batch: &Batch,
        constraints: &mut Constraints,
        output: &mut StepOutput,
    ) {
        self.sample(running, batch, constraints, output);
        self.score_prompts(output);
        self.read_hidden(running, batch, output);
    }

    /// Draws for each item that samples, from the logits of its last rows.
    fn sample(
        &mut self,
        running: &[Sequence],
        batch: &Batch,
        constraints: &mut Constraints,
        output: &mut StepOutput,
    ) {
        output.drawn.clear();
        let mut end = 0;
        let due: Vec<(u32, Draw<'_>)> = batch
            .items
            .iter()
            .flat_map(|item| {
                end += item.tokens;
                let first = end - item.draws();
                let sequence = &running[item.index];
                (0..item.draws()).map(move |ahead| (first + ahead, Draw { sequence, ahead }))
            })
            .map(|(row, draw)| (self.outputs.place(row), draw))
            .collect();
        for chunk in due.chunks(self.workspace.max_logit_rows()) {
            if !self.has_logits {
                self.logits(chunk.iter().map(|&(row, _)| row));
            }
            let draws: Vec<Draw<'_>> = chunk.iter().map(|&(_, draw)| draw).collect();
            let logits = self.workspace.logits_mut();
            let backend = self.backend.as_ref();
            self.sampler.draw(backend, logits, &draws, constraints, &mut output.drawn);
        }
        output.tokens.clear();
        output.tokens.extend(output.drawn.iter().map(|drawn| drawn.token));
    }

    /// Scores the prompt tokens that rows of the step predict, for the sequences that want it.
    fn score_prompts(&mut self, output: &mut StepOutput) {
        output.prompt_logprobs.clear();
        let wanted = std::mem::take(&mut self.prompt_rows);
        for chunk in wanted.chunks(self.workspace.max_logit_rows()) {
            let places: Vec<u32> = chunk.iter().map(|wanted| self.outputs.place(wanted.row)).collect();
            self.logits(places.into_iter());
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

    /// Reads the rows of prompts that are pooled.
    fn read_hidden(&mut self, running: &[Sequence], batch: &Batch, output: &mut StepOutput) {
        output.hidden.clear();
        let width = self.model.config().hidden_size;
        let mut first_row = 0;
        for item in &batch.items {
            let sequence = &running[item.index];
            let rows = pooled_rows(sequence, item.tokens);
            if rows > 0 {
                let mut hidden = vec![0.0; rows * width];
                // Neighbours are neighbours among the outputs too.
                let begin = self.outputs.place(first_row + item.tokens - rows) as usize;
                self.backend.read_f32(self.workspace.hidden(), begin * width, &mut hidden);
                output.hidden.push((item.index, hidden));
            }
            first_row += item.tokens;
        }
    }

    /// Computes the logits of these outputs of the step into the workspace.
    fn logits(&mut self, rows: impl Iterator<Item = u32>) {
        self.rows.clear();
        self.rows.extend(rows);
        self.model.logits(self.backend.as_ref(), &self.rows, &mut self.workspace);
    }
}

impl Outputs {
    /// Every row has hidden states.
    fn take_all(&mut self) {
        self.are_all = true;
    }

    /// Rows from which `batch` draws or pools, and those of `scoring`; all of them if these are more than `most`.
    fn find(&mut self, running: &[Sequence], batch: &Batch, scoring: &[PromptRow], most: usize) {
        self.rows.clear();
        self.rows.extend(scoring.iter().map(|wanted| wanted.row as u32));
        let mut end = 0;
        for item in &batch.items {
            end += item.tokens;
            let last = item.draws().max(pooled_rows(&running[item.index], item.tokens));
            self.rows.extend((end - last..end).map(|row| row as u32));
        }
        self.rows.sort_unstable();
        self.rows.dedup();
        self.are_all = self.rows.len() > most || self.rows.len() == end;
    }

    fn of_step(&self) -> OutputRows<'_> {
        if self.are_all { OutputRows::All } else { OutputRows::Only(&self.rows) }
    }

    /// Where the hidden state of row `row` of the step is.
    fn place(&self, row: usize) -> u32 {
        let row = row as u32;
        if self.are_all {
            return row;
        }
        self.rows.binary_search(&row).expect("every row that is asked for was wanted") as u32
    }
}

/// The last rows of an item of `tokens` rows that are pooled.
fn pooled_rows(sequence: &Sequence, tokens: usize) -> usize {
    match sequence.pooled().map(PoolingState::pooling) {
        None => 0,
        Some(Pooling::Mean) => tokens,
        Some(Pooling::Last) => 1,
    }
}

/// Runs the largest step, of sequences of up to `longest` tokens, so that all scratch memory has been allocated when the
/// memory that is left is measured.
fn warm_up(
    backend: &dyn Backend,
    model: &dyn Model,
    workspace: &mut Workspace,
    [max_tokens, longest]: [usize; 2],
    dtype: KvCacheDtype,
) -> kernels::Result<()> {
    let tokens = vec![0; max_tokens];
    let block_table = vec![0; blocks_for(max_tokens)];
    let mut kv_cache = KvCache::new(backend, model.config(), 1, dtype)?;
    let mut step = StepInputs::new(backend, max_tokens, 1, blocks_for(longest).max(block_table.len()))?;
    let longest = StepSequence { tokens: &tokens, first_position: 0, block_table: &block_table };
    step.fill(backend, &[longest], OutputRows::All);
    model.forward(backend, &step, &mut kv_cache, workspace);
    let rows: Vec<u32> = (0..workspace.max_logit_rows() as u32).collect();
    model.logits(backend, &rows, workspace);
    backend.read_f32(workspace.logits(), 0, &mut [0.0]);
    Ok(())
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
                row: first_row + position - computed,
                target: sequence.tokens()[position + 1],
                index: item.index,
                top,
            }));
        }
        first_row += item.tokens;
    }
    wanted
}

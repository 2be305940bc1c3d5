//! The inputs of one step: which tokens of which sequences, and where their keys and values go.

use kernels::{AttentionInputs, Backend, Buffer, Component, Dtype, HostSpans, InputWrite, KV_BLOCK_TOKENS};

/// The part of a sequence that one step computes.
#[derive(Debug, Clone, Copy)]
pub struct StepSequence<'a> {
    /// Token ids to compute; not empty. One in decode, a chunk of the prompt in prefill.
    pub tokens: &'a [u32],
    /// Position of `tokens[0]`: the number of tokens that are in the cache already.
    pub first_position: usize,
    /// Block numbers of the sequence in position order; they cover every position up to the last of `tokens`.
    pub block_table: &'a [u32],
}

impl StepSequence<'_> {
    /// Blocks of the sequence after the step.
    fn blocks(&self) -> usize {
        (self.first_position + self.tokens.len()).div_ceil(KV_BLOCK_TOKENS)
    }
}

/// Rows of a step whose final hidden states are wanted. The others are done when the last layer has their keys and
/// values.
#[derive(Debug, Clone, Copy)]
pub enum OutputRows<'a> {
    /// Every row.
    All,
    /// These, in this order; possibly none.
    Only(&'a [u32]),
}

/// Device buffers that describe a step: allocated once, refilled in place. Rows are the tokens of all sequences, one
/// sequence after the other.
#[derive(Debug)]
pub struct StepInputs {
    rows: usize,
    sequences: usize,
    max_blocks: usize,
    /// Length of `output_rows`; `None` for all rows.
    outputs: Option<usize>,
    /// U32 `[max_tokens]`.
    pub(crate) tokens: Buffer,
    /// U32 `[max_tokens]`.
    pub(crate) positions: Buffer,
    /// U32 `[max_tokens]`: where each row's key and value go.
    pub(crate) slots: Buffer,
    query_start: Buffer,
    context_lens: Buffer,
    block_tables: Buffer,
    /// U32 `[max_tokens]`.
    output_rows: Buffer,
    staging: Staging,
}

/// Host copies of the buffers, kept to fill them without allocating.
#[derive(Debug)]
struct Staging {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    slots: Vec<u32>,
    query_start: Vec<u32>,
    context_lens: Vec<u32>,
    /// Rows of as many blocks as the longest sequence of the step has.
    block_tables: Vec<u32>,
}

impl StepInputs {
    /// Buffers for steps of up to `max_tokens` rows of up to `max_sequences` sequences with block tables of up to
    /// `max_blocks` blocks.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(
        backend: &dyn Backend,
        max_tokens: usize,
        max_sequences: usize,
        max_blocks: usize,
    ) -> kernels::Result<Self> {
        let alloc = |len| backend.alloc(Dtype::U32, len, Component::Workspace);
        Ok(Self {
            rows: 0,
            sequences: 0,
            max_blocks,
            outputs: None,
            tokens: alloc(max_tokens)?,
            positions: alloc(max_tokens)?,
            slots: alloc(max_tokens)?,
            query_start: alloc(max_sequences + 1)?,
            context_lens: alloc(max_sequences)?,
            block_tables: alloc(max_sequences * max_blocks)?,
            output_rows: alloc(max_tokens)?,
            staging: Staging {
                tokens: Vec::with_capacity(max_tokens),
                positions: Vec::with_capacity(max_tokens),
                slots: Vec::with_capacity(max_tokens),
                query_start: Vec::with_capacity(max_sequences + 1),
                context_lens: Vec::with_capacity(max_sequences),
                block_tables: Vec::new(),
            },
        })
    }

    /// Describes the next step, whose final hidden states are those of `outputs`.
    ///
    /// # Panics
    /// A sequence has no tokens, its block table does not cover them, the sequences exceed the sizes given to
    /// [`new`](Self::new), or one of `outputs` is no row of the step.
    pub fn fill(&mut self, backend: &dyn Backend, sequences: &[StepSequence<'_>], outputs: OutputRows<'_>) {
        let max_sequences = self.context_lens.len();
        assert!(
            sequences.len() <= max_sequences,
            "{} sequences in a step of {max_sequences}",
            sequences.len()
        );
        let blocks = self.staging.fill(sequences);
        assert!(blocks <= self.max_blocks, "{blocks} blocks in a table of {}", self.max_blocks);
        let staging = &self.staging;
        let (rows, max_rows) = (staging.tokens.len(), self.tokens.len());
        assert!(rows <= max_rows, "{rows} tokens in a step of {max_rows}");
        let output_rows = match outputs {
            OutputRows::All => &[],
            OutputRows::Only(rows) => rows,
        };
        let count = output_rows.len();
        assert!(count <= max_rows, "{count} outputs of a step of up to {max_rows} rows");
        for &row in output_rows {
            assert!((row as usize) < rows, "output {row} of a step of {rows} rows");
        }
        let mut writes = [
            InputWrite::flat(&mut self.tokens, &staging.tokens),
            InputWrite::flat(&mut self.positions, &staging.positions),
            InputWrite::flat(&mut self.slots, &staging.slots),
            InputWrite::flat(&mut self.query_start, &staging.query_start),
            InputWrite::flat(&mut self.context_lens, &staging.context_lens),
            InputWrite {
                buffer: &mut self.block_tables,
                values: &staging.block_tables,
                width: blocks,
                stride: self.max_blocks,
            },
            InputWrite::flat(&mut self.output_rows, output_rows),
        ];
        // The last is for some steps only: those that decode want all rows.
        let needed = if count == 0 { writes.len() - 1 } else { writes.len() };
        backend.write_inputs(&mut writes[..needed]);
        self.outputs = match outputs {
            OutputRows::All => None,
            OutputRows::Only(_) => Some(count),
        };
        self.rows = rows;
        self.sequences = sequences.len();
    }

    /// Rows of the current step: the tokens of all its sequences.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Which rows of the current step have final hidden states, U32, and how many; `None` if all have.
    pub(crate) fn output_rows(&self) -> Option<(&Buffer, usize)> {
        self.outputs.map(|count| (&self.output_rows, count))
    }

    /// Sequences of the current step.
    pub fn sequences(&self) -> usize {
        self.sequences
    }

    /// Most rows of a step.
    pub fn max_tokens(&self) -> usize {
        self.tokens.len()
    }

    /// The current step, as attention wants it.
    pub(crate) fn attention(&self) -> AttentionInputs<'_> {
        AttentionInputs {
            rows: self.rows,
            sequences: self.sequences,
            query_start: &self.query_start,
            context_lens: &self.context_lens,
            block_tables: &self.block_tables,
            max_blocks: self.max_blocks,
            host: HostSpans {
                query_start: &self.staging.query_start,
                context_lens: &self.staging.context_lens,
            },
        }
    }
}

impl Staging {
    /// Describes a step; returns the row length of the block tables.
    fn fill(&mut self, sequences: &[StepSequence<'_>]) -> usize {
        self.tokens.clear();
        self.positions.clear();
        self.slots.clear();
        self.query_start.clear();
        self.query_start.push(0);
        self.context_lens.clear();
        self.block_tables.clear();
        let width = sequences.iter().map(StepSequence::blocks).max().unwrap_or(1);
        for sequence in sequences {
            self.push(sequence);
            self.block_tables.extend_from_slice(&sequence.block_table[..sequence.blocks()]);
            self.block_tables.resize(self.context_lens.len() * width, 0);
        }
        width
    }

    /// Appends a sequence's rows.
    fn push(&mut self, sequence: &StepSequence<'_>) {
        let StepSequence { tokens, first_position, block_table } = *sequence;
        assert!(!tokens.is_empty(), "a sequence of a step has tokens");
        let (context, blocks) = (first_position + tokens.len(), sequence.blocks());
        assert!(blocks <= block_table.len(), "{} blocks for {context} tokens", block_table.len());
        self.tokens.extend_from_slice(tokens);
        for position in first_position..context {
            let block = block_table[position / KV_BLOCK_TOKENS] as usize;
            self.positions.push(position as u32);
            self.slots.push((block * KV_BLOCK_TOKENS + position % KV_BLOCK_TOKENS) as u32);
        }
        self.query_start.push(self.tokens.len() as u32);
        self.context_lens.push(context as u32);
    }
}

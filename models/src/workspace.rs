//! The memory of one step's activations.

use kernels::{Backend, Buffer, Component, Dtype};

use crate::{Model, ModelConfig};

/// Activation buffers, allocated once for steps of up to `max_tokens` rows and used again in every layer.
#[derive(Debug)]
pub struct Workspace {
    max_logit_rows: usize,
    /// F32 `[max_tokens, hidden]`: the residual stream. What every layer adds to it is not rounded to the activations' type.
    pub(crate) residual: Buffer,
    /// `[max_tokens, hidden]`: the normed input of the next block; at the end of a step, the final hidden states.
    pub(crate) normed: Buffer,
    /// `[max_tokens, hidden]`: what a block adds to the residual stream.
    pub(crate) delta: Buffer,
    /// `[max_tokens, heads.qkv_width()]`.
    pub(crate) qkv: Buffer,
    /// `[max_tokens, heads.q_width()]`.
    pub(crate) attention: Buffer,
    /// `[max_tokens, 2 * intermediate]`; empty where the device gates without it, unless the model's gates and those that
    /// they gate are [apart](Model::has_gates_apart).
    pub(crate) gate_up: Buffer,
    /// `[max_tokens, intermediate]`.
    pub(crate) activated: Buffer,
    /// F32 `[max_tokens, heads.dim]`: cosines and sines of the rows' positions.
    pub(crate) rope: Buffer,
    /// F32 `[max_logit_rows, hidden]`: the residual stream of [`OutputRows::Only`](crate::OutputRows) some rows.
    output_residual: Buffer,
    /// `[max_logit_rows, heads.q_width()]`: the attention output of these.
    output_attention: Buffer,
    /// U32 `[max_logit_rows]`: rows whose logits are wanted.
    pub(crate) logit_rows: Buffer,
    /// `[max_logit_rows, hidden]`: their hidden states.
    pub(crate) logit_hidden: Buffer,
    /// F32 `[max_logit_rows, vocab]`.
    pub(crate) logits: Buffer,
}

impl Workspace {
    /// Buffers for steps of `model` of up to `max_tokens` rows, and logits of up to `max_logit_rows` rows at a time.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(
        backend: &dyn Backend,
        model: &dyn Model,
        max_tokens: usize,
        max_logit_rows: usize,
    ) -> kernels::Result<Self> {
        let has_gate_up = !backend.fuses_gated_linear() || model.has_gates_apart();
        Self::of_sizes(backend, model.config(), has_gate_up, max_tokens, max_logit_rows)
    }

    /// As [`new`](Self::new), for layers that are not there yet.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn of_sizes(
        backend: &dyn Backend,
        config: &ModelConfig,
        has_gate_up: bool,
        max_tokens: usize,
        max_logit_rows: usize,
    ) -> kernels::Result<Self> {
        let alloc =
            |dtype, rows: usize, width: usize| backend.alloc(dtype, rows * width, Component::Workspace);
        let activations = |width| alloc(backend.activation_dtype(), max_tokens, width);
        Ok(Self {
            max_logit_rows,
            residual: alloc(Dtype::F32, max_tokens, config.hidden_size)?,
            normed: activations(config.hidden_size)?,
            delta: activations(config.hidden_size)?,
            qkv: activations(config.heads.qkv_width())?,
            attention: activations(config.heads.q_width())?,
            gate_up: activations(if has_gate_up { 2 * config.intermediate_size } else { 0 })?,
            activated: activations(config.intermediate_size)?,
            rope: alloc(Dtype::F32, max_tokens, config.heads.dim)?,
            output_residual: alloc(Dtype::F32, max_logit_rows, config.hidden_size)?,
            output_attention: alloc(backend.activation_dtype(), max_logit_rows, config.heads.q_width())?,
            logit_rows: alloc(Dtype::U32, max_logit_rows, 1)?,
            logit_hidden: alloc(backend.activation_dtype(), max_logit_rows, config.hidden_size)?,
            logits: alloc(Dtype::F32, max_logit_rows, config.vocab_size)?,
        })
    }

    /// Takes rows `indices`, `count` of them, of the residual stream and of the attention output into memory of their
    /// own, which stands for that of the step until [`exchange_outputs`](Self::exchange_outputs) brings it back.
    ///
    /// # Panics
    /// There is no room for `count` rows.
    pub(crate) fn gather_outputs(&mut self, backend: &dyn Backend, indices: &Buffer, count: usize) {
        let most = self.max_logit_rows;
        assert!(count <= most, "{count} outputs of a workspace for {most}");
        let gather = |from: &Buffer, to: &mut Buffer| {
            backend.gather_rows(from, indices, count, to.len() / most, to);
        };
        gather(&self.residual, &mut self.output_residual);
        gather(&self.attention, &mut self.output_attention);
        self.exchange_outputs();
    }

    /// See [`gather_outputs`](Self::gather_outputs).
    pub(crate) fn exchange_outputs(&mut self) {
        std::mem::swap(&mut self.residual, &mut self.output_residual);
        std::mem::swap(&mut self.attention, &mut self.output_attention);
    }

    /// Most rows that [`Model::logits`] takes at a time, and most of [`OutputRows::Only`](crate::OutputRows) some.
    pub fn max_logit_rows(&self) -> usize {
        self.max_logit_rows
    }

    /// `[outputs, hidden_size]`: the final-normed hidden states of the last step's [outputs](crate::OutputRows), from
    /// which [`Model::logits`] starts.
    pub fn hidden(&self) -> &Buffer {
        &self.normed
    }

    /// As [`hidden`](Self::hidden), to bring back those of an earlier step.
    pub fn hidden_mut(&mut self) -> &mut Buffer {
        &mut self.normed
    }

    /// F32 `[rows, vocab_size]`: the result of the last [`Model::logits`].
    pub fn logits(&self) -> &Buffer {
        &self.logits
    }

    /// As [`logits`](Self::logits), to change rows before sampling.
    pub fn logits_mut(&mut self) -> &mut Buffer {
        &mut self.logits
    }
}

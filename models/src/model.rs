//! What every model offers.

use kernels::mx::Scheme;
use kernels::{Backend, Buffer};

use crate::{KvCache, ModelConfig, StepInputs, Workspace};

/// A loaded decoder. It owns weights only: the state of sequences is in the [`KvCache`], the memory of a step in
/// [`StepInputs`] and [`Workspace`].
pub trait Model {
    /// The parsed `config.json`.
    fn config(&self) -> &ModelConfig;

    /// Runs one step over all rows of `step`, writing their keys and values to `kv`, and leaves the final-normed
    /// hidden states of its [outputs](crate::OutputRows) in `ws`.
    ///
    /// # Panics
    /// The outputs are some rows, more than `ws.max_logit_rows()`.
    fn forward(&self, backend: &dyn Backend, step: &StepInputs, kv: &mut KvCache, ws: &mut Workspace) {
        self.forward_observed(backend, step, kv, ws, &mut ());
    }

    /// As [`forward`](Self::forward), with somebody who looks at the inputs of the linear layers.
    fn forward_observed(
        &self,
        backend: &dyn Backend,
        step: &StepInputs,
        kv: &mut KvCache,
        ws: &mut Workspace,
        observer: &mut dyn Observer,
    );

    /// Writes the logits of these `rows` of the last step's hidden states to `ws.logits()`, `[rows.len(), vocab_size]`.
    ///
    /// # Panics
    /// `rows` is longer than `ws.max_logit_rows()`.
    fn logits(&self, backend: &dyn Backend, rows: &[u32], ws: &mut Workspace);

    /// The linear layers, summed over decoder layers by group and scheme, in the order of execution.
    fn linear_info(&self) -> Vec<LinearInfo>;

    /// Parameters of the whole model; a tied output head counts once.
    fn parameters(&self) -> usize;

    /// Whether the gates of some layer are another weight than what they gate, as with formats of their own: the
    /// [`Workspace`] then has their results on every device.
    fn has_gates_apart(&self) -> bool {
        false
    }
}

/// Looks at the inputs of linear layers while a step runs.
pub trait Observer {
    /// Before or after the linear modules of decoder layer `layer` whose last name parts are `modules` (`q_proj`,
    /// `k_proj`, `v_proj`) have read `input`, `[rows of the step or more, cols]`; behind the attention of the last layer
    /// it has the step's [outputs](crate::OutputRows) alone.
    fn linear_input(
        &mut self,
        layer: usize,
        modules: &mut dyn Iterator<Item = &str>,
        input: &Buffer,
        cols: usize,
    );
}

/// Looks at nothing.
impl Observer for () {
    fn linear_input(&mut self, _: usize, _: &mut dyn Iterator<Item = &str>, _: &Buffer, _: usize) {}
}

/// Linear layers of one group that share a scheme.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearInfo {
    /// The modules that run as one product, joined by `+`: `q_proj+k_proj+v_proj`, `o_proj`, `lm_head`.
    pub group: String,
    /// What the checkpoint declares; `None` where it is unquantized.
    pub scheme: Option<Scheme>,
    /// Decoder layers that have this group in this scheme (1 for `lm_head`).
    pub layers: usize,
    /// Weight elements, without biases.
    pub parameters: usize,
    /// Bytes held on the device, without biases.
    pub bytes: usize,
}

//! Decoder layers on their own, run stage by stage over windows of text, for programs that change a model's weights
//! as they go through it (calibration): memory for one layer, and for the windows' activations.
//!
//! A stage is a group of linear modules that read one input. [`Stager::begin`] computes the first stage's input of a
//! layer, [`Stager::advance`] runs a stage and computes the next one's. The arithmetic is that of
//! [`Model::forward`](crate::Model::forward), operator by operator.

use std::collections::BTreeMap;
use std::path::PathBuf;

use kernels::{Backend, Buffer, Component, Dtype, InputForm, KV_BLOCK_TOKENS, KvCacheDtype, PagedKv, Weight};

use crate::checkpoint::{CheckpointError, LinearTensor};
use crate::decoder::{LayerLoader, WeightNames};
use crate::layers::{DecoderLayer, Linear, Module, RmsNorm, parameter};
use crate::parameters::{ParameterSource, check_shape};
use crate::{ModelConfig, ModelError, OutputRows, StepInputs, StepSequence, Workspace, registry};

/// A group of linear modules of a decoder layer that read the same input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stage {
    /// The projections to q, k and v, of the normed residual stream.
    Qkv,
    /// The attention's output projection.
    AttentionOutput,
    /// The gate and up projections, of the normed residual stream.
    GateUp,
    /// The down projection.
    Down,
}

impl Stage {
    /// Every stage, in the order of execution.
    pub const ALL: [Self; 4] = [Self::Qkv, Self::AttentionOutput, Self::GateUp, Self::Down];

    /// Names of its modules in layer `index` of a model of `config`, with their output width N, and the width K of
    /// their input.
    pub fn modules(self, config: &ModelConfig, index: usize) -> (Vec<(String, usize)>, usize) {
        let (modules, cols) = registry::names(config).stage(config, index, self);
        (modules.into_iter().map(|module| (module.name, module.rows)).collect(), cols)
    }
}

/// Tensors in memory, by name: a layer's, or those at the ends of a model.
#[derive(Debug, Clone, Default)]
pub struct Parameters {
    /// The checkpoint's folder, for errors.
    pub dir: PathBuf,
    /// Weights of linear modules and embeddings, by module.
    pub linears: BTreeMap<String, LinearTensor>,
    /// Norms and biases, by tensor name.
    pub vectors: BTreeMap<String, Vec<f32>>,
}

impl Parameters {
    fn missing(&self, tensor: String) -> ModelError {
        CheckpointError::MissingTensor { dir: self.dir.clone(), tensor }.into()
    }
}

impl ParameterSource for Parameters {
    fn linear(&self, module: &str, shape: [usize; 2]) -> Result<LinearTensor, ModelError> {
        let found = self.linears.get(module);
        let tensor = found.ok_or_else(|| self.missing(format!("{module}.weight")))?;
        check_shape(module, &tensor.shape(), &shape)?;
        Ok(tensor.clone())
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        let vector = self.vectors.get(name).ok_or_else(|| self.missing(name.to_owned()))?;
        check_shape(name, &[vector.len()], &[len])?;
        Ok(vector.clone())
    }

    fn is_quantized(&self, module: &str) -> Result<bool, ModelError> {
        Ok(self.linears.get(module).is_some_and(|tensor| tensor.scheme().is_some()))
    }
}

/// One decoder layer on a device.
#[derive(Debug)]
pub struct StagedLayer {
    layer: DecoderLayer,
    index: usize,
}

impl StagedLayer {
    /// Loads layer `index` of a model of `config`.
    ///
    /// # Errors
    /// A tensor is missing or has another shape than `config` calls for, or the device cannot take it.
    pub fn load(
        backend: &dyn Backend,
        parameters: &Parameters,
        config: &ModelConfig,
        index: usize,
    ) -> Result<Self, ModelError> {
        let names = registry::names(config);
        let layer = LayerLoader { backend, source: parameters, config, names }.load(index)?;
        Ok(Self { layer, index })
    }

    /// Loads the modules of `stage` again.
    ///
    /// # Errors
    /// As [`load`](Self::load); the layer is then as it was.
    pub fn reload(
        &mut self,
        backend: &dyn Backend,
        parameters: &Parameters,
        config: &ModelConfig,
        stage: Stage,
    ) -> Result<(), ModelError> {
        let names = registry::names(config);
        let linear = LayerLoader { backend, source: parameters, config, names }.linear(self.index, stage)?;
        *match stage {
            Stage::Qkv => &mut self.layer.attention.qkv,
            Stage::AttentionOutput => &mut self.layer.attention.output,
            Stage::GateUp => &mut self.layer.mlp.gate_up,
            Stage::Down => &mut self.layer.mlp.down,
        } = linear;
        Ok(())
    }
}

/// What comes before the first layer and after the last: embedding, final norm, output head.
#[derive(Debug)]
pub struct Ends {
    embed: Weight,
    norm: RmsNorm,
    /// `None`: the embedding.
    head: Option<Linear>,
}

impl Ends {
    /// Loads them.
    ///
    /// # Errors
    /// As [`StagedLayer::load`].
    pub fn load(
        backend: &dyn Backend,
        parameters: &Parameters,
        config: &ModelConfig,
    ) -> Result<Self, ModelError> {
        let names: &WeightNames = registry::names(config);
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let embed = backend.upload(&[parameters.linear(names.embed, [vocab, hidden])?.source()], None)?;
        let norm = RmsNorm::load(backend, parameters, names.norm, hidden, config.rms_norm_eps)?;
        let head = if config.tie_word_embeddings && !parameters.is_quantized(names.head)? {
            None
        } else {
            let module = Module { name: names.head.to_owned(), rows: vocab };
            Some(Linear::load(backend, parameters, &[module], hidden, false)?)
        };
        Ok(Self { embed, norm, head })
    }
}

/// One window of text on its way through the layers.
#[derive(Debug, Clone, Default)]
pub struct WindowState {
    /// The residual stream, `[tokens, hidden]`.
    pub residual: Vec<f32>,
    /// The input of the stage that comes next, `[tokens, K]`.
    pub input: Vec<f32>,
}

/// The buffers that windows of one length go through.
pub struct Stager<'a> {
    backend: &'a dyn Backend,
    config: &'a ModelConfig,
    tokens: usize,
    step: StepInputs,
    cache: PagedKv,
    workspace: Workspace,
}

/// Rows of logits at a time, at most.
pub const LOGIT_ROWS: usize = 64;

impl<'a> Stager<'a> {
    /// Buffers for windows of `tokens` tokens, each from position 0.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(backend: &'a dyn Backend, config: &'a ModelConfig, tokens: usize) -> kernels::Result<Self> {
        let blocks = tokens.div_ceil(KV_BLOCK_TOKENS);
        let table: Vec<u32> = (0..blocks as u32).collect();
        let mut step = StepInputs::new(backend, tokens, 1, blocks)?;
        let ids = vec![0; tokens];
        let sequence = StepSequence { tokens: &ids, first_position: 0, block_table: &table };
        step.fill(backend, &[sequence], OutputRows::All);
        let mut workspace = Workspace::of_sizes(backend, config, true, tokens, LOGIT_ROWS)?;
        let inv_freq = parameter(backend, &config.rope.inv_freq)?;
        backend.rope_table(&step.positions, &inv_freq, config.rope.factor, tokens, &mut workspace.rope);
        let cache = backend.alloc_kv(blocks, config.heads, KvCacheDtype::F32)?;
        Ok(Self { backend, config, tokens, step, cache, workspace })
    }

    /// The state of a window before the first layer: its embeddings.
    ///
    /// # Panics
    /// `window` is not as long as the buffers, or has a token outside the vocabulary.
    pub fn embed(&mut self, ends: &Ends, window: &[u32]) -> kernels::Result<WindowState> {
        assert_eq!(window.len(), self.tokens, "tokens of a window");
        let mut ids = self.backend.alloc(Dtype::U32, window.len(), Component::Workspace)?;
        self.backend.write_u32(&mut ids, 0, window);
        self.backend.embed(&ends.embed, &ids, self.tokens, &mut self.workspace.residual);
        let residual = self.read(&self.workspace.residual, self.config.hidden_size);
        Ok(WindowState { residual, input: Vec::new() })
    }

    /// Computes the input of the layer's first stage.
    pub fn begin(&mut self, layer: &StagedLayer, state: &mut WindowState) {
        self.backend.write_f32(&mut self.workspace.residual, 0, &state.residual);
        layer.layer.input_norm.forward(self.backend, self.tokens, InputForm::Plain, &mut self.workspace);
        state.input = self.read(&self.workspace.normed, self.config.hidden_size);
    }

    /// Runs `stage` on `state.input` and what follows up to the next stage, whose input it leaves there; after the
    /// last stage the residual stream alone.
    ///
    /// # Panics
    /// `state.input` is not the input of `stage`.
    pub fn advance(&mut self, layer: &StagedLayer, stage: Stage, state: &mut WindowState) {
        let (backend, rows, layer) = (self.backend, self.tokens, &layer.layer);
        let ws = &mut self.workspace;
        let (hidden, width) = (self.config.hidden_size, self.config.intermediate_size);
        match stage {
            Stage::Qkv => {
                backend.write_f32(&mut ws.normed, 0, &state.input);
                layer.attention.qkv.forward(backend, &ws.normed, rows, &mut ws.qkv);
                layer.attention.attend(backend, &self.step, &mut self.cache, InputForm::Plain, ws);
                state.input = self.read(&self.workspace.attention, self.config.heads.q_width());
            }
            Stage::AttentionOutput => {
                backend.write_f32(&mut ws.attention, 0, &state.input);
                backend.write_f32(&mut ws.residual, 0, &state.residual);
                layer.attention.output.forward(backend, &ws.attention, rows, &mut ws.delta);
                layer.post_attention_norm.add_forward(backend, rows, InputForm::Plain, ws);
                state.residual = self.read(&self.workspace.residual, hidden);
                state.input = self.read(&self.workspace.normed, hidden);
            }
            Stage::GateUp => {
                backend.write_f32(&mut ws.normed, 0, &state.input);
                layer.mlp.activate(backend, rows, InputForm::Plain, ws);
                state.input = self.read(&self.workspace.activated, width);
            }
            Stage::Down => {
                backend.write_f32(&mut ws.activated, 0, &state.input);
                layer.mlp.down.forward(backend, &ws.activated, rows, &mut ws.delta);
                let delta = self.read(&self.workspace.delta, hidden);
                for (residual, delta) in state.residual.iter_mut().zip(&delta) {
                    *residual += delta;
                }
                state.input = Vec::new();
            }
        }
    }

    /// Summed negative log-likelihood, in nats, of tokens 1.. of `window`, whose `state` is that after the last layer.
    pub fn nll(&mut self, ends: &Ends, window: &[u32], state: &WindowState) -> f64 {
        self.final_norm(ends, state);
        let scored: Vec<u32> = (0..self.tokens as u32 - 1).collect();
        let mut nll = 0.0;
        for rows in scored.chunks(LOGIT_ROWS) {
            self.head(ends, rows);
            let indices: Vec<usize> = (0..rows.len()).collect();
            let first = rows[0] as usize + 1;
            let targets = &window[first..first + rows.len()];
            let scores =
                self.backend.logprobs(&self.workspace.logits, self.config.vocab_size, &indices, targets, 0);
            nll -= scores.iter().map(|score| f64::from(score.logprob)).sum::<f64>();
        }
        nll
    }

    /// Logits F32 `[positions.len(), vocab_size]` at up to [`LOGIT_ROWS`] positions of a window, whose `state` is that
    /// after the last layer.
    ///
    /// # Panics
    /// There are more positions, or one is not in the window.
    pub fn logits(&mut self, ends: &Ends, state: &WindowState, positions: &[u32]) -> Vec<f32> {
        assert!(positions.len() <= LOGIT_ROWS, "positions");
        self.final_norm(ends, state);
        self.head(ends, positions);
        let mut logits = vec![0.0; positions.len() * self.config.vocab_size];
        self.backend.read_f32(&self.workspace.logits, 0, &mut logits);
        logits
    }

    /// Computes the final hidden states of a window.
    fn final_norm(&mut self, ends: &Ends, state: &WindowState) {
        self.backend.write_f32(&mut self.workspace.residual, 0, &state.residual);
        ends.norm.forward(self.backend, self.tokens, InputForm::Plain, &mut self.workspace);
    }

    /// Computes the logits of some of the final hidden states.
    fn head(&mut self, ends: &Ends, positions: &[u32]) {
        let (backend, hidden, vocab) = (self.backend, self.config.hidden_size, self.config.vocab_size);
        let ws = &mut self.workspace;
        backend.write_u32(&mut ws.logit_rows, 0, positions);
        backend.gather_rows(&ws.normed, &ws.logit_rows, positions.len(), hidden, &mut ws.logit_hidden);
        match &ends.head {
            None => {
                backend.linear(&ws.logit_hidden, positions.len(), &ends.embed, &mut ws.logits, vocab, 0);
            }
            Some(head) => head.forward(backend, &ws.logit_hidden, positions.len(), &mut ws.logits),
        }
    }

    fn read(&self, buffer: &Buffer, width: usize) -> Vec<f32> {
        let mut values = vec![0.0; self.tokens * width];
        self.backend.read_f32(buffer, 0, &mut values);
        values
    }
}

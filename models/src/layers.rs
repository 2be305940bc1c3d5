//! The parts of a decoder layer. Each holds its weights and writes into the step's [`Workspace`].

use kernels::mx::Scheme;
use kernels::{
    Backend, Buffer, Component, DenseDtype, Dtype, HeadNorm, Heads, InputForm, PagedKv, Weight, WeightSource,
};

use crate::checkpoint::LinearTensor;
use crate::parameters::ParameterSource;
use crate::{ModelError, StepInputs, Workspace};

/// One or more linear modules that read the same input and write side by side into one output. Neighbours with equal
/// schemes are stacked into one weight; others stay apart and write to their own columns.
#[derive(Debug)]
pub(crate) struct Linear {
    parts: Vec<LinearPart>,
    width: usize,
    parameters: usize,
}

/// A stack of modules with one scheme.
#[derive(Debug)]
pub(crate) struct LinearPart {
    /// Last parts of the modules' names, joined by `+`.
    pub(crate) group: String,
    pub(crate) weight: Weight,
    column: usize,
}

/// A module of a [`Linear`]: where it is, and how many outputs it has.
pub(crate) struct Module {
    pub(crate) name: String,
    pub(crate) rows: usize,
}

impl Linear {
    /// Loads `modules`, each `[rows, cols]`, with biases `[rows]` if `bias`.
    pub(crate) fn load(
        backend: &dyn Backend,
        source: &dyn ParameterSource,
        modules: &[Module],
        cols: usize,
        bias: bool,
    ) -> Result<Self, ModelError> {
        Self::load_stacks(backend, source, modules, cols, bias, false)
    }

    /// As [`load`](Self::load): if all modules are one stack, it is for [`Backend::gated_linear`].
    pub(crate) fn load_gated(
        backend: &dyn Backend,
        source: &dyn ParameterSource,
        modules: &[Module],
        cols: usize,
        bias: bool,
    ) -> Result<Self, ModelError> {
        Self::load_stacks(backend, source, modules, cols, bias, true)
    }

    fn load_stacks(
        backend: &dyn Backend,
        source: &dyn ParameterSource,
        modules: &[Module],
        cols: usize,
        bias: bool,
        is_gated: bool,
    ) -> Result<Self, ModelError> {
        let mut linear = Self { parts: Vec::new(), width: 0, parameters: 0 };
        let mut stack = Stack::default();
        for module in modules {
            let tensor = source.linear(&module.name, [module.rows, cols])?;
            if !stack.takes(&tensor) {
                linear.push(std::mem::take(&mut stack).upload(backend, linear.width)?);
            }
            if bias {
                stack.bias.extend(source.vector(&format!("{}.bias", module.name), module.rows)?);
            }
            stack.push(&module.name, tensor);
        }
        let is_gated = is_gated && linear.parts.is_empty();
        linear.push(if is_gated {
            stack.upload_gated(backend)?
        } else {
            stack.upload(backend, linear.width)?
        });
        linear.parameters += if bias { linear.width } else { 0 };
        Ok(linear)
    }

    fn push(&mut self, part: LinearPart) {
        let [rows, cols] = part.weight.shape();
        self.width += rows;
        self.parameters += rows * cols;
        self.parts.push(part);
    }

    /// `out[m] = self(x[m])`, M = `rows`.
    pub(crate) fn forward(&self, backend: &dyn Backend, x: &Buffer, rows: usize, out: &mut Buffer) {
        for part in &self.parts {
            backend.linear(x, rows, &part.weight, out, self.width, part.column);
        }
    }

    /// The form in which its input is best left.
    pub(crate) fn input_form(&self, backend: &dyn Backend, rows: usize) -> InputForm {
        backend.input_form(&mut self.parts.iter().map(|part| &part.weight), rows)
    }

    /// The stacks.
    pub(crate) fn parts(&self) -> &[LinearPart] {
        &self.parts
    }

    /// Elements of weights and biases.
    pub(crate) fn parameters(&self) -> usize {
        self.parameters
    }

    /// Width K of the input.
    pub(crate) fn cols(&self) -> usize {
        self.parts[0].weight.shape()[1]
    }

    /// Last parts of the modules' names.
    pub(crate) fn module_names(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().flat_map(|part| part.group.split('+'))
    }
}

/// Host tensors that will be one weight.
#[derive(Default)]
struct Stack {
    names: Vec<String>,
    tensors: Vec<LinearTensor>,
    bias: Vec<f32>,
}

impl Stack {
    fn takes(&self, tensor: &LinearTensor) -> bool {
        self.tensors.first().is_none_or(|first| storage(first) == storage(tensor))
    }

    fn push(&mut self, module: &str, tensor: LinearTensor) {
        self.names.push(module.rsplit('.').next().unwrap_or(module).to_owned());
        self.tensors.push(tensor);
    }

    fn upload(self, backend: &dyn Backend, column: usize) -> kernels::Result<LinearPart> {
        let weight = backend.upload(&self.sources(), self.bias())?;
        Ok(LinearPart { group: self.group(), weight, column })
    }

    fn upload_gated(self, backend: &dyn Backend) -> kernels::Result<LinearPart> {
        let weight = backend.upload_gated(&self.sources(), self.bias())?;
        Ok(LinearPart { group: self.group(), weight, column: 0 })
    }

    fn sources(&self) -> Vec<WeightSource<'_>> {
        self.tensors.iter().map(LinearTensor::source).collect()
    }

    fn bias(&self) -> Option<&[f32]> {
        (!self.bias.is_empty()).then_some(self.bias.as_slice())
    }

    fn group(&self) -> String {
        self.names.join("+")
    }
}

/// What modules must share to be stacked.
fn storage(tensor: &LinearTensor) -> (Option<Scheme>, Option<DenseDtype>) {
    match tensor.source() {
        WeightSource::Dense { dtype, .. } => (None, Some(dtype)),
        source @ WeightSource::Mx { .. } => (source.scheme(), None),
    }
}

/// A buffer that holds `values`, counted as parameters.
pub(crate) fn parameter(backend: &dyn Backend, values: &[f32]) -> kernels::Result<Buffer> {
    let mut buffer = backend.alloc(Dtype::F32, values.len(), Component::Unquantized)?;
    backend.write_f32(&mut buffer, 0, values);
    Ok(buffer)
}

/// Root mean square norm with a learned weight.
#[derive(Debug)]
pub(crate) struct RmsNorm {
    weight: Buffer,
    eps: f32,
}

impl RmsNorm {
    /// Loads `{module}.weight`, `[len]`.
    pub(crate) fn load(
        backend: &dyn Backend,
        source: &dyn ParameterSource,
        module: &str,
        len: usize,
        eps: f32,
    ) -> Result<Self, ModelError> {
        let weight = source.vector(&format!("{module}.weight"), len)?;
        Ok(Self { weight: parameter(backend, &weight)?, eps })
    }

    /// Norms the residual stream into `ws.normed`, left in `form`.
    pub(crate) fn forward(&self, backend: &dyn Backend, rows: usize, form: InputForm, ws: &mut Workspace) {
        backend.rms_norm(&ws.residual, &self.weight, self.eps, rows, form, &mut ws.normed);
    }

    /// Adds `ws.delta` to the residual stream, then norms it into `ws.normed`, left in `form`.
    pub(crate) fn add_forward(
        &self,
        backend: &dyn Backend,
        rows: usize,
        form: InputForm,
        ws: &mut Workspace,
    ) {
        let Workspace { delta, residual, normed, .. } = ws;
        backend.add_rms_norm(delta, residual, &self.weight, self.eps, rows, form, normed);
    }

    /// Number of elements.
    pub(crate) fn parameters(&self) -> usize {
        self.weight.len()
    }
}

/// Grouped-query attention with RoPE over the paged cache.
#[derive(Debug)]
pub(crate) struct Attention {
    pub(crate) qkv: Linear,
    /// Norms of the heads of q and k.
    pub(crate) qk_norm: Option<[RmsNorm; 2]>,
    pub(crate) output: Linear,
    pub(crate) heads: Heads,
    pub(crate) window: Option<usize>,
}

impl Attention {
    /// From `ws.qkv` to `ws.attention`, left in `form`.
    pub(crate) fn attend(
        &self,
        backend: &dyn Backend,
        step: &StepInputs,
        cache: &mut PagedKv,
        form: InputForm,
        ws: &mut Workspace,
    ) {
        self.cache(backend, step, cache, ws);
        let (heads, inputs) = (self.heads, step.attention());
        let scale = (heads.dim as f32).sqrt().recip();
        backend.paged_attention(&ws.qkv, heads, scale, self.window, &inputs, cache, form, &mut ws.attention);
    }

    /// Writes the keys and values of `ws.qkv` to `cache`, and rotates its queries.
    fn cache(&self, backend: &dyn Backend, step: &StepInputs, cache: &mut PagedKv, ws: &mut Workspace) {
        let norm = self.qk_norm.as_ref().map(|[q, k]| HeadNorm { q: &q.weight, k: &k.weight, eps: q.eps });
        backend.rope_and_cache(&mut ws.qkv, self.heads, &ws.rope, norm, &step.slots, step.rows(), cache);
    }
}

/// `down(silu(gate(x)) * up(x))`.
#[derive(Debug)]
pub(crate) struct GatedMlp {
    /// Of [`Linear::load_gated`].
    pub(crate) gate_up: Linear,
    pub(crate) down: Linear,
    pub(crate) width: usize,
}

impl GatedMlp {
    /// From `ws.normed` to `ws.delta`.
    fn forward(&self, backend: &dyn Backend, rows: usize, ws: &mut Workspace) {
        self.activate(backend, rows, self.down.input_form(backend, rows), ws);
        self.down.forward(backend, &ws.activated, rows, &mut ws.delta);
    }

    /// From `ws.normed` to `ws.activated`, left in `form`, if both are multiplied at once.
    pub(crate) fn activate(&self, backend: &dyn Backend, rows: usize, form: InputForm, ws: &mut Workspace) {
        if let [both] = self.gate_up.parts() {
            let Workspace { normed, gate_up, activated, .. } = ws;
            backend.gated_linear(normed, rows, &both.weight, gate_up, form, activated);
        } else {
            self.gate_up.forward(backend, &ws.normed, rows, &mut ws.gate_up);
            backend.silu_mul(&ws.gate_up, rows, self.width, &mut ws.activated);
        }
    }
}

/// Attention and MLP, each with the norm before it.
#[derive(Debug)]
pub(crate) struct DecoderLayer {
    pub(crate) input_norm: RmsNorm,
    pub(crate) attention: Attention,
    pub(crate) post_attention_norm: RmsNorm,
    pub(crate) mlp: GatedMlp,
}

/// Sees each group of linear modules with its input, `[rows, K]`, in the form in which it was left.
pub(crate) type Observe<'a> = dyn FnMut(&Linear, &Buffer) + 'a;

impl DecoderLayer {
    /// From `ws.normed`, the result of `input_norm`, to `ws.delta`. Adding it to the residual stream is left to the
    /// norm that comes next, so that both are one pass.
    pub(crate) fn forward(
        &self,
        backend: &dyn Backend,
        step: &StepInputs,
        cache: &mut PagedKv,
        ws: &mut Workspace,
        observe: &mut Observe<'_>,
    ) {
        let rows = step.rows();
        self.project(backend, rows, ws, observe);
        self.attention.attend(backend, step, cache, self.attention.output.input_form(backend, rows), ws);
        self.finish(backend, rows, ws, observe);
    }

    /// As [`forward`](Self::forward), in the last layer of a step with [`OutputRows::Only`](crate::OutputRows) some rows:
    /// from attention on, the others are left out. `ws.delta` and the residual stream then have `outputs` alone, those
    /// of [`StepInputs::output_rows`], until [`Workspace::exchange_outputs`]; if these are none, nothing.
    pub(crate) fn forward_outputs(
        &self,
        backend: &dyn Backend,
        step: &StepInputs,
        (outputs, count): (&Buffer, usize),
        cache: &mut PagedKv,
        ws: &mut Workspace,
        observe: &mut Observe<'_>,
    ) {
        self.project(backend, step.rows(), ws, observe);
        if count == 0 {
            self.attention.cache(backend, step, cache, ws);
            return;
        }
        self.attention.attend(backend, step, cache, InputForm::Plain, ws);
        ws.gather_outputs(backend, outputs, count);
        self.finish(backend, count, ws, observe);
    }

    /// From `ws.normed` to `ws.qkv`.
    fn project(&self, backend: &dyn Backend, rows: usize, ws: &mut Workspace, observe: &mut Observe<'_>) {
        observe(&self.attention.qkv, &ws.normed);
        self.attention.qkv.forward(backend, &ws.normed, rows, &mut ws.qkv);
    }

    /// From `ws.attention` to `ws.delta`.
    fn finish(&self, backend: &dyn Backend, rows: usize, ws: &mut Workspace, observe: &mut Observe<'_>) {
        self.attention.output.forward(backend, &ws.attention, rows, &mut ws.delta);
        observe(&self.attention.output, &ws.attention);
        let form = self.mlp.gate_up.input_form(backend, rows);
        self.post_attention_norm.add_forward(backend, rows, form, ws);
        observe(&self.mlp.gate_up, &ws.normed);
        self.mlp.forward(backend, rows, ws);
        observe(&self.mlp.down, &ws.activated);
    }

    /// Its linear layers, in the order of execution.
    pub(crate) fn linears(&self) -> [&Linear; 4] {
        [&self.attention.qkv, &self.attention.output, &self.mlp.gate_up, &self.mlp.down]
    }

    /// Elements of all weights, biases and norms.
    pub(crate) fn parameters(&self) -> usize {
        let linears: usize = self.linears().into_iter().map(Linear::parameters).sum();
        let head_norms: usize = self.attention.qk_norm.iter().flatten().map(RmsNorm::parameters).sum();
        linears + head_norms + self.input_norm.parameters() + self.post_attention_norm.parameters()
    }
}

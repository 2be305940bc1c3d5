//! [`Backend`] on an NVIDIA GPU: BF16 activations, weights in tiles, everything in order on one stream.

use std::cell::RefCell;
use std::sync::Arc;

use half::bf16;

use super::context::Context;
use super::graph::Graph;
use super::linear::LinearOperator;
use super::memory::{DeviceBuffer, PinnedBuffer, bytes_of, bytes_of_mut};
use super::ops::{
    AttentionOperator, EmbedOperator, LogprobsOperator, NormOperator, RopeOperator, RowOperator,
    SampleOperator, Table, kv_block_bytes, kv_buffer_dtype,
};
use super::staging::Staging;
use super::upload::Uploader;
use super::weight::TiledWeight;
use crate::backend::{
    AttentionInputs, Backend, DeviceMemory, HeadNorm, Heads, InputWrite, LinearKernel, PagedKv, SampleParams,
    TokenLogprobs, WeightSource,
};
use crate::buffer::{Buffer, Component, Dtype, MemoryAccount, Storage};
use crate::error::{Error, Result};
use crate::graph::GraphKind;
use crate::input_form::{InputForm, Preparation};
use crate::kv_cache_dtype::KvCacheDtype;
use crate::mx::{Cast, Scheme};
use crate::tile::{RowOrder, TileFormat, TileLayout};
use crate::weight::{Weight, WeightData};

/// Bytes of results that come back through pinned memory.
const READBACK_BYTES: usize = 16 * 1024;

/// An NVIDIA GPU.
pub(crate) struct CudaBackend {
    context: Arc<Context>,
    memory: Arc<MemoryAccount>,
    linear: LinearOperator,
    embed: EmbedOperator,
    norm: NormOperator,
    rope: RopeOperator,
    attention: AttentionOperator,
    rows: RowOperator,
    sample: SampleOperator,
    logprobs: LogprobsOperator,
    state: RefCell<State>,
}

/// Host memory that calls share.
struct State {
    uploader: Uploader,
    staging: Staging,
    /// Where small results arrive.
    readback: PinnedBuffer,
}

impl CudaBackend {
    /// Opens device `ordinal`; see [`Device::Cuda`](crate::Device::Cuda).
    pub(crate) fn open(ordinal: usize, strict: bool) -> Result<Self> {
        let context = Arc::new(Context::open(ordinal)?);
        let memory = Arc::default();
        let state = State {
            uploader: Uploader::new(&context, &memory)?,
            staging: Staging::new(&context)?,
            readback: PinnedBuffer::new(&context, READBACK_BYTES)?,
        };
        let linear = LinearOperator::new(&context, &memory, strict)?;
        Ok(Self {
            embed: EmbedOperator::new(&context),
            norm: NormOperator::new(&context, linear.inexact()),
            linear,
            rope: RopeOperator::new(&context),
            attention: AttentionOperator::new(&context, &memory),
            rows: RowOperator::new(&context),
            sample: SampleOperator::new(&context),
            logprobs: LogprobsOperator::new(&context),
            state: RefCell::new(state),
            memory,
            context,
        })
    }

    fn device(&self) -> String {
        let properties = self.context.properties();
        format!("cuda:{} ({})", properties.ordinal, properties.name)
    }

    fn unsupported(&self, what: String) -> Error {
        Error::Unsupported { what, device: self.device() }
    }

    /// Packs and copies a weight, its rows in this order.
    fn upload_in_order(
        &self,
        parts: &[WeightSource<'_>],
        bias: Option<&[f32]>,
        order: RowOrder,
    ) -> Result<Weight> {
        let first = parts.first().expect("a weight has at least one part");
        assert!(parts.iter().all(|part| part.stacks_with(first)), "parts stack with each other");
        let rows = parts.iter().map(|part| part.shape()[0]).sum();
        assert!(bias.is_none_or(|bias| bias.len() == rows), "one bias per row");
        let (shape, scheme) = ([rows, first.shape()[1]], first.scheme());
        let format = TileFormat::of(first).map_err(|error| self.unsupported(error.to_string()))?;
        if let Some(preparation) = Preparation::of(scheme)
            && !LinearOperator::supports_input(preparation, shape[1])
        {
            let inputs = match preparation.activation {
                Some(Cast { format, scale_rounding }) => {
                    format!("activations in {format}, scales by {scale_rounding}")
                }
                None => "rotated activations".to_owned(),
            };
            return Err(self.unsupported(format!("{} columns of {inputs}", shape[1])));
        }
        let layout = TileLayout { format, shape, order };
        let weight = self.state.borrow_mut().uploader.upload(layout, parts, bias)?;
        let bytes = weight.bytes();
        let scales = weight.scale_bytes();
        let codes = if scheme.is_some() { Component::Weights } else { Component::Unquantized };
        let mut charges =
            vec![self.memory.charge(codes, bytes - scales), self.memory.charge(Component::Scales, scales)];
        if let Some(bias) = bias {
            charges.push(self.memory.charge(Component::Unquantized, size_of_val(bias)));
        }
        Ok(Weight { shape, scheme, data: WeightData::Cuda(weight), bias: None, _charges: charges, bytes })
    }

    /// Copies `offset` bytes from the start of `buffer` on to `target`, after everything launched before.
    fn read(&self, buffer: &Buffer, offset: usize, target: &mut [u8]) {
        assert!(buffer.form() == InputForm::Plain, "{:?} is for products alone", buffer.form());
        let memory = device_memory(buffer);
        let readback = &mut self.state.borrow_mut().readback;
        if target.len() <= readback.bytes() {
            memory.read(offset, &mut readback.as_mut_slice()[..target.len()]);
            target.copy_from_slice(&readback.as_slice()[..target.len()]);
        } else {
            memory.read(offset, target);
        }
    }
}

fn device_memory(buffer: &Buffer) -> &DeviceBuffer {
    match &buffer.storage {
        Storage::Cuda { memory, .. } => memory,
        _ => panic!("a buffer of another device"),
    }
}

fn tiled(weight: &Weight) -> &TiledWeight {
    match &weight.data {
        WeightData::Cuda(weight) => weight,
        WeightData::Cpu(_) => panic!("a weight of another device"),
    }
}

impl Backend for CudaBackend {
    fn description(&self) -> String {
        let properties = self.context.properties();
        format!("{}, cuda:{}", properties.name, properties.ordinal)
    }

    fn linear_kernel(&self, scheme: Option<Scheme>) -> LinearKernel {
        self.linear.kernel(scheme)
    }

    fn rounded_tokens(&self) -> u32 {
        self.linear.rounded_tokens()
    }

    fn memory(&self) -> &Arc<MemoryAccount> {
        &self.memory
    }

    fn device_memory(&self) -> Option<DeviceMemory> {
        self.context.synchronize();
        let (free_bytes, total_bytes) = self.context.memory_info();
        Some(DeviceMemory { free_bytes, total_bytes })
    }

    fn captures(&self) -> bool {
        true
    }

    fn capture(&self, step: &mut dyn FnMut()) -> crate::Graph {
        crate::Graph(GraphKind::Cuda(Graph::capture(&self.context, &self.memory, step)))
    }

    fn replay(&self, graph: &crate::Graph) {
        let GraphKind::Cuda(graph) = &graph.0;
        graph.replay();
    }

    fn activation_dtype(&self) -> Dtype {
        Dtype::Bf16
    }

    fn alloc(&self, dtype: Dtype, len: usize, component: Component) -> Result<Buffer> {
        let bytes = len * dtype.size_bytes();
        let memory = DeviceBuffer::zeroed(&self.context, bytes, component.label())?;
        Ok(Buffer::new(Storage::Cuda { memory, dtype, len }, self.memory.charge(component, bytes)))
    }

    fn upload(&self, parts: &[WeightSource<'_>], bias: Option<&[f32]>) -> Result<Weight> {
        self.upload_in_order(parts, bias, RowOrder::Stacked)
    }

    fn upload_gated(&self, parts: &[WeightSource<'_>], bias: Option<&[f32]>) -> Result<Weight> {
        self.upload_in_order(parts, bias, RowOrder::Paired)
    }

    fn attention_kernel(&self, dtype: KvCacheDtype) -> String {
        format!("cuda_sm90_{dtype}")
    }

    fn alloc_kv(&self, blocks: usize, heads: Heads, dtype: KvCacheDtype) -> Result<PagedKv> {
        let bytes = self.kv_block_bytes(heads, dtype)?;
        self.attention.reserve(dtype, heads)?;
        self.rope.reserve(dtype, heads);
        let element = kv_buffer_dtype(dtype);
        let alloc = || self.alloc(element, blocks * bytes / 2 / element.size_bytes(), Component::KvCache);
        Ok(PagedKv { k: alloc()?, v: alloc()?, blocks, dtype })
    }

    fn kv_block_bytes(&self, heads: Heads, dtype: KvCacheDtype) -> Result<usize> {
        kv_block_bytes(heads, dtype).map_err(|what| self.unsupported(what))
    }

    fn write_f32(&self, buffer: &mut Buffer, offset: usize, values: &[f32]) {
        match &mut buffer.storage {
            Storage::Cuda { memory, dtype: Dtype::F32, .. } => memory.write(offset * 4, bytes_of(values)),
            Storage::Cuda { memory, dtype: Dtype::Bf16, .. } => {
                let rounded: Vec<u16> = values.iter().map(|&x| bf16::from_f32(x).to_bits()).collect();
                memory.write(offset * 2, bytes_of(&rounded));
            }
            _ => panic!("floats do not go into a buffer of {:?}", buffer.dtype()),
        }
    }

    fn write_u32(&self, buffer: &mut Buffer, offset: usize, values: &[u32]) {
        match &mut buffer.storage {
            Storage::Cuda { memory, dtype: Dtype::U32, .. } => memory.write(offset * 4, bytes_of(values)),
            _ => panic!("integers do not go into a buffer of {:?}", buffer.dtype()),
        }
    }

    fn write_inputs(&self, writes: &mut [InputWrite<'_>]) {
        if let Err(error) = self.state.borrow_mut().staging.write_inputs(writes) {
            panic!("step inputs: {error}");
        }
    }

    fn read_f32(&self, buffer: &Buffer, offset: usize, values: &mut [f32]) {
        match buffer.dtype() {
            Dtype::F32 => self.read(buffer, offset * 4, bytes_of_mut(values)),
            Dtype::Bf16 => {
                let mut rounded = vec![0_u16; values.len()];
                self.read(buffer, offset * 2, bytes_of_mut(&mut rounded));
                for (out, bits) in values.iter_mut().zip(rounded) {
                    *out = bf16::from_bits(bits).to_f32();
                }
            }
            Dtype::U32 | Dtype::U8 => panic!("floats do not come from an integer buffer"),
        }
    }

    fn read_u32(&self, buffer: &Buffer, offset: usize, values: &mut [u32]) {
        assert!(buffer.dtype() == Dtype::U32, "integers do not come from a buffer of {:?}", buffer.dtype());
        self.read(buffer, offset * 4, bytes_of_mut(values));
    }

    fn embed(&self, table: &Weight, tokens: &Buffer, rows: usize, out: &mut Buffer) {
        let weight = tiled(table);
        let table = Table { layout: weight.layout(), tiles: weight.tiles(), factors: weight.factors() };
        self.embed.embed(table, tokens, rows, out);
    }

    fn gather_rows(&self, x: &Buffer, indices: &Buffer, rows: usize, width: usize, out: &mut Buffer) {
        self.rows.gather_rows(x, indices, rows, width, out);
    }

    fn input_form(&self, weights: &mut dyn Iterator<Item = &Weight>, rows: usize) -> InputForm {
        self.linear.input_form(weights.map(|weight| (tiled(weight), Preparation::of(weight.scheme))), rows)
    }

    fn rms_norm(
        &self,
        x: &Buffer,
        weight: &Buffer,
        eps: f32,
        rows: usize,
        form: InputForm,
        out: &mut Buffer,
    ) {
        self.norm.rms_norm(x, weight, eps, rows, form, out);
    }

    fn add_rms_norm(
        &self,
        delta: &Buffer,
        residual: &mut Buffer,
        weight: &Buffer,
        eps: f32,
        rows: usize,
        form: InputForm,
        out: &mut Buffer,
    ) {
        self.norm.add_rms_norm(delta, residual, weight, eps, rows, form, out);
    }

    fn linear(
        &self,
        x: &Buffer,
        rows: usize,
        weight: &Weight,
        out: &mut Buffer,
        out_width: usize,
        column: usize,
    ) {
        self.linear.linear(x, rows, tiled(weight), Preparation::of(weight.scheme), out, out_width, column);
    }

    fn rope_table(&self, positions: &Buffer, inv_freq: &Buffer, factor: f32, rows: usize, out: &mut Buffer) {
        self.rope.table(positions, inv_freq, factor, rows, out);
    }

    fn rope_and_cache(
        &self,
        qkv: &mut Buffer,
        heads: Heads,
        rope: &Buffer,
        norm: Option<HeadNorm<'_>>,
        slots: &Buffer,
        rows: usize,
        cache: &mut PagedKv,
    ) {
        self.rope.rope_and_cache(qkv, heads, rope, norm, slots, rows, cache);
    }

    fn paged_attention(
        &self,
        qkv: &Buffer,
        heads: Heads,
        scale: f32,
        window: Option<usize>,
        inputs: &AttentionInputs<'_>,
        cache: &PagedKv,
        form: InputForm,
        out: &mut Buffer,
    ) {
        self.attention.attend(qkv, heads, scale, window, inputs, cache, form, out);
    }

    fn fuses_gated_linear(&self) -> bool {
        true
    }

    fn gated_linear(
        &self,
        x: &Buffer,
        rows: usize,
        weight: &Weight,
        _: &mut Buffer,
        form: InputForm,
        out: &mut Buffer,
    ) {
        self.linear.gated(x, rows, tiled(weight), Preparation::of(weight.scheme), form, out);
    }

    fn silu_mul(&self, gate_up: &Buffer, rows: usize, width: usize, out: &mut Buffer) {
        self.rows.silu_mul(gate_up, rows, width, out);
    }

    fn sample(&self, logits: &Buffer, width: usize, params: &[SampleParams], out: &mut Buffer) {
        let rows = params.len();
        let fill = |bytes: &mut [u8]| SampleOperator::write_parameters(params, bytes);
        let launch = |_: &Context, parameters| self.sample.sample(logits, width, rows, parameters, &mut *out);
        let staging = &mut self.state.borrow_mut().staging;
        if let Err(error) = staging.submit(SampleOperator::parameter_bytes(rows), fill, launch) {
            panic!("sampling parameters: {error}");
        }
    }

    fn logprobs(
        &self,
        logits: &Buffer,
        width: usize,
        rows: &[usize],
        targets: &[u32],
        top: usize,
    ) -> Vec<TokenLogprobs> {
        match self.logprobs.logprobs(logits, width, rows, targets, top) {
            Ok(logprobs) => logprobs,
            Err(error) => panic!("log-probabilities: {error}"),
        }
    }
}

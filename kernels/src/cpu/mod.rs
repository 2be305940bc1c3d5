//! The CPU backend: F32 activations, packed weights, every operator independent of batch, threads and instruction set.

mod arena;
mod attention;
mod elementwise;
mod linear;
mod memory;
mod packed;
mod plain_read;
mod pool;
mod sampling;
mod simd;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::sync::Arc;

use self::arena::Arena;
use self::attention::{AttentionScratch, CacheWriter, KvLayout, PairIsa};
use self::linear::{IntegerCodec, LinearScratch, OutColumns, Product, linear, rotate};
pub(crate) use self::memory::AlignedBytes;
use self::memory::{Scratch, zeros};
use self::packed::PackError;
pub(crate) use self::packed::PackedWeight;
pub use self::plain_read::PlainRead;
use self::pool::{DisjointSlices, Pool};
use self::sampling::Sampler;
use crate::backend::{
    AttentionInputs, Backend, HeadNorm, Heads, LinearKernel, PagedKv, SampleParams, TokenLogprobs,
    WeightSource,
};
use crate::buffer::{Buffer, Component, Dtype, MemoryAccount, Storage};
use crate::error::{Error, Result};
use crate::input_form::InputForm;
use crate::isa::Isa;
use crate::kv_cache_dtype::KvCacheDtype;
use crate::mx::Scheme;
use crate::weight::{Weight, WeightData};

/// Elements below which a row operator is not worth a parallel region.
const SERIAL_ELEMENTS: usize = 16 * 1024;

/// The processor.
pub(crate) struct CpuBackend {
    isa: Isa,
    pairs: PairIsa,
    memory: Arc<MemoryAccount>,
    state: RefCell<State>,
}

/// Threads, and scratch that grows to what the largest call needed and is then reused.
struct State {
    pool: Pool,
    linear: LinearScratch,
    /// Rotated activations.
    rotated: Scratch,
    /// Where weights are.
    arena: Arena,
    attention: AttentionScratch,
    /// One per thread.
    samplers: Vec<Sampler>,
}

impl CpuBackend {
    /// A backend with `threads` threads and the best instruction set of this processor.
    pub(crate) fn new(threads: usize) -> Self {
        let isa = Isa::best();
        Self::with_isa(threads, isa, PairIsa::available(isa)[0])
    }

    fn with_isa(threads: usize, isa: Isa, pairs: PairIsa) -> Self {
        let memory = Arc::default();
        let pool = Pool::new(threads);
        let state = RefCell::new(State {
            linear: LinearScratch::new(&memory),
            rotated: Scratch::new(&memory),
            arena: Arena::default(),
            attention: AttentionScratch::new(&memory),
            samplers: (0..pool.threads()).map(|_| Sampler::default()).collect(),
            pool,
        });
        Self { isa, pairs, memory, state }
    }

    /// Calls `body(row, out_row)` for the first `rows` rows of `out`, in parallel when there is enough to do.
    fn for_rows(
        &self,
        rows: usize,
        width: usize,
        out: &mut [f32],
        body: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) {
        let pieces = DisjointSlices::new(&mut out[..rows * width], width);
        // SAFETY: each row is taken once.
        let run = |row: usize| body(row, unsafe { pieces.slice(row) });
        if rows * width < SERIAL_ELEMENTS {
            (0..rows).for_each(run);
        } else {
            self.state.borrow_mut().pool.run(rows, &|row, _| run(row));
        }
    }

    fn kv_layout(&self, heads: Heads, dtype: KvCacheDtype) -> Result<KvLayout> {
        KvLayout::new(heads, dtype).ok_or_else(|| Error::Unsupported {
            what: format!(
                "a KV cache in {dtype} (kv_cache_dtype) with a head dimension of {}, which is no multiple of 32",
                heads.dim
            ),
            device: self.description(),
        })
    }

    fn out_of_memory(&self, what: &str, bytes: usize) -> Error {
        Error::OutOfMemory { what: what.to_owned(), bytes, device: self.description() }
    }
}

/// The floats of an activation buffer.
fn floats(buffer: &Buffer) -> &[f32] {
    match &buffer.storage {
        Storage::HostF32(v) => v,
        _ => panic!("activations are F32 on the CPU, this buffer is {:?}", buffer.dtype()),
    }
}

fn floats_mut(buffer: &mut Buffer) -> &mut [f32] {
    let dtype = buffer.dtype();
    match &mut buffer.storage {
        Storage::HostF32(v) => v,
        _ => panic!("activations are F32 on the CPU, this buffer is {dtype:?}"),
    }
}

/// The bytes of a cache.
fn bytes(buffer: &Buffer) -> &[u8] {
    match &buffer.storage {
        Storage::HostU8(v) => v.as_slice(),
        _ => panic!("a cache is U8 on the CPU, this buffer is {:?}", buffer.dtype()),
    }
}

fn bytes_mut(buffer: &mut Buffer) -> &mut [u8] {
    let dtype = buffer.dtype();
    match &mut buffer.storage {
        Storage::HostU8(v) => v.as_mut_slice(),
        _ => panic!("a cache is U8 on the CPU, this buffer is {dtype:?}"),
    }
}

fn integers(buffer: &Buffer) -> &[u32] {
    match &buffer.storage {
        Storage::HostU32(v) => v,
        _ => panic!("step inputs are U32, this buffer is {:?}", buffer.dtype()),
    }
}

fn packed(weight: &Weight) -> &PackedWeight {
    match &weight.data {
        WeightData::Cpu(packed) => packed,
        #[cfg(feature = "cuda")]
        WeightData::Cuda(_) => panic!("a weight of another device"),
    }
}

impl Backend for CpuBackend {
    fn description(&self) -> String {
        let threads = self.state.borrow().pool.threads();
        format!("cpu, {}, {threads} thread{}", self.isa.name(), if threads == 1 { "" } else { "s" })
    }

    fn linear_kernel(&self, scheme: Option<Scheme>) -> LinearKernel {
        let codec = scheme.map_or("dense", |s| s.weight.format.element.spec().name);
        let activations = match scheme.and_then(IntegerCodec::for_scheme) {
            None => "f32",
            Some(integer) if integer.planes() == 1 => "int8",
            Some(_) => "int16",
        };
        // `linear` quantizes the input as the scheme declares, whatever the kernel.
        LinearKernel { name: format!("cpu_{}_{codec}_{activations}", self.isa.name()), executed: scheme }
    }

    fn memory(&self) -> &Arc<MemoryAccount> {
        &self.memory
    }

    fn activation_dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn alloc(&self, dtype: Dtype, len: usize, component: Component) -> Result<Buffer> {
        let bytes = len * dtype.size_bytes();
        let storage = match dtype {
            Dtype::F32 => zeros(len).map(Storage::HostF32),
            Dtype::Bf16 => zeros(len).map(Storage::HostBf16),
            Dtype::U32 => zeros(len).map(Storage::HostU32),
            Dtype::U8 => AlignedBytes::zeroed(len).map(Storage::HostU8),
        };
        let storage = storage.ok_or_else(|| self.out_of_memory(component.label(), bytes))?;
        Ok(Buffer::new(storage, self.memory.charge(component, bytes)))
    }

    fn upload(&self, parts: &[WeightSource<'_>], bias: Option<&[f32]>) -> Result<Weight> {
        let first = parts.first().expect("a weight has at least one part");
        let scheme = first.scheme();
        assert!(parts.iter().all(|part| part.stacks_with(first)), "parts stack with each other");
        let packed = {
            let State { pool, arena, .. } = &mut *self.state.borrow_mut();
            PackedWeight::new(parts, pool, arena)
        };
        let weight = packed.map_err(|error| match error {
            PackError::OutOfMemory(bytes) => self.out_of_memory("a weight", bytes),
            PackError::UnsupportedBlock => Error::Unsupported {
                what: match scheme {
                    Some(scheme) => format!("{scheme} with {} columns", first.shape()[1]),
                    None => "this weight".to_owned(),
                },
                device: self.description(),
            },
        })?;
        assert!(bias.is_none_or(|b| b.len() == weight.shape[0]), "one bias per row");
        let (codes, scales) = (weight.codes.as_slice().len(), weight.scales.as_slice().len());
        let codes_component = if scheme.is_some() { Component::Weights } else { Component::Unquantized };
        let mut charges =
            vec![self.memory.charge(codes_component, codes), self.memory.charge(Component::Scales, scales)];
        if let Some(bias) = bias {
            charges.push(self.memory.charge(Component::Unquantized, size_of_val(bias)));
        }
        Ok(Weight {
            shape: weight.shape,
            scheme,
            data: WeightData::Cpu(weight),
            bias: bias.map(<[f32]>::to_vec),
            _charges: charges,
            bytes: codes + scales,
        })
    }

    fn attention_kernel(&self, dtype: KvCacheDtype) -> String {
        let isa = if dtype == KvCacheDtype::F32 { self.isa.name() } else { self.pairs.name() };
        format!("cpu_{isa}_{dtype}")
    }

    fn alloc_kv(&self, blocks: usize, heads: Heads, dtype: KvCacheDtype) -> Result<PagedKv> {
        let layout = self.kv_layout(heads, dtype)?;
        Ok(PagedKv {
            k: self.alloc(Dtype::U8, blocks * layout.key_block_bytes(), Component::KvCache)?,
            v: self.alloc(Dtype::U8, blocks * layout.value_block_bytes(), Component::KvCache)?,
            blocks,
            dtype,
        })
    }

    fn kv_block_bytes(&self, heads: Heads, dtype: KvCacheDtype) -> Result<usize> {
        let layout = self.kv_layout(heads, dtype)?;
        Ok(layout.key_block_bytes() + layout.value_block_bytes())
    }

    fn write_f32(&self, buffer: &mut Buffer, offset: usize, values: &[f32]) {
        match &mut buffer.storage {
            Storage::HostF32(v) => v[offset..][..values.len()].copy_from_slice(values),
            Storage::HostBf16(v) => {
                for (out, &x) in v[offset..][..values.len()].iter_mut().zip(values) {
                    *out = half::bf16::from_f32(x).to_bits();
                }
            }
            Storage::HostU32(_) | Storage::HostU8(_) => panic!("floats do not go into an integer buffer"),
            #[cfg(feature = "cuda")]
            Storage::Cuda { .. } => panic!("a buffer of another device"),
        }
    }

    fn write_u32(&self, buffer: &mut Buffer, offset: usize, values: &[u32]) {
        match &mut buffer.storage {
            Storage::HostU32(v) => v[offset..][..values.len()].copy_from_slice(values),
            _ => panic!("integers go into a U32 buffer"),
        }
    }

    fn read_f32(&self, buffer: &Buffer, offset: usize, values: &mut [f32]) {
        match &buffer.storage {
            Storage::HostF32(v) => values.copy_from_slice(&v[offset..][..values.len()]),
            Storage::HostBf16(v) => {
                for (out, &x) in values.iter_mut().zip(&v[offset..]) {
                    *out = half::bf16::from_bits(x).to_f32();
                }
            }
            Storage::HostU32(_) | Storage::HostU8(_) => panic!("floats do not come from an integer buffer"),
            #[cfg(feature = "cuda")]
            Storage::Cuda { .. } => panic!("a buffer of another device"),
        }
    }

    fn read_u32(&self, buffer: &Buffer, offset: usize, values: &mut [u32]) {
        values.copy_from_slice(&integers(buffer)[offset..][..values.len()]);
    }

    fn embed(&self, table: &Weight, tokens: &Buffer, rows: usize, out: &mut Buffer) {
        let (table, tokens) = (packed(table), integers(tokens));
        let width = table.shape[1];
        self.for_rows(rows, width, floats_mut(out), &|m, out| {
            table.decode_row(tokens[m] as usize, out);
        });
    }

    fn gather_rows(&self, x: &Buffer, indices: &Buffer, rows: usize, width: usize, out: &mut Buffer) {
        let (x, indices) = (floats(x), integers(indices));
        self.for_rows(rows, width, floats_mut(out), &|m, out| {
            out.copy_from_slice(&x[indices[m] as usize * width..][..width]);
        });
    }

    fn rms_norm(&self, x: &Buffer, weight: &Buffer, eps: f32, rows: usize, _: InputForm, out: &mut Buffer) {
        let (isa, x, weight) = (self.isa, floats(x), floats(weight));
        let width = weight.len();
        self.for_rows(rows, width, floats_mut(out), &|m, out| {
            // SAFETY: `isa` is available.
            unsafe { elementwise::rms_norm(isa, &x[m * width..][..width], weight, eps, out) };
        });
    }

    fn add_rms_norm(
        &self,
        delta: &Buffer,
        residual: &mut Buffer,
        weight: &Buffer,
        eps: f32,
        rows: usize,
        _: InputForm,
        out: &mut Buffer,
    ) {
        let (isa, delta, weight) = (self.isa, floats(delta), floats(weight));
        let width = weight.len();
        let residual = DisjointSlices::new(&mut floats_mut(residual)[..rows * width], width);
        self.for_rows(rows, width, floats_mut(out), &|m, out| {
            // SAFETY: each row is taken once; `isa` is available.
            unsafe {
                let residual = residual.slice(m);
                elementwise::add_rms_norm(isa, &delta[m * width..][..width], residual, weight, eps, out);
            }
        });
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
        let State { pool, linear: scratch, rotated, .. } = &mut *self.state.borrow_mut();
        let x = match weight.scheme.filter(|scheme| scheme.rotation.is_some()) {
            Some(scheme) => rotate(pool, rotated, scheme, floats(x), rows, weight.shape[1]),
            None => floats(x),
        };
        let product = Product {
            weight: packed(weight),
            bias: weight.bias.as_deref(),
            activation: weight.scheme.and_then(|s| s.activation),
            x,
            tokens: rows,
            columns: OutColumns { width: out_width, column },
        };
        linear(self.isa, pool, scratch, &product, floats_mut(out));
    }

    fn rope_table(&self, positions: &Buffer, inv_freq: &Buffer, factor: f32, rows: usize, out: &mut Buffer) {
        let (positions, inv_freq) = (integers(positions), floats(inv_freq));
        let half = inv_freq.len();
        self.for_rows(rows, 2 * half, floats_mut(out), &|m, out| {
            let (cos, sin) = out.split_at_mut(half);
            for ((cos, sin), f) in cos.iter_mut().zip(sin).zip(inv_freq) {
                let (s, c) = (positions[m] as f32 * f).sin_cos();
                (*cos, *sin) = (c * factor, s * factor);
            }
        });
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
        let (isa, rope, slots) = (self.isa, floats(rope), integers(slots));
        let (dim, width) = (heads.dim, heads.qkv_width());
        assert!(dim.is_multiple_of(2), "a head is made of pairs");
        let norm = norm.map(|norm| (floats(norm.q), floats(norm.k), norm.eps));
        assert!(norm.is_none_or(|(q, k, _)| q.len() == dim && k.len() == dim), "one norm weight per element");
        let layout = self.kv_layout(heads, cache.dtype).expect("alloc_kv has made this cache");
        let writer = CacheWriter::new(layout, bytes_mut(&mut cache.k), bytes_mut(&mut cache.v));
        self.for_rows(rows, width, floats_mut(qkv), &|m, row| {
            let (cos, sin) = rope[m * dim..][..dim].split_at(dim / 2);
            for (h, head) in row.chunks_exact_mut(dim).take(heads.q + heads.kv).enumerate() {
                // SAFETY: `isa` is available.
                unsafe {
                    if let Some((q, k, eps)) = norm {
                        elementwise::head_norm(isa, head, if h < heads.q { q } else { k }, eps);
                    }
                    elementwise::rotate(isa, head, cos, sin);
                }
            }
            let (keys, values) = row[heads.q_width()..].split_at(heads.kv * dim);
            // SAFETY: rows of a step have slots of their own; the cache is borrowed.
            unsafe { writer.write(slots[m] as usize, keys, values) };
        });
    }

    fn paged_attention(
        &self,
        qkv: &Buffer,
        heads: Heads,
        scale: f32,
        window: Option<usize>,
        inputs: &AttentionInputs<'_>,
        cache: &PagedKv,
        _: InputForm,
        out: &mut Buffer,
    ) {
        let query_start = &integers(inputs.query_start)[..=inputs.sequences];
        let rows = query_start[inputs.sequences] as usize;
        let step = attention::Step {
            cache: attention::Cache {
                layout: self.kv_layout(heads, cache.dtype).expect("alloc_kv has made this cache"),
                k: bytes(&cache.k),
                v: bytes(&cache.v),
            },
            qkv: floats(qkv),
            scale,
            window,
            query_start,
            context_lens: &integers(inputs.context_lens)[..inputs.sequences],
            block_tables: integers(inputs.block_tables),
            max_blocks: inputs.max_blocks,
        };
        let State { pool, attention, .. } = &mut *self.state.borrow_mut();
        let out = &mut floats_mut(out)[..rows * heads.q_width()];
        attention::attention(self.isa, self.pairs, pool, attention, &step, out);
    }

    fn silu_mul(&self, gate_up: &Buffer, rows: usize, width: usize, out: &mut Buffer) {
        let (isa, gate_up) = (self.isa, floats(gate_up));
        self.for_rows(rows, width, floats_mut(out), &|m, out| {
            let (gate, up) = gate_up[m * 2 * width..][..2 * width].split_at(width);
            // SAFETY: `isa` is available.
            unsafe { elementwise::silu_mul(isa, gate, up, out) };
        });
    }

    fn sample(&self, logits: &Buffer, width: usize, params: &[SampleParams], out: &mut Buffer) {
        let (isa, logits) = (self.isa, floats(logits));
        let Storage::HostU32(out) = &mut out.storage else { panic!("tokens are U32") };
        let State { pool, samplers, .. } = &mut *self.state.borrow_mut();
        let (out, samplers) = (DisjointSlices::new(out, 1), DisjointSlices::new(samplers, 1));
        pool.run(params.len(), &|m, thread| {
            // SAFETY: each row is taken once, and each thread has its own sampler.
            let (out, sampler) = unsafe { (out.slice(m), samplers.slice(thread)) };
            out[0] = sampler[0].sample(isa, &logits[m * width..][..width], &params[m]);
        });
    }

    fn logprobs(
        &self,
        logits: &Buffer,
        width: usize,
        rows: &[usize],
        targets: &[u32],
        top: usize,
    ) -> Vec<TokenLogprobs> {
        let (isa, logits) = (self.isa, floats(logits));
        let mut out = vec![None; rows.len()];
        let pieces = DisjointSlices::new(&mut out, 1);
        self.state.borrow_mut().pool.run(rows.len(), &|i, _| {
            let row = &logits[rows[i] * width..][..width];
            // SAFETY: each row is taken once.
            let out = unsafe { pieces.slice(i) };
            out[0] = Some(sampling::logprobs(isa, row, targets[i], top));
        });
        out.into_iter().flatten().collect()
    }
}

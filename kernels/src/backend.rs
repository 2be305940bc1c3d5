//! The one seam between models and devices.

use std::sync::Arc;

use crate::buffer::{Buffer, Component, Dtype, MemoryAccount};
use crate::error::Result;
use crate::graph::Graph;
use crate::input_form::InputForm;
use crate::kv_cache_dtype::KvCacheDtype;
use crate::mx::{Cast, MxTensor, Rotation, ScaleRounding, Scheme};
use crate::weight::Weight;

/// Tokens in one block of the paged KV cache.
pub const KV_BLOCK_TOKENS: usize = 16;

/// Rows `[rows, cols]` to upload, as a checkpoint holds them.
#[derive(Debug, Clone, Copy)]
pub enum WeightSource<'a> {
    /// An MX tensor in the packed on-disk layout, and how the layer's input is to be quantized.
    Mx {
        /// Codes and scales.
        tensor: MxTensor<'a>,
        /// The rule the scales were made with (recorded, not needed to decode).
        scale_rounding: ScaleRounding,
        /// How the input activations are quantized at run time; `None` leaves them as they are.
        activation: Option<Cast>,
        /// How the rows were rotated, and the input is at run time.
        rotation: Option<Rotation>,
    },
    /// Unquantized, little-endian.
    Dense {
        /// How to read `bytes`.
        dtype: DenseDtype,
        /// `[rows, cols]`.
        shape: [usize; 2],
        /// `rows * cols` elements, row-major.
        bytes: &'a [u8],
    },
}

impl WeightSource<'_> {
    /// `[rows, cols]` = `[N, K]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::Mx { tensor, .. } => tensor.shape(),
            Self::Dense { shape, .. } => *shape,
        }
    }

    /// The declared scheme; `None` for a dense weight.
    pub fn scheme(&self) -> Option<Scheme> {
        match *self {
            Self::Mx { tensor, scale_rounding, activation, rotation } => {
                let weight = Cast { format: tensor.format(), scale_rounding };
                Some(Scheme { weight, activation, rotation })
            }
            Self::Dense { .. } => None,
        }
    }

    /// Whether `self` and `other` can be parts of one weight: the same scheme or dense type, and the same columns.
    pub fn stacks_with(&self, other: &WeightSource<'_>) -> bool {
        let dtype = |source: &WeightSource<'_>| match source {
            WeightSource::Dense { dtype, .. } => Some(*dtype),
            WeightSource::Mx { .. } => None,
        };
        self.scheme() == other.scheme() && dtype(self) == dtype(other) && self.shape()[1] == other.shape()[1]
    }
}

/// Element types of unquantized checkpoint tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DenseDtype {
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
    /// IEEE single.
    F32,
}

impl DenseDtype {
    /// Bytes of one element.
    pub const fn size_bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }
}

/// Attention geometry of a layer. A row of the fused projection is `[q heads | k heads | v heads] x dim`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub q: usize,
    /// Key/value heads; divides `q`.
    pub kv: usize,
    /// Elements per head.
    pub dim: usize,
}

impl Heads {
    /// Width of a row of the fused q, k, v projection.
    pub const fn qkv_width(self) -> usize {
        (self.q + 2 * self.kv) * self.dim
    }

    /// Width of a row of q, and of the attention output.
    pub const fn q_width(self) -> usize {
        self.q * self.dim
    }
}

/// One layer's paged KV cache: `blocks` blocks of [`KV_BLOCK_TOKENS`] tokens. The element order inside a block
/// belongs to the backend. Slot `s` is token `s % KV_BLOCK_TOKENS` of block `s / KV_BLOCK_TOKENS`.
#[derive(Debug)]
pub struct PagedKv {
    /// Keys, after RoPE.
    pub k: Buffer,
    /// Values.
    pub v: Buffer,
    /// Number of blocks.
    pub blocks: usize,
    /// How keys and values are stored.
    pub dtype: KvCacheDtype,
}

/// Which rows of a step belong to which sequence, and where their keys and values are.
#[derive(Debug, Clone, Copy)]
pub struct AttentionInputs<'a> {
    /// Number of rows M, of all sequences together.
    pub rows: usize,
    /// Number of sequences S; each has at least one row.
    pub sequences: usize,
    /// U32 `[S + 1]`: rows `query_start[s] .. query_start[s + 1]` belong to sequence `s`, in position order.
    pub query_start: &'a Buffer,
    /// U32 `[S]`: tokens in the cache after this step; the last row of `s` is at position `context_lens[s] - 1`.
    pub context_lens: &'a Buffer,
    /// U32 `[S, max_blocks]`: block numbers of each sequence, in position order.
    pub block_tables: &'a Buffer,
    /// Row stride of `block_tables`: no sequence has more blocks.
    pub max_blocks: usize,
    /// `query_start` and `context_lens` as the host knows them, for devices that cut the work of sequences with several rows
    /// by their sizes. A step that is recorded to be replayed with other sizes has one row per sequence.
    pub host: HostSpans<'a>,
}

/// The sizes of [`AttentionInputs`], on the host.
#[derive(Debug, Clone, Copy)]
pub struct HostSpans<'a> {
    /// `[S + 1]`.
    pub query_start: &'a [u32],
    /// `[S]`.
    pub context_lens: &'a [u32],
}

/// Per-head RMS norm of q and k before RoPE (Qwen3).
#[derive(Debug, Clone, Copy)]
pub struct HeadNorm<'a> {
    /// F32 `[dim]`, for q.
    pub q: &'a Buffer,
    /// F32 `[dim]`, for k.
    pub k: &'a Buffer,
    /// Added to the mean square.
    pub eps: f32,
}

/// How one row's next token is drawn. Order: temperature, top-k, top-p, min-p.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampleParams {
    /// 0 takes the most likely token (the lowest id among equals).
    pub temperature: f32,
    /// Keep the k most likely tokens; `None` keeps all.
    pub top_k: Option<u32>,
    /// Keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than this times the most likely one; 0 keeps all.
    pub min_p: f32,
    /// With `draw`, determines the random number: a row's result depends on nothing else in the batch.
    pub seed: u64,
    /// Index of this draw in its sequence.
    pub draw: u64,
}

/// Log-probabilities of one row of logits, under softmax at temperature 1.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// Log-probability of the target token.
    pub logprob: f32,
    /// 1 for the most likely token; equals count as better only when their id is lower.
    pub rank: u32,
    /// The most likely tokens and their log-probabilities, best first.
    pub top: Vec<(u32, f32)>,
}

/// How a device multiplies by weights of one scheme; the labels of `mx_linear_info`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearKernel {
    /// The kernel's name: `cpu_avx512_mxfp4_f32`.
    pub name: String,
    /// The scheme it computes: the declared one, unless the device says otherwise here.
    pub executed: Option<Scheme>,
}

/// What to write to a U32 buffer before a step: rows of `width` values, to rows of `stride` elements.
#[derive(Debug)]
pub struct InputWrite<'a> {
    /// Where the rows go, from its first element on.
    pub buffer: &'a mut Buffer,
    /// Whole rows.
    pub values: &'a [u32],
    /// Values of a row; at least 1.
    pub width: usize,
    /// Elements from the start of one row to the start of the next; at least `width`.
    pub stride: usize,
}

impl<'a> InputWrite<'a> {
    /// `values` side by side.
    pub fn flat(buffer: &'a mut Buffer, values: &'a [u32]) -> Self {
        Self { buffer, values, width: 1, stride: 1 }
    }
}

/// Memory of a device of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Bytes that nobody uses now.
    pub free_bytes: usize,
    /// All bytes.
    pub total_bytes: usize,
}

/// A device. Made once, on the thread that uses it.
///
/// Operators write into `out`; they never synchronize, and allocate nothing once their scratch has grown to the largest
/// step. `rows` is the number of
/// rows M in use; buffers may be longer. Activations have [`activation_dtype`](Self::activation_dtype).
/// On every backend a row's result does not depend on the other rows of the call.
pub trait Backend {
    /// What runs, for people: `cpu, avx512, 2 threads`.
    fn description(&self) -> String;

    /// What executes weights of `scheme` (`None`: dense) here.
    fn linear_kernel(&self, scheme: Option<Scheme>) -> LinearKernel;

    /// Times so far that quantized activations of one token of one product had to be rounded a second time, to fit the
    /// numbers that the device multiplies: too far apart for one power of two per token. Waits for the device.
    fn rounded_tokens(&self) -> u32 {
        0
    }

    /// Bytes held, by component.
    fn memory(&self) -> &Arc<MemoryAccount>;

    /// The memory of a device that has its own; `None` where it is the host's.
    fn device_memory(&self) -> Option<DeviceMemory> {
        None
    }

    /// Whether [`capture`](Self::capture) records: the device runs behind the host, and launching operators one by
    /// one takes longer than running them.
    fn captures(&self) -> bool {
        false
    }

    /// Records the operators that `step` calls, without running them. Every one of them has run before with as many
    /// rows. A [`replay`](Self::replay) runs them on the same buffers, with what these hold then.
    ///
    /// # Panics
    /// [`captures`](Self::captures) is false, or `step` reads from the device.
    fn capture(&self, _step: &mut dyn FnMut()) -> Graph {
        panic!("{} records nothing", self.description());
    }

    /// Runs the operators of `graph`, which this device recorded.
    fn replay(&self, graph: &Graph) {
        panic!("{} has not recorded {graph:?}", self.description());
    }

    /// Element type of activations.
    fn activation_dtype(&self) -> Dtype;

    /// `len` zeroed elements.
    ///
    /// # Errors
    /// Out of memory.
    fn alloc(&self, dtype: Dtype, len: usize, component: Component) -> Result<Buffer>;

    /// Stacks `parts` along rows and repacks them once for this device; all of them
    /// [stack with](WeightSource::stacks_with) each other. `bias`, if any, has one element per stacked row.
    ///
    /// # Errors
    /// Out of memory, or a format this device cannot run.
    fn upload(&self, parts: &[WeightSource<'_>], bias: Option<&[f32]>) -> Result<Weight>;

    /// As [`upload`](Self::upload), for [`gated_linear`](Self::gated_linear) alone: the first half of the rows are gates,
    /// the other those that they gate.
    ///
    /// # Errors
    /// As there.
    fn upload_gated(&self, parts: &[WeightSource<'_>], bias: Option<&[f32]>) -> Result<Weight> {
        self.upload(parts, bias)
    }

    /// The name of the kernel that executes attention over a cache of `dtype`: `cpu_avx512bf16_mxfp8`.
    fn attention_kernel(&self, dtype: KvCacheDtype) -> String;

    /// One layer's KV cache of `blocks` blocks.
    ///
    /// # Errors
    /// Out of memory, or what [`kv_block_bytes`](Self::kv_block_bytes) refuses.
    fn alloc_kv(&self, blocks: usize, heads: Heads, dtype: KvCacheDtype) -> Result<PagedKv>;

    /// Bytes of one block of a layer's KV cache, scales included.
    ///
    /// # Errors
    /// The device has no attention kernel for `dtype`, or the head dimension is not a multiple of an MX block.
    fn kv_block_bytes(&self, heads: Heads, dtype: KvCacheDtype) -> Result<usize>;

    /// Copies `values` to `buffer[offset..]`, converting to its float dtype.
    fn write_f32(&self, buffer: &mut Buffer, offset: usize, values: &[f32]);

    /// Copies `values` to `buffer[offset..]`.
    fn write_u32(&self, buffer: &mut Buffer, offset: usize, values: &[u32]);

    /// Makes all `writes`, in one transfer if the device is remote.
    fn write_inputs(&self, writes: &mut [InputWrite<'_>]) {
        for InputWrite { buffer, values, width, stride } in writes {
            if width == stride {
                self.write_u32(buffer, 0, values);
                continue;
            }
            for (row, values) in values.chunks(*width).enumerate() {
                self.write_u32(buffer, row * *stride, values);
            }
        }
    }

    /// Copies `buffer[offset..]` to `values`, waiting for the operators that write it.
    fn read_f32(&self, buffer: &Buffer, offset: usize, values: &mut [f32]);

    /// As [`read_f32`](Self::read_f32).
    fn read_u32(&self, buffer: &Buffer, offset: usize, values: &mut [u32]);

    /// `out[m] = table[tokens[m]]`, M = `rows`; `tokens` U32.
    fn embed(&self, table: &Weight, tokens: &Buffer, rows: usize, out: &mut Buffer);

    /// `out[m] = x[indices[m]]`, rows of `width` elements.
    fn gather_rows(&self, x: &Buffer, indices: &Buffer, rows: usize, width: usize, out: &mut Buffer);

    /// The form in which `rows` rows of activations are best left for products with all of `weights`. An operator that is
    /// given it leaves them so if it can: [`Buffer::form`] says what it did.
    fn input_form(&self, _weights: &mut dyn Iterator<Item = &Weight>, _rows: usize) -> InputForm {
        InputForm::Plain
    }

    /// `out[m] = x[m] / sqrt(mean(x[m]^2) + eps) * weight`, in `form`; `weight` F32 `[width]`.
    fn rms_norm(&self, x: &Buffer, weight: &Buffer, eps: f32, rows: usize, form: InputForm, out: &mut Buffer);

    /// `residual[m] += delta[m]`, then [`rms_norm`](Self::rms_norm) of the residual into `out`.
    #[allow(clippy::too_many_arguments, reason = "one fused kernel")]
    fn add_rms_norm(
        &self,
        delta: &Buffer,
        residual: &mut Buffer,
        weight: &Buffer,
        eps: f32,
        rows: usize,
        form: InputForm,
        out: &mut Buffer,
    );

    /// `out[m, n] = sum_k act(x[m])[k] * weight[n, k] + bias[n]`, where `act` is the rotation and then the activation
    /// format that the weight's scheme declares, unless `x` was left so. `x` `[M, K]`, `out` `[M, out_width]`; the result's N
    /// columns start at `column`.
    fn linear(
        &self,
        x: &Buffer,
        rows: usize,
        weight: &Weight,
        out: &mut Buffer,
        out_width: usize,
        column: usize,
    );

    /// `out[m] = factor * [cos(p f_0) .. cos(p f_{d-1}) | sin(p f_0) .. sin(p f_{d-1})]` with `p = positions[m]`
    /// and `f` = `inv_freq`, F32 `[d]`, d = half the head dimension. Once per step, for all layers.
    fn rope_table(&self, positions: &Buffer, inv_freq: &Buffer, factor: f32, rows: usize, out: &mut Buffer);

    /// Normalizes (if asked) and rotates q and k (the halves of a head are the pairs, as in Hugging Face), q in
    /// place; writes k and v to `slots` (U32 `[M]`) of the cache. `qkv` is `[M, heads.qkv_width()]`.
    #[allow(clippy::too_many_arguments, reason = "one fused kernel")]
    fn rope_and_cache(
        &self,
        qkv: &mut Buffer,
        heads: Heads,
        rope: &Buffer,
        norm: Option<HeadNorm<'_>>,
        slots: &Buffer,
        rows: usize,
        cache: &mut PagedKv,
    );

    /// Causal attention of the q part of `qkv` over the cache: the row at position p sees positions
    /// `max(0, p + 1 - window) ..= p`. `out` is `[M, heads.q_width()]`, in `form`; scores are multiplied by `scale`.
    #[allow(clippy::too_many_arguments, reason = "one fused kernel")]
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
    );

    /// `out[m, i] = silu(gate_up[m, i]) * gate_up[m, width + i]`; `gate_up` is `[M, 2 * width]`.
    fn silu_mul(&self, gate_up: &Buffer, rows: usize, width: usize, out: &mut Buffer);

    /// Whether [`gated_linear`](Self::gated_linear) does all at once: its scratch may then be empty.
    fn fuses_gated_linear(&self) -> bool {
        false
    }

    /// `out[m, i] = silu(gate_up[m, i]) * gate_up[m, N / 2 + i]`, in `form`, where `gate_up` is what
    /// [`linear`](Self::linear) makes of `x` and `weight`, which [`upload_gated`](Self::upload_gated) made. `scratch` is
    /// `[M, N]`.
    fn gated_linear(
        &self,
        x: &Buffer,
        rows: usize,
        weight: &Weight,
        scratch: &mut Buffer,
        _form: InputForm,
        out: &mut Buffer,
    ) {
        let n = weight.shape()[0];
        self.linear(x, rows, weight, scratch, n, 0);
        self.silu_mul(scratch, rows, n / 2, out);
    }

    /// Draws one token per row of `logits` `[M, width]`, M = `params.len()`, into `out` (U32 `[M]`).
    fn sample(&self, logits: &Buffer, width: usize, params: &[SampleParams], out: &mut Buffer);

    /// Log-probabilities of `targets[i]` in row `rows[i]` of `logits` `[_, width]`, with the `top` best tokens.
    fn logprobs(
        &self,
        logits: &Buffer,
        width: usize,
        rows: &[usize],
        targets: &[u32],
        top: usize,
    ) -> Vec<TokenLogprobs>;
}

/// Devices that [`open`] knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// The processor, with this many threads.
    Cpu {
        /// Worker threads, the caller's included; at least 1.
        threads: usize,
    },
    /// An NVIDIA GPU, in builds with feature `cuda`.
    Cuda {
        /// Its number among the visible ones.
        ordinal: usize,
        /// Whether quantized activations are multiplied in BF16 alone, which holds them exactly. Otherwise large
        /// products may hold them in E4M3 with one power of two per token.
        strict: bool,
    },
}

impl Device {
    /// Whether [`open`] has a chance, without opening it.
    ///
    /// # Errors
    /// What is missing: in this build, the driver, the machine.
    pub fn check(self) -> Result<()> {
        match self {
            Self::Cpu { .. } => Ok(()),
            #[cfg(feature = "cuda")]
            Self::Cuda { ordinal, .. } => crate::cuda::Context::check(ordinal),
            #[cfg(not(feature = "cuda"))]
            Self::Cuda { ordinal, .. } => Err(crate::Error::Unavailable {
                device: format!("cuda:{ordinal}"),
                why: "this build has no CUDA (cargo feature `cuda`)".to_owned(),
            }),
        }
    }
}

/// Opens a device. A new device is one arm here.
///
/// # Errors
/// The device is not there.
pub fn open(device: Device) -> Result<Box<dyn Backend>> {
    device.check()?;
    match device {
        Device::Cpu { threads } => Ok(Box::new(crate::cpu::CpuBackend::new(threads))),
        #[cfg(feature = "cuda")]
        Device::Cuda { ordinal, strict } => Ok(Box::new(crate::cuda::CudaBackend::open(ordinal, strict)?)),
        #[cfg(not(feature = "cuda"))]
        Device::Cuda { .. } => unreachable!("not available in this build"),
    }
}

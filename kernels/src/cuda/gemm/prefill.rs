//! Products of many rows with tiled weights: launcher of `cuda/gemm/prefill.cuh` and what goes before it.
//!
//! Weights multiply as BF16, which holds every value of every format, straight from their tiles. Where the activations
//! are quantized too and both operands have E4M3's values, up to a power of two per row and per token, they multiply as
//! E4M3 at twice the rate: the activations quantized into scratch, the weights expanded into it or, for up to some 2000 rows of
//! FP4, on their way to the tensor core. For E2M1, E2M3 and E3M2 that is exact: for weights because the spread of their rows' scales is known, for activations unless a token is
//! counted in [`Prefill::inexact_tokens`]. E4M3 itself may lose some of the bits of the smallest elements.

use std::cell::RefCell;
use std::sync::Arc;

use cudarc::driver::sys;

use super::Product;
use super::plan::{BF16, EXPANDED_ROWS, MOST_RESULT_BYTES, Path, Plan};
use super::quantize::{
    MOST_COLUMNS, PreparationArgument, Quantizer, e4m3_bytes, e4m3_factors, is_within_e4m3,
};
use super::tensor_map::tensor_map;
use crate::buffer::{Charge, Component, Dtype, MemoryAccount};
use crate::cuda::memory::Scratch;
use crate::cuda::{Argument, Context, DeviceBuffer, DevicePtr, Function, Launch, TiledWeight};
use crate::error::Result;
use crate::input_form::{InputForm, Preparation};
use crate::mx::Cast;
use crate::tile::{RowOrder, TILE_COLS, TILE_ROWS, TileFormat};

/// Threads of a warpgroup.
const GROUP_THREADS: u32 = 128;
/// Dynamic shared memory of the product's kernel.
const SHARED_BYTES: u32 = 232_448;
/// Bytes of an expanded tile.
pub(super) const EXPANDED_TILE_BYTES: usize = TILE_ROWS * TILE_COLS;
const EXPAND_THREADS: u32 = 256;

macro_rules! packed_kernels {
    ($($format:literal),*) => {
        [$([
            concat!("prefill_", $format, "_64"),
            concat!("prefill_", $format, "_128"),
            concat!("prefill_", $format, "_256"),
        ]),*]
    };
}

/// Kernels for packed weights, in the order of [`TileFormat::ALL`] and [`BF16`].
const PACKED: [[&str; BF16.len()]; TileFormat::ALL.len()] =
    packed_kernels!("e2m1", "e2m3", "e3m2", "e4m3", "e5m2", "int8", "bf16");

/// The kernel's parameter (`PrefillArgs` in `cuda/gemm/prefill.cuh`).
#[repr(C)]
struct Args {
    x: sys::CUtensorMap,
    tiles: DevicePtr,
    row_factors: DevicePtr,
    token_factors: DevicePtr,
    bias: DevicePtr,
    out: DevicePtr,
    out_stride: u64,
    factor: f32,
    m: u32,
    n: u32,
    row_tiles: u32,
    k_tiles: u32,
    first_row_tile: u32,
    paired_half: u32,
    group: u32,
    is_f32: u32,
    aligned: u32,
    is_gated: u32,
    parts: u32,
    preparation: PreparationArgument,
    partial_sums: DevicePtr,
    arrivals: DevicePtr,
}

// SAFETY: numbers and addresses in the order of the kernel's structure, and like it aligned to 64 bytes by the first.
unsafe impl Argument for Args {}

/// The kernels for many rows, and their scratch.
#[derive(Debug)]
pub(crate) struct Prefill {
    context: Arc<Context>,
    packed: Vec<[Function; BF16.len()]>,
    packed_e4m3: Function,
    expanded: Function,
    expand: [(TileFormat, Function); 4],
    quantizer: Quantizer,
    activations: RefCell<Scratch>,
    weights: RefCell<Scratch>,
    exchange: Exchange,
    /// U32: tokens that E4M3 had to round.
    inexact: DeviceBuffer,
    strict: bool,
}

/// Where blocks that compute parts of the same results leave their sums: see [`Plan::parts`].
#[derive(Debug)]
struct Exchange {
    /// [`MOST_RESULT_BYTES`] for each multiprocessor.
    partial_sums: DeviceBuffer,
    /// U32 for each multiprocessor, zero between launches.
    arrivals: DeviceBuffer,
    _charge: Charge,
}

impl Prefill {
    /// `strict` keeps products of quantized activations in BF16, which is exact, where E4M3 would be faster.
    ///
    /// # Errors
    /// Out of memory.
    pub(crate) fn new(context: &Arc<Context>, account: &Arc<MemoryAccount>, strict: bool) -> Result<Self> {
        let function = |name| context.function(name);
        let sm_count = context.properties().sm_count as usize;
        let partial_sums =
            DeviceBuffer::uninitialized(context, sm_count * MOST_RESULT_BYTES, "partial sums")?;
        let arrivals = DeviceBuffer::zeroed(context, sm_count * size_of::<u32>(), "counters")?;
        let charge = account.charge(Component::Workspace, partial_sums.bytes() + arrivals.bytes());
        Ok(Self {
            packed: PACKED.iter().map(|names| names.map(function)).collect(),
            packed_e4m3: function("prefill_e2m1_e4m3_256"),
            expanded: function("prefill_expanded_192"),
            expand: [
                (TileFormat::E2m1, function("expand_e2m1")),
                (TileFormat::E2m3, function("expand_e2m3")),
                (TileFormat::E3m2, function("expand_e3m2")),
                (TileFormat::E4m3, function("expand_e4m3")),
            ],
            quantizer: Quantizer::new(context),
            activations: RefCell::new(Scratch::new(context, account, "quantized activations")),
            weights: RefCell::new(Scratch::new(context, account, "expanded weights")),
            exchange: Exchange { partial_sums, arrivals, _charge: charge },
            inexact: DeviceBuffer::zeroed(context, size_of::<u32>(), "a counter")?,
            strict,
            context: Arc::clone(context),
        })
    }

    /// Tokens so far whose quantized activations E4M3 had to round, summed over layers. Waits for the device.
    pub(crate) fn inexact_tokens(&self) -> u32 {
        let mut bytes = [0; size_of::<u32>()];
        self.inexact.read(0, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Where tokens are counted that E4M3 had to round.
    pub(crate) fn inexact(&self) -> DevicePtr {
        self.inexact.ptr()
    }

    /// The form in which `rows` rows for `weight`, which declares `preparation`, are multiplied.
    pub(crate) fn input_form(
        &self,
        weight: &TiledWeight,
        preparation: Option<Preparation>,
        rows: usize,
    ) -> InputForm {
        let Some(done) = preparation else { return InputForm::Plain };
        if self.plan(weight, preparation, rows).path.is_e4m3() {
            InputForm::E4m3(done)
        } else {
            InputForm::Prepared(done)
        }
    }

    fn plan(&self, weight: &TiledWeight, preparation: Option<Preparation>, rows: usize) -> Plan {
        let activation = preparation.and_then(|preparation| preparation.activation);
        let e4m3 = activation.is_some_and(|cast| self.allows_e4m3(weight, cast));
        Plan::new(rows, weight.layout(), e4m3, self.context.properties().sm_count)
    }

    /// Computes `product`, whose input is prepared before, unless that is done.
    ///
    /// # Safety
    /// The addresses have the elements that `product` says, 16-byte aligned at `x`.
    ///
    /// # Panics
    /// [`MxGrid`](super::MxGrid) has no such activations; the input was left in a form for other products; out of memory,
    /// the first time scratch is needed as large.
    pub(crate) unsafe fn linear(
        &self,
        weight: &TiledWeight,
        preparation: Option<Preparation>,
        product: &Product,
    ) {
        let plan = self.plan(weight, preparation, product.rows);
        let shape = [product.rows, weight.layout().shape[1]];
        let elements = product.rows * shape[1];
        // The input as it is multiplied, and with E4M3 the factors of its rows.
        let (x, factors) = match (plan.path.is_e4m3(), product.form, preparation) {
            (false, InputForm::Plain, None) => (product.x, 0),
            (false, InputForm::Plain, Some(preparation)) => {
                // SAFETY: the caller's promise.
                (unsafe { self.prepare(preparation, product.x, shape) }, 0)
            }
            (true, InputForm::Plain, Some(Preparation { is_rotated, activation: Some(cast) })) => {
                let bytes = e4m3_bytes(elements, product.rows);
                let values = self.activations.borrow_mut().reserve(bytes);
                let factors = e4m3_factors(values, elements);
                let (context, x, inexact) = (&self.context, product.x, self.inexact.ptr());
                // SAFETY: the scratch has this many elements; the rest is the caller's promise.
                unsafe {
                    self.quantizer.to_e4m3(context, cast, is_rotated, x, shape, values, factors, inexact);
                }
                (values, factors)
            }
            (false, InputForm::Prepared(done), _) if preparation == Some(done) => (product.x, 0),
            (true, InputForm::E4m3(done), _) if preparation == Some(done) => {
                (product.x, e4m3_factors(product.x, elements))
            }
            (_, form, preparation) => panic!("an input left as {form:?} for a product of {preparation:?}"),
        };
        let args = self.args(weight, product, [x, factors], &plan);
        // SAFETY: as above; the kernels wait for their inputs.
        unsafe {
            match plan.path {
                Path::Bf16 => {
                    let format = TileFormat::ALL.iter().position(|format| *format == weight.layout().format);
                    let kernels = &self.packed[format.expect("every format is in the table")];
                    self.launch(&kernels[plan.kernel], &args, &plan);
                }
                Path::E4m3 => self.launch(&self.packed_e4m3, &args, &plan),
                Path::Expanded => self.multiply_expanded(weight, args, &plan),
            }
        }
    }

    /// `x`, BF16 `[rows, cols]`, prepared: BF16 in scratch that the next call uses again.
    ///
    /// # Safety
    /// `x` has that many elements, 16-byte aligned.
    ///
    /// # Panics
    /// As [`Self::linear`].
    pub(crate) unsafe fn prepare(
        &self,
        preparation: Preparation,
        x: DevicePtr,
        [rows, cols]: [usize; 2],
    ) -> DevicePtr {
        let values = self.activations.borrow_mut().reserve(rows * cols * Dtype::Bf16.size_bytes());
        // SAFETY: the scratch has this many elements; the rest is the caller's promise.
        unsafe { self.quantizer.to_bf16(&self.context, preparation, x, [rows, cols], values) };
        values
    }

    /// Whether E4M3 has the values of both operands, but for what the module's documentation says.
    fn allows_e4m3(&self, weight: &TiledWeight, activation: Cast) -> bool {
        let layout = weight.layout();
        !self.strict
            && layout.shape[1] <= MOST_COLUMNS
            && is_within_e4m3(activation.format.element)
            && E4m3Weights::of(layout.format).is_some_and(|e4m3| weight.spread() <= e4m3.spread)
    }

    /// The product that `args` say, with `weight` expanded chunk by chunk.
    unsafe fn multiply_expanded(&self, weight: &TiledWeight, mut args: Args, plan: &Plan) {
        let layout = weight.layout();
        let (_, expand) = self
            .expand
            .iter()
            .find(|(format, _)| *format == layout.format)
            .expect("the plan is for formats within E4M3");
        let expanded =
            self.weights.borrow_mut().reserve(expanded_bytes(plan.chunk_row_tiles, layout.k_tiles()));
        let factor = 1.0 / args.factor;
        args.tiles = expanded;
        for first in (0..layout.row_tiles()).step_by(plan.chunk_row_tiles) {
            let row_tiles = plan.chunk_row_tiles.min(layout.row_tiles() - first);
            (args.first_row_tile, args.row_tiles) = (first as u32, row_tiles as u32);
            let tiles = weight.tiles() + (first * layout.row_tile_bytes()) as u64;
            let warps = (row_tiles * layout.k_tiles()) as u32;
            let blocks = warps.div_ceil(EXPAND_THREADS / 32).min(8 * self.context.properties().sm_count);
            let launch = Launch::new(blocks, EXPAND_THREADS);
            let arguments: [&dyn Argument; 5] = [&tiles, &args.row_tiles, &args.k_tiles, &factor, &expanded];
            // SAFETY: the scratch has room for the chunk; the rest is the caller's promise. The kernels wait for their
            // inputs, and for the chunk before to be multiplied.
            unsafe {
                self.context.launch(expand, &launch, &arguments);
                self.launch(&self.expanded, &args, plan);
            }
        }
    }

    /// What the kernel takes for all of `weight` and the input as it is multiplied, with the factors of its rows.
    fn args(
        &self,
        weight: &TiledWeight,
        product: &Product,
        [x, token_factors]: [DevicePtr; 2],
        plan: &Plan,
    ) -> Args {
        let layout = weight.layout();
        let (x_bytes, factor) = if plan.path.is_e4m3() {
            (1, 1.0 / E4m3Weights::factor_of(layout.format))
        } else {
            (Dtype::Bf16.size_bytes(), 1.0)
        };
        let n = layout.shape[0];
        let columns = if product.is_gated { n / 2 } else { n };
        assert!(product.column + columns <= product.out_width, "the results fit in a row of the output");
        let element = product.out_dtype.size_bytes();
        let out = product.out + (product.column * element) as u64;
        let half = match layout.order {
            RowOrder::Stacked => 0,
            RowOrder::Paired => n / 2,
        };
        Args {
            x: tensor_map(x, x_bytes, [product.rows, layout.shape[1]], plan.box_rows()),
            tiles: weight.tiles(),
            row_factors: weight.factors(),
            token_factors,
            bias: weight.bias(),
            out,
            out_stride: product.out_width as u64,
            factor,
            m: product.rows as u32,
            n: n as u32,
            row_tiles: layout.row_tiles() as u32,
            k_tiles: layout.k_tiles() as u32,
            first_row_tile: 0,
            paired_half: half as u32,
            group: plan.group,
            is_f32: u32::from(product.out_dtype == Dtype::F32),
            aligned: u32::from(
                out.is_multiple_of(16) && product.out_width.is_multiple_of(8) && half.is_multiple_of(8),
            ),
            is_gated: u32::from(product.is_gated),
            parts: plan.parts,
            preparation: product.result_preparation.into(),
            partial_sums: self.exchange.partial_sums.ptr(),
            arrivals: self.exchange.arrivals.ptr(),
        }
    }

    /// Launches a product's kernel.
    ///
    /// # Safety
    /// The addresses in `args` have what the kernel expects there.
    unsafe fn launch(&self, function: &Function, args: &Args, plan: &Plan) {
        let blocks = self.context.properties().sm_count / plan.kernel().cluster * plan.kernel().cluster;
        let threads = GROUP_THREADS * (1 + plan.kernel().groups);
        let launch = Launch::new(blocks, threads).cluster(plan.kernel().cluster).shared(SHARED_BYTES);
        // SAFETY: the caller's promise.
        unsafe { self.context.launch(function, &launch, &[args]) };
    }
}

/// Bytes of expanded weights of `row_tiles` x `k_tiles` tiles: whole blocks of 128 rows and 128 columns.
pub(super) fn expanded_bytes(row_tiles: usize, k_tiles: usize) -> usize {
    row_tiles.next_multiple_of(EXPANDED_ROWS / TILE_ROWS) * k_tiles.next_multiple_of(2) * EXPANDED_TILE_BYTES
}

/// How weights of a format become E4M3.
#[derive(Debug, Clone, Copy)]
struct E4m3Weights {
    /// log2 of what tile values are multiplied with, so that the largest are at the top of E4M3.
    shift: i32,
    /// Most binades that a block may be below its row's largest.
    spread: u8,
}

impl E4m3Weights {
    /// `None` for formats with values that E4M3 has not.
    ///
    /// Exact within `spread`, but for E4M3 itself: there, elements that become subnormal round, by at most 2^-10 of their
    /// block's largest.
    fn of(format: TileFormat) -> Option<Self> {
        match format {
            TileFormat::E2m1 => Some(Self { shift: 6, spread: 14 }),
            TileFormat::E2m3 => Some(Self { shift: 5, spread: 11 }),
            TileFormat::E3m2 => Some(Self { shift: 4, spread: 9 }),
            TileFormat::E4m3 => Some(Self { shift: 0, spread: 8 }),
            TileFormat::E5m2 | TileFormat::Int8 | TileFormat::Bf16 => None,
        }
    }

    /// What tile values of `format` are multiplied with.
    ///
    /// # Panics
    /// E4M3 has not its values.
    fn factor_of(format: TileFormat) -> f32 {
        (Self::of(format).expect("a format within E4M3").shift as f32).exp2()
    }
}

//! Activation formats on the device: launcher of `cuda/gemm/quantize.cu`.

use crate::cuda::{Argument, Context, DevicePtr, Function, Launch};
use crate::input_form::{InputForm, Preparation};
use crate::mx::{Block, Cast, ElementType, ScaleRounding, SharedExponent, Specials};

/// Threads of `prepare_to_bf16`, and values of a thread at a time.
const PREPARE_THREADS: u32 = 256;
const PIECE: usize = 8;

/// Values of a thread of `quantize_to_e4m3` at a time.
const CHUNK: usize = 16;

/// Chunks that a thread of it holds, and most threads of a token.
const HELD: usize = 4;
const MOST_THREADS: usize = 1024;

/// Longest rows of [`Quantizer::to_e4m3`].
pub(super) const MOST_COLUMNS: usize = CHUNK * HELD * MOST_THREADS;

/// An element type and its scale rule, as the kernels take them (`MxGrid` in `cuda/mx/quantize.cuh`).
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct MxGrid {
    emax: i32,
    scale_threshold: u32,
    max: f32,
    min_normal: u32,
    to_magic: u32,
    e4m3_shift: i32,
}

// SAFETY: plain numbers in the order of the kernel's structure.
unsafe impl Argument for MxGrid {}

impl MxGrid {
    /// The grid of `cast`; `None` where the kernels cannot follow the definition: blocks that are not of 32, scales that
    /// are searched for, and elements without mantissa bits, whose ties go by the exponent.
    pub(crate) fn new(cast: Cast) -> Option<Self> {
        let spec = cast.format.element.spec();
        if cast.format.block != Block::OCP
            || cast.scale_rounding == ScaleRounding::Mse
            || spec.mantissa_bits == 0
        {
            return None;
        }
        let emin = if spec.is_integer() { 0 } else { spec.emin() };
        let scale = SharedExponent::new(spec, cast.scale_rounding);
        // 448 = 1.75 * 2^8 is the top of E4M3.
        let fits = |shift: i32| spec.max * (shift as f32).exp2() <= 448.0;
        let e4m3_shift = (-16..=16).rev().find(|&shift| fits(shift)).unwrap_or_default();
        Some(Self {
            emax: spec.emax,
            scale_threshold: scale.threshold(),
            max: spec.max,
            min_normal: ((127 + emin) as u32) << 23,
            to_magic: ((23 - spec.mantissa_bits) << 23) + (1 << 22),
            e4m3_shift,
        })
    }

    /// Where there is no format.
    const NONE: Self =
        Self { emax: 0, scale_threshold: 0, max: 0.0, min_normal: 0, to_magic: 0, e4m3_shift: 0 };

    /// The grid of a declared activation format.
    fn of(cast: Cast) -> Self {
        Self::new(cast).expect("activation formats are checked when a weight is uploaded")
    }
}

/// Whether every value of `element` is an E4M3 number times a power of two.
pub(super) fn is_within_e4m3(element: ElementType) -> bool {
    let (spec, e4m3) = (element.spec(), ElementType::E4m3.spec());
    !spec.is_integer()
        && spec.exponent_bits <= e4m3.exponent_bits
        && spec.mantissa_bits <= e4m3.mantissa_bits
        && spec.specials != Specials::Ieee
}

/// What is done to blocks of activations, as the kernels take it (`Preparation` in `cuda/mx/prepare.cuh`).
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct PreparationArgument {
    grid: MxGrid,
    is_rotated: u32,
    is_quantized: u32,
}

// SAFETY: numbers in the order of the kernel's structure.
unsafe impl Argument for PreparationArgument {}

impl From<Option<Preparation>> for PreparationArgument {
    /// # Panics
    /// [`MxGrid`] has no such activations.
    fn from(preparation: Option<Preparation>) -> Self {
        let activation = preparation.and_then(|preparation| preparation.activation);
        Self {
            grid: activation.map_or(MxGrid::NONE, MxGrid::of),
            is_rotated: u32::from(preparation.is_some_and(|preparation| preparation.is_rotated)),
            is_quantized: u32::from(activation.is_some()),
        }
    }
}

/// The form in which a row operator leaves activations, as the kernels take it (`InputForm` in `cuda/mx/prepare.cuh`).
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct FormArgument {
    preparation: PreparationArgument,
    factors: DevicePtr,
    inexact: DevicePtr,
}

// SAFETY: numbers and addresses in the order of the kernel's structure.
unsafe impl Argument for FormArgument {}

impl FormArgument {
    /// For `elements` activations at `out`, which are so left; `inexact` counts rows that E4M3 had to round.
    ///
    /// # Panics
    /// As [`PreparationArgument`]'s.
    pub(crate) fn new(form: InputForm, out: DevicePtr, elements: usize, inexact: DevicePtr) -> Self {
        let (preparation, factors) = match form {
            InputForm::Plain => (None, 0),
            InputForm::Prepared(preparation) => (Some(preparation), 0),
            InputForm::E4m3(preparation) => (Some(preparation), e4m3_factors(out, elements)),
        };
        Self { preparation: preparation.into(), factors, inexact }
    }
}

/// Where the F32 factors of rows are, behind their `elements` E4M3 numbers at `values`: in the space of as many BF16 numbers,
/// as rows are of a block or more.
pub(super) fn e4m3_factors(values: DevicePtr, elements: usize) -> DevicePtr {
    values + elements.next_multiple_of(Block::OCP.size()) as u64
}

/// Bytes of `elements` E4M3 numbers and the factors of their `rows` rows.
pub(super) fn e4m3_bytes(elements: usize, rows: usize) -> usize {
    e4m3_factors(0, elements) as usize + rows * size_of::<f32>()
}

/// The kernels of `cuda/gemm/quantize.cu`.
#[derive(Debug)]
pub(crate) struct Quantizer {
    to_bf16: Function,
    /// The second rotates.
    to_e4m3: [Function; 2],
    sm_count: u32,
}

impl Quantizer {
    pub(crate) fn new(context: &Context) -> Self {
        Self {
            to_bf16: context.function("prepare_to_bf16"),
            to_e4m3: ["quantize_to_e4m3", "quantize_rotated_to_e4m3"].map(|name| context.function(name)),
            sm_count: context.properties().sm_count,
        }
    }

    /// Writes `x`, BF16 `[rows, cols]`, prepared, to `out` in BF16.
    ///
    /// # Safety
    /// Both addresses have that many elements, 16-byte aligned.
    ///
    /// # Panics
    /// The last block of a row is not whole, or [`MxGrid`] has no such activations.
    pub(crate) unsafe fn to_bf16(
        &self,
        context: &Context,
        preparation: Preparation,
        x: DevicePtr,
        [rows, cols]: [usize; 2],
        out: DevicePtr,
    ) {
        assert!(cols.is_multiple_of(Block::OCP.size()), "whole blocks in a row");
        let pieces = u32::try_from(rows * cols / PIECE).expect("activations of at most 2^35 elements");
        let launch = Launch::new(pieces.div_ceil(PREPARE_THREADS).min(8 * self.sm_count), PREPARE_THREADS);
        let preparation = PreparationArgument::from(Some(preparation));
        // SAFETY: the caller's promise; the kernel waits for its input.
        unsafe { context.launch(&self.to_bf16, &launch, &[&x, &preparation, &pieces, &out]) };
    }

    /// Writes the values of `x`, BF16 `[rows, cols]`, in the format `activation`, rotated before if `is_rotated`, to `out`
    /// in E4M3 in the order of weight tiles, with the factor of each row in `factors`, F32 `[rows]`; adds to the U32
    /// `inexact` the rows that E4M3 had to round.
    ///
    /// # Safety
    /// The addresses have that many elements, 16-byte aligned.
    ///
    /// # Panics
    /// As [`Self::to_bf16`]; rows are too long.
    #[allow(clippy::too_many_arguments, reason = "what the kernel takes")]
    pub(super) unsafe fn to_e4m3(
        &self,
        context: &Context,
        activation: Cast,
        is_rotated: bool,
        x: DevicePtr,
        [rows, cols]: [usize; 2],
        out: DevicePtr,
        factors: DevicePtr,
        inexact: DevicePtr,
    ) {
        assert!(cols.is_multiple_of(Block::OCP.size()) && cols <= MOST_COLUMNS, "columns of a row");
        let chunks = (cols / CHUNK) as u32;
        // One chunk per thread while that fills no more than half of a block's threads.
        let threads = chunks.clamp(32, MOST_THREADS as u32 / 2).max(chunks.div_ceil(HELD as u32));
        let launch = Launch::new(rows as u32, threads.next_multiple_of(32));
        let (function, grid) = (&self.to_e4m3[usize::from(is_rotated)], MxGrid::of(activation));
        // SAFETY: the caller's promise; the kernel waits for its inputs.
        unsafe { context.launch(function, &launch, &[&x, &grid, &chunks, &out, &factors, &inexact]) };
    }
}

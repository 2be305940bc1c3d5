//! Rows of a weight to tiles, on the device: launcher of `cuda/pack.cu`. `tile::pack` is its definition.

use super::context::{Context, Function};
use super::launch::{Argument, Launch};
use super::memory::DevicePtr;
use crate::backend::{DenseDtype, WeightSource};
use crate::mx::{ElementType, Specials};
use crate::tile::{MAX_DISTANCE, Move, RowOrder, TileFormat, TileLayout};

/// Threads of a block, as in the kernels.
const THREADS: u32 = 256;

/// Pairs of a step.
const PAIRS: usize = 4;

/// `Move` of `pack.cu`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct DeviceMove {
    rotate: u32,
    mask: u32,
}

impl From<&Move> for DeviceMove {
    fn from(&Move { rotate, mask }: &Move) -> Self {
        Self { rotate, mask: u32::from(mask) * 0x0001_0001 }
    }
}

/// `Format` of `pack.cu`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct DeviceFormat {
    source_bits: u32,
    code_shift: u32,
    stored_bits: u32,
    sign: u32,
    sign_shift: u32,
    magnitude: u32,
    home_shift: u32,
    first_special: u32,
    unit_exponent: u32,
    max_distance: u32,
    word_pairs: u32,
    moves: [[DeviceMove; 2]; PAIRS],
    upper: [DeviceMove; PAIRS],
}

// SAFETY: plain numbers in the order of the kernel's structure.
unsafe impl Argument for DeviceFormat {}

impl DeviceFormat {
    /// How codes of `element` become those of a tile.
    fn new(format: TileFormat, element: ElementType) -> Self {
        let stored = format.element().expect("codes are of an MX format").spec();
        let sign = if stored.is_integer() { 0 } else { 1 << (stored.bits - 1) };
        let table = format.moves();
        let mut moves = [[DeviceMove::default(); 2]; PAIRS];
        for (to, from) in moves.iter_mut().zip(table.word) {
            to.iter_mut().zip(*from).for_each(|(to, from)| *to = from.into());
        }
        let mut upper = [DeviceMove::default(); PAIRS];
        upper.iter_mut().zip(table.upper).for_each(|(to, from)| *to = from.into());
        Self {
            source_bits: element.spec().bits,
            code_shift: stored.bits - element.spec().bits,
            stored_bits: stored.bits,
            sign,
            sign_shift: 16 - stored.bits,
            magnitude: u32::from(stored.code_mask()) & !sign,
            home_shift: format.home_shift(),
            first_special: match stored.specials {
                Specials::None => 256,
                Specials::NanOnly => 0x7F,
                Specials::Ieee => 0x7C,
            },
            unit_exponent: u32::from(format.unit_exponent()),
            max_distance: u32::from(MAX_DISTANCE),
            word_pairs: table.word.len() as u32,
            moves,
            upper,
        }
    }
}

/// `Rows` of `pack.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct DeviceRows {
    cols: u32,
    k_tiles: u32,
    first_tile: u32,
    rows: u32,
    is_paired: u32,
}

// SAFETY: as above.
unsafe impl Argument for DeviceRows {}

/// Where a piece of a weight comes from and goes to, on the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct PackedPiece {
    /// Rows in the order of the tiles, 16 to a tile: codes, or values.
    pub(super) rows: DevicePtr,
    /// Their scales; nothing for values.
    pub(super) scales: DevicePtr,
    /// The first of the piece's tiles along N, and how many they are.
    pub(super) first: usize,
    pub(super) count: usize,
    /// The piece's tiles.
    pub(super) tiles: DevicePtr,
    /// F32, one per row.
    pub(super) factors: DevicePtr,
    /// U32, which becomes the largest spread of a row if that is larger.
    pub(super) spread: DevicePtr,
}

/// The kernels of `pack.cu`.
#[derive(Debug)]
pub(super) struct Packer {
    mx: Function,
    bf16: Function,
    f16: Function,
    f32: Function,
}

impl Packer {
    pub(super) fn new(context: &Context) -> Self {
        Self {
            mx: context.function("pack_mx"),
            bf16: context.function("pack_bf16"),
            f16: context.function("pack_f16"),
            f32: context.function("pack_f32"),
        }
    }

    /// Packs a piece of a weight that is stored as `source` is.
    ///
    /// # Safety
    /// The addresses have what `piece` says of them, aligned to 16 bytes.
    pub(super) unsafe fn pack(
        &self,
        context: &Context,
        layout: &TileLayout,
        source: &WeightSource<'_>,
        piece: PackedPiece,
    ) {
        let int = |value: usize| u32::try_from(value).expect("dimensions fit 32 bits");
        let rows = DeviceRows {
            cols: int(layout.shape[1]),
            k_tiles: int(layout.k_tiles()),
            first_tile: int(piece.first),
            rows: int(match layout.order {
                RowOrder::Stacked => layout.shape[0],
                RowOrder::Paired => layout.shape[0] / 2,
            }),
            is_paired: u32::from(layout.order == RowOrder::Paired),
        };
        // The kernels do not wait for those before them by themselves.
        let launch = Launch::new(int(piece.count), THREADS).after_everything();
        let PackedPiece { rows: values, scales, tiles, factors, spread, .. } = piece;
        match source {
            WeightSource::Mx { tensor, .. } => {
                let format = DeviceFormat::new(layout.format, tensor.format().element);
                let arguments: [&dyn Argument; 7] =
                    [&values, &scales, &format, &rows, &tiles, &factors, &spread];
                // SAFETY: the caller's promise.
                unsafe { context.launch(&self.mx, &launch, &arguments) };
            }
            WeightSource::Dense { dtype, .. } => {
                let function = match dtype {
                    DenseDtype::Bf16 => &self.bf16,
                    DenseDtype::F16 => &self.f16,
                    DenseDtype::F32 => &self.f32,
                };
                // SAFETY: as above.
                unsafe { context.launch(function, &launch, &[&values, &rows, &tiles, &factors]) };
            }
        }
    }
}

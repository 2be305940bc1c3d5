//! What a tile holds, as data.

use super::{LANES, SCALE_BYTES, TILE_COLS, TILE_ROWS};
use crate::backend::WeightSource;
use crate::mx::{Block, ElementSpec, ElementType, MxFormat};

/// Blocks more than this many binades below the largest of their row are taken as zero. Nearer ones are exact: the
/// smallest element of any format, E5M2's 2^-16, is then a normal BF16 number.
pub const MAX_DISTANCE: u8 = 110;

/// How the elements of a tile are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TileFormat {
    /// FP4 E2M1.
    E2m1,
    /// FP6 E2M3.
    E2m3,
    /// FP6 E3M2, and the experimental E3M0, whose values are among its own.
    E3m2,
    /// FP8 E4M3.
    E4m3,
    /// FP8 E5M2.
    E5m2,
    /// INT8, and the experimental INT4, whose values are among its own.
    Int8,
    /// Dense BF16. F16 and F32 checkpoint tensors are rounded to it.
    Bf16,
}

/// There is no tile format for a weight.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0} has blocks of {size}, not 32", size = .0.block.size())]
pub struct UnsupportedWeight(pub MxFormat);

/// A step of moving bits: a word rotated right, and the bits to take from each half of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Move {
    /// Bits to rotate right by.
    pub rotate: u32,
    /// Bits of a half that are taken.
    pub mask: u16,
}

/// How the pairs of a step become BF16 pairs: the union of some moves of a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moves {
    /// For each pair that a word holds, the moves of that word.
    pub word: &'static [&'static [Move]],
    /// FP6: for each pair of an even step, the move of the word with the two remaining bits. Those of an odd step
    /// are rotated right by 8 more.
    pub upper: &'static [Move],
}

// A literal, so that references to it are to a constant.
macro_rules! take {
    ($rotate:literal, $mask:literal) => {
        Move { rotate: $rotate, mask: $mask }
    };
}

impl TileFormat {
    /// Every format.
    pub const ALL: [Self; 7] =
        [Self::E2m1, Self::E2m3, Self::E3m2, Self::E4m3, Self::E5m2, Self::Int8, Self::Bf16];

    /// The format that `source` is stored in.
    ///
    /// # Errors
    /// Its blocks are not of 32.
    pub fn of(source: &WeightSource<'_>) -> Result<Self, UnsupportedWeight> {
        let WeightSource::Mx { tensor, .. } = source else { return Ok(Self::Bf16) };
        if tensor.format().block != Block::OCP {
            return Err(UnsupportedWeight(tensor.format()));
        }
        Ok(match tensor.format().element {
            ElementType::E2m1 => Self::E2m1,
            ElementType::E2m3 => Self::E2m3,
            ElementType::E3m2 | ElementType::E3m0 => Self::E3m2,
            ElementType::E4m3 => Self::E4m3,
            ElementType::E5m2 => Self::E5m2,
            ElementType::Int8 | ElementType::Int4 => Self::Int8,
        })
    }

    /// The element type of the stored codes; `None` for BF16.
    pub const fn element(self) -> Option<ElementType> {
        match self {
            Self::E2m1 => Some(ElementType::E2m1),
            Self::E2m3 => Some(ElementType::E2m3),
            Self::E3m2 => Some(ElementType::E3m2),
            Self::E4m3 => Some(ElementType::E4m3),
            Self::E5m2 => Some(ElementType::E5m2),
            Self::Int8 => Some(ElementType::Int8),
            Self::Bf16 => None,
        }
    }

    /// The name of the format in kernel names: `e2m1`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::E2m1 => "e2m1",
            Self::E2m3 => "e2m3",
            Self::E3m2 => "e3m2",
            Self::E4m3 => "e4m3",
            Self::E5m2 => "e5m2",
            Self::Int8 => "int8",
            Self::Bf16 => "bf16",
        }
    }

    /// Bytes of a tile's elements.
    pub const fn code_bytes(self) -> usize {
        let bits = match self.element() {
            Some(element) => element.spec().bits as usize,
            None => 16,
        };
        TILE_ROWS * TILE_COLS * bits / 8
    }

    /// Bytes of a tile, scales included.
    pub const fn tile_bytes(self) -> usize {
        self.code_bytes() + if matches!(self, Self::Bf16) { 0 } else { SCALE_BYTES }
    }

    /// The scale byte of a block at distance 0: the exponent field of the BF16 number that the moved bits of a code
    /// are multiplied with to become the element's value.
    pub const fn unit_exponent(self) -> u8 {
        match self.element() {
            None => 0,
            Some(element) => {
                let ElementSpec { bias, mantissa_bits, .. } = *element.spec();
                if element.spec().is_integer() {
                    (127 - mantissa_bits as i32) as u8
                } else {
                    (127 + 127 - bias) as u8
                }
            }
        }
    }

    /// How far the bits below a code's sign are shifted up to their place in a BF16 number; INT8's stay in place.
    pub(crate) const fn home_shift(self) -> u32 {
        match self.element() {
            Some(element) if !element.spec().is_integer() => 7 - element.spec().mantissa_bits,
            _ => 0,
        }
    }

    /// How words become pairs: the table that packing, the reference decode and the kernels follow.
    pub const fn moves(self) -> Moves {
        match self {
            Self::E2m1 => Moves {
                word: &[
                    &[take!(0, 0x81C0)],
                    &[take!(6, 0x81C0)],
                    &[take!(28, 0x81C0)],
                    &[take!(26, 0x80C0), take!(2, 0x0100)],
                ],
                upper: &[],
            },
            Self::E2m3 => Moves {
                word: &[&[take!(0, 0x00F0)], &[take!(28, 0x00F0)], &[take!(4, 0x00F0)], &[take!(8, 0x00F0)]],
                upper: &[take!(0, 0x8100), take!(2, 0x8100), take!(4, 0x8100), take!(6, 0x8100)],
            },
            Self::E3m2 => Moves {
                word: &[&[take!(0, 0x01E0)], &[take!(28, 0x01E0)], &[take!(4, 0x01E0)], &[take!(8, 0x01E0)]],
                upper: &[take!(0, 0x8200), take!(3, 0x8200), take!(4, 0x8200), take!(7, 0x8200)],
            },
            Self::E4m3 => {
                Moves { word: &[&[take!(0, 0x87F0)], &[take!(28, 0x80F0), take!(4, 0x0700)]], upper: &[] }
            }
            Self::E5m2 => {
                Moves { word: &[&[take!(0, 0x8FE0)], &[take!(24, 0x0F60), take!(29, 0x8080)]], upper: &[] }
            }
            Self::Int8 => Moves { word: &[&[take!(0, 0x00FF)], &[take!(8, 0x00FF)]], upper: &[] },
            Self::Bf16 => Moves { word: &[&[take!(0, 0xFFFF)]], upper: &[] },
        }
    }
}

/// Where the rows of a weight are in its tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowOrder {
    /// In order.
    Stacked,
    /// The first half of the rows and the second interleaved in eights: rows `g` and `g + 8` of tile `i` are rows
    /// `8i + g` of either half, so that one thread of a product has both (gate and up projections). Each half is padded to
    /// whole eights.
    Paired,
}

/// Sizes of a packed weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TileLayout {
    /// How elements are stored.
    pub format: TileFormat,
    /// `[N, K]`.
    pub shape: [usize; 2],
    /// Where rows are.
    pub order: RowOrder,
}

impl TileLayout {
    /// Tiles along N.
    pub const fn row_tiles(&self) -> usize {
        match self.order {
            RowOrder::Stacked => self.shape[0].div_ceil(TILE_ROWS),
            RowOrder::Paired => (self.shape[0] / 2).div_ceil(TILE_ROWS / 2),
        }
    }

    /// Tiles along K.
    pub const fn k_tiles(&self) -> usize {
        self.shape[1].div_ceil(TILE_COLS)
    }

    /// Bytes of the tiles of 16 rows.
    pub const fn row_tile_bytes(&self) -> usize {
        self.k_tiles() * self.format.tile_bytes()
    }

    /// Bytes of all tiles.
    pub const fn bytes(&self) -> usize {
        self.row_tiles() * self.row_tile_bytes()
    }

    /// Rows, padding included: the number of row factors.
    pub const fn padded_rows(&self) -> usize {
        self.row_tiles() * TILE_ROWS
    }

    /// The row of the weight in row `row` of tile `row_tile`; `None` for padding.
    pub fn source_row(&self, row_tile: usize, row: usize) -> Option<usize> {
        let rows = self.shape[0];
        match self.order {
            RowOrder::Stacked => Some(row_tile * TILE_ROWS + row).filter(|&row| row < rows),
            RowOrder::Paired => {
                let (half, eight) = (rows / 2, TILE_ROWS / 2);
                let within = row_tile * eight + row % eight;
                (within < half).then_some(within + row / eight * half)
            }
        }
    }

    /// Where row `row` of the weight is: the tile along N, and the row in it.
    pub fn place_of(&self, row: usize) -> (usize, usize) {
        match self.order {
            RowOrder::Stacked => (row / TILE_ROWS, row % TILE_ROWS),
            RowOrder::Paired => {
                let (half, eight) = (self.shape[0] / 2, TILE_ROWS / 2);
                (row % half / eight, row % half % eight + row / half * eight)
            }
        }
    }
}

/// The bytes of lane `lane` and step `step` in a tile: word `w` of them.
pub(super) const fn word_offset(format: TileFormat, lane: usize, step: usize, word: usize) -> usize {
    match format {
        TileFormat::E2m1 | TileFormat::E2m3 | TileFormat::E3m2 => lane * 16 + step * 4,
        TileFormat::E4m3 | TileFormat::E5m2 | TileFormat::Int8 => {
            step / 2 * 512 + lane * 16 + step % 2 * 8 + word * 4
        }
        TileFormat::Bf16 => step * 512 + lane * 16 + word * 4,
    }
}

/// FP6: where the word with the upper bits of lane `lane` and step `step` is in a tile.
pub(super) const fn upper_offset(lane: usize, step: usize) -> usize {
    LANES * 16 + lane * 8 + step / 2 * 4
}

/// Where the scale of `row` and block `block` (0 or 1) is in a tile.
pub(super) const fn scale_offset(format: TileFormat, row: usize, block: usize) -> usize {
    format.code_bytes() + row % 8 * 4 + row / 8 * 2 + block
}

//! The layout of weights for tensor cores: one packed tile format for every element type, for decode and prefill.
//!
//! # Tiles
//!
//! A weight `[N, K]` is cut into tiles of 16 rows x 64 columns; N is padded to 16 and K to 64 with exact zeros. The
//! tiles of 16 rows follow each other along K, then come the next 16 rows. A tile holds what one warp feeds as the A
//! operand to four `mma.sync.m16n8k16` (and to `wgmma` with A in registers, where each warp of the group has 16
//! rows): lane `l = 4g + t` holds, of each step `s` of 16 columns, four pairs of neighbours along K,
//!
//! ```text
//! pair 0: row g, columns 16s + 2t, + 1       pair 2: row g, columns 16s + 2t + 8, + 9
//! pair 1: row g + 8, the same columns        pair 3: row g + 8, the same columns
//! ```
//!
//! | format | bytes | layout |
//! |---|---|---|
//! | FP4 | 512 + 32 | 32 lanes x 16 bytes: word `s` holds the 8 codes of step `s` |
//! | FP6 | 768 + 32 | 32 lanes x 16 bytes: word `s` holds four bits of each code; then 32 lanes x 8 bytes: word `h` holds the other two bits of the codes of steps `2h` and `2h + 1` |
//! | FP8, INT8 | 1024 + 32 | twice 32 lanes x 16 bytes, for steps 0, 1 and 2, 3: two words per step, of pairs 0, 1 and 2, 3 |
//! | BF16 | 2048 | four times 32 lanes x 16 bytes, for one step each: a word per pair |
//!
//! The last 32 bytes are scales: byte `4g + 2h + b` belongs to row `g + 8h` and columns `32b .. 32b + 32` of the tile.
//!
//! # Bits
//!
//! A code becomes a BF16 number by moving its bits: sign to bit 15, exponent and mantissa to where they straddle the
//! border of BF16's exponent and mantissa (bit 7). The result is the element times a power of two, subnormals included,
//! since the exponent field of a BF16 below is zero-extended; one multiplication by a power of two sets that right and
//! applies the block's scale. The bits of a word's codes are interleaved such that a pair is the word rotated and masked
//! ([`Moves`]), one code in each half. INT8 becomes BF16 by adding: `(128 + low 7 bits) - (128 or 256)`.
//!
//! # Scales
//!
//! For each row, R is the largest scale exponent among its blocks that are not all zeros, and d = R - e the distance of
//! a block. The row's F32 factor 2^(R - 127) is applied to the finished sum; weights carry 2^-d only, so they neither
//! overflow nor become subnormal in BF16. The scale byte holds the exponent field of the BF16 multiplier,
//! [`TileFormat::unit_exponent`] - d, and 0 (the multiplier 0) for blocks of zeros and for those with d greater than
//! [`MAX_DISTANCE`], which vanish beside their row's largest.
//!
//! A row with a NaN scale, or with an element that is NaN or infinite, has the factor NaN: all its products are NaN.

mod decode;
mod format;
mod pack;
#[cfg(test)]
mod tests;

pub use decode::decode_row;
pub use format::{MAX_DISTANCE, Move, Moves, RowOrder, TileFormat, TileLayout, UnsupportedWeight};
#[cfg(feature = "cuda")]
pub(crate) use pack::find_row;
pub use pack::pack;

/// Rows of a tile.
pub const TILE_ROWS: usize = 16;
/// Columns of a tile.
pub const TILE_COLS: usize = 64;
/// Bytes of a tile's scales.
pub const SCALE_BYTES: usize = 32;
/// Columns of one `mma` step.
const STEP: usize = 16;
/// Columns that share a scale.
const BLOCK: usize = 32;
/// Threads of a warp.
const LANES: usize = 32;

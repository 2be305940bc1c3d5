//! The reference decode: the bit moves of the kernels, in Rust.

use half::bf16;

use super::format::{scale_offset, upper_offset, word_offset};
use super::{BLOCK, STEP, TILE_COLS, TILE_ROWS, TileFormat, TileLayout};

/// Decodes row `row` of the weight into `out` (K values): what a kernel computes with, times the row's factor.
///
/// `tiles` and `factors` are the whole packed weight's.
///
/// # Panics
/// A slice has the wrong length.
pub fn decode_row(layout: &TileLayout, tiles: &[u8], factors: &[f32], row: usize, out: &mut [f32]) {
    assert_eq!(tiles.len(), layout.bytes(), "bytes of tiles");
    assert_eq!(factors.len(), layout.padded_rows(), "one factor per row");
    assert_eq!(out.len(), layout.shape[1], "out holds one row");
    let (row_tile, row) = layout.place_of(row);
    let factor = factors[row_tile * TILE_ROWS + row];
    let tiles = &tiles[row_tile * layout.row_tile_bytes()..][..layout.row_tile_bytes()];
    for (tile, out) in tiles.chunks_exact(layout.format.tile_bytes()).zip(out.chunks_mut(TILE_COLS)) {
        for (k, out) in out.iter_mut().enumerate() {
            *out = element(layout.format, tile, row, k).to_f32() * factor;
        }
    }
}

/// The BF16 number at `row`, `k` of a tile, its scale relative to the row's applied.
pub(super) fn element(format: TileFormat, tile: &[u8], row: usize, k: usize) -> bf16 {
    let (step, in_step) = (k / STEP, k % STEP);
    let (lane, pair) = (row % 8 * 4 + in_step % 8 / 2, row / 8 + in_step / 8 * 2);
    let bits = pair_bits(format, tile, lane, step, pair);
    let moved = bf16::from_bits(if k.is_multiple_of(2) { bits as u16 } else { (bits >> 16) as u16 });
    let number = match format {
        TileFormat::Bf16 => return moved,
        TileFormat::Int8 => {
            let low = bf16::from_bits(0x4300 | (moved.to_bits() & 0x7F)).to_f32();
            let high = bf16::from_bits(0xC300 | (moved.to_bits() & 0x80)).to_f32();
            low + high
        }
        _ => moved.to_f32(),
    };
    let exponent = tile[scale_offset(format, row, k / BLOCK)];
    let multiplier = bf16::from_bits(u16::from(exponent) << 7);
    bf16::from_f32(number * multiplier.to_f32())
}

/// The two moved codes of `pair`, one per half.
fn pair_bits(format: TileFormat, tile: &[u8], lane: usize, step: usize, pair: usize) -> u32 {
    let load = |offset: usize| {
        u32::from_le_bytes([tile[offset], tile[offset + 1], tile[offset + 2], tile[offset + 3]])
    };
    let moves = format.moves();
    let pairs_per_word = moves.word.len();
    let word = load(word_offset(format, lane, step, pair / pairs_per_word));
    let both = |mask: u16| u32::from(mask) * 0x0001_0001;
    let taken = moves.word[pair % pairs_per_word].iter().map(|m| word.rotate_right(m.rotate) & both(m.mask));
    let bits = taken.fold(0, |bits, taken| bits | taken);
    match moves.upper.get(pair) {
        Some(m) => {
            let upper = load(upper_offset(lane, step));
            bits | (upper.rotate_right(m.rotate + step as u32 % 2 * 8) & both(m.mask))
        }
        None => bits,
    }
}

//! From the on-disk layout to tiles: the definition. A GPU packs for itself (`cuda/pack.cu`), byte for byte the same.

use half::{bf16, f16};

use super::format::{scale_offset, upper_offset, word_offset};
use super::{BLOCK, LANES, MAX_DISTANCE, STEP, TILE_COLS, TILE_ROWS, TileFormat, TileLayout};
use crate::backend::{DenseDtype, WeightSource};
use crate::mx::{E8m0, ElementType, MxTensor, Specials, unpack};

/// Packs row tiles `first ..` of the stacked `parts`, as many as `tiles` has room for. Calls for different row tiles
/// are independent: a large weight is packed by many threads, or piece by piece.
///
/// For each row, padding included: `factors` is what its finished sum is multiplied with, 2^(R - 127) or NaN (0 for
/// padding; 1 for all rows of BF16), and `spreads` the largest distance in binades of a block that is not all zeros from
/// the row's largest scale. An upper bound for rows together is their maximum.
///
/// # Panics
/// The parts are not what `layout` says, or `tiles`, `factors` and `spreads` do not have the lengths of the same number
/// of row tiles within the layout.
pub fn pack(
    layout: &TileLayout,
    parts: &[WeightSource<'_>],
    first: usize,
    tiles: &mut [u8],
    factors: &mut [f32],
    spreads: &mut [u8],
) {
    let count = tiles.len() / layout.row_tile_bytes();
    assert_eq!(tiles.len(), count * layout.row_tile_bytes(), "whole row tiles");
    assert!(first + count <= layout.row_tiles(), "row tiles of the weight");
    assert_eq!(factors.len(), count * TILE_ROWS, "one factor per row");
    assert_eq!(spreads.len(), count * TILE_ROWS, "one spread per row");
    assert_eq!(parts.iter().map(|part| part.shape()[0]).sum::<usize>(), layout.shape[0], "rows of the parts");
    assert!(parts.iter().all(|part| part.shape()[1] == layout.shape[1]), "columns of the parts");
    let pieces = tiles
        .chunks_exact_mut(layout.row_tile_bytes())
        .zip(factors.chunks_exact_mut(TILE_ROWS))
        .zip(spreads.chunks_exact_mut(TILE_ROWS));
    if layout.format == TileFormat::Bf16 {
        for (row_tile, ((tiles, factors), spreads)) in (first..).zip(pieces) {
            factors.fill(1.0);
            spreads.fill(0);
            pack_dense(layout, parts, row_tile, tiles);
        }
        return;
    }
    let places = Places::new(layout.format);
    let mut codes = vec![0; TILE_ROWS * layout.k_tiles() * TILE_COLS];
    for (row_tile, ((tiles, factors), spreads)) in (first..).zip(pieces) {
        let stride = layout.k_tiles() * TILE_COLS;
        for (row, codes) in codes.chunks_exact_mut(stride).enumerate() {
            let source = layout.source_row(row_tile, row).and_then(|row| find_row(parts, row));
            (factors[row], spreads[row]) = match source {
                Some((WeightSource::Mx { tensor, .. }, row_of_part)) => {
                    read_codes(tensor, row_of_part, &mut codes[..layout.shape[1]]);
                    pack_scales(layout.format, codes, tensor.row_scales(row_of_part), row, tiles)
                }
                _ => {
                    codes.fill(0);
                    pack_scales(layout.format, codes, &[], row, tiles)
                }
            };
        }
        places.pack_codes(&codes, tiles);
    }
}

/// The part that row `row` of the stack is in, and which of its rows it is.
pub(crate) fn find_row<'p, 's>(
    parts: &'p [WeightSource<'s>],
    mut row: usize,
) -> Option<(&'p WeightSource<'s>, usize)> {
    for part in parts {
        let rows = part.shape()[0];
        if row < rows {
            return Some((part, row));
        }
        row -= rows;
    }
    None
}

/// One row's codes, one per byte, in the element type that is stored.
fn read_codes(tensor: &MxTensor<'_>, row: usize, codes: &mut [u8]) {
    let element = tensor.format().element;
    unpack(tensor.row_codes(row), element.spec().bits, codes);
    match element {
        // Two more mantissa bits, the same exponents.
        ElementType::E3m0 => codes.iter_mut().for_each(|code| *code <<= 2),
        // Four more fraction bits below, from the top of the byte as its sign is there.
        ElementType::Int4 => codes.iter_mut().for_each(|code| *code <<= 4),
        _ => {}
    }
}

/// Writes the scales of `row` to all tiles; returns the row's factor and spread. `scales` has none for padding.
fn pack_scales(format: TileFormat, codes: &[u8], scales: &[u8], row: usize, tiles: &mut [u8]) -> (f32, u8) {
    let spec = format.element().expect("codes are of an MX format").spec();
    let magnitude = if spec.is_integer() { spec.code_mask() } else { spec.code_mask() >> 1 };
    let first_special = match spec.specials {
        Specials::None => u8::MAX,
        Specials::NanOnly => 0x7F,
        Specials::Ieee => 0x7C,
    };
    let largest = |codes: &[u8]| codes.iter().fold(0, |largest, code| largest.max(code & magnitude));
    let mut nan = false;
    let (mut low, mut high) = (u8::MAX, 0);
    for (codes, &scale) in codes.chunks_exact(BLOCK).zip(scales) {
        let largest = largest(codes);
        nan |= scale == E8m0::NAN.0 || (largest >= first_special && spec.specials != Specials::None);
        if largest != 0 {
            (low, high) = (low.min(scale), high.max(scale));
        }
    }
    for (block, codes) in codes.chunks_exact(BLOCK).enumerate() {
        let scale = scales.get(block).filter(|_| largest(codes) != 0);
        let distance = scale.map(|scale| high - scale).filter(|&distance| distance <= MAX_DISTANCE);
        let tile = &mut tiles[block / 2 * format.tile_bytes()..][..format.tile_bytes()];
        tile[scale_offset(format, row, block % 2)] = distance.map_or(0, |d| format.unit_exponent() - d);
    }
    let factor = match (nan, scales.is_empty()) {
        (true, _) => f32::NAN,
        (false, true) => 0.0,
        (false, false) => E8m0(high).to_f32(),
    };
    (factor, high.saturating_sub(low))
}

/// Where the bits of codes go.
struct Places {
    format: TileFormat,
    /// Entry `[2 pair + half][code]`: the bits of the code in the step's first word, and in its second one (FP6: in the
    /// word of the upper bits, of an even step) shifted by 32.
    bits: [[u64; 256]; 8],
}

impl Places {
    fn new(format: TileFormat) -> Self {
        let spec = format.element().expect("codes are of an MX format").spec();
        let moves = format.moves();
        let mut bits = [[0; 256]; 8];
        for (at, bits) in bits.iter_mut().enumerate() {
            let (pair, half) = (at / 2, at % 2);
            let (word, in_word) = (pair / moves.word.len(), pair % moves.word.len());
            for (code, bits) in bits.iter_mut().enumerate().take(1 << spec.bits) {
                // The code as the half of a BF16 pair, and back to where the moves bring it from.
                let magnitude_bits = spec.bits - u32::from(!spec.is_integer());
                let sign = if spec.is_integer() { 0 } else { code >> magnitude_bits << 15 };
                let moved = sign | (code & ((1 << magnitude_bits) - 1)) << format.home_shift();
                let moved = (moved as u32) << (16 * half);
                let origin = |rotate: u32, mask: u16| {
                    u64::from((moved & (u32::from(mask) * 0x0001_0001)).rotate_left(rotate))
                };
                for m in moves.word[in_word] {
                    *bits |= origin(m.rotate, m.mask) << (32 * word);
                }
                if let Some(m) = moves.upper.get(pair) {
                    *bits |= origin(m.rotate, m.mask) << 32;
                }
            }
        }
        Self { format, bits }
    }

    /// Writes the codes of 16 rows (one per byte, row-major) to their tiles.
    fn pack_codes(&self, codes: &[u8], tiles: &mut [u8]) {
        let stride = codes.len() / TILE_ROWS;
        for g in 0..TILE_ROWS / 2 {
            let upper_row = &codes[g * stride..][..stride];
            let lower_row = &codes[(g + 8) * stride..][..stride];
            let columns = upper_row.chunks_exact(TILE_COLS).zip(lower_row.chunks_exact(TILE_COLS));
            for (tile, (upper, lower)) in tiles.chunks_exact_mut(self.format.tile_bytes()).zip(columns) {
                self.pack_lanes(g, upper, lower, tile);
            }
        }
    }

    /// Writes rows `g` and `g + 8` of a tile: four lanes.
    #[inline(always)]
    fn pack_lanes(&self, g: usize, upper: &[u8], lower: &[u8], tile: &mut [u8]) {
        for t in 0..LANES / 8 {
            let lane = 4 * g + t;
            let mut words = [0_u64; TILE_COLS / STEP];
            for (step, word) in words.iter_mut().enumerate() {
                let k = step * STEP + 2 * t;
                let pairs =
                    [&upper[k..k + 2], &lower[k..k + 2], &upper[k + 8..k + 10], &lower[k + 8..k + 10]];
                for (places, pair) in self.bits.as_chunks::<2>().0.iter().zip(pairs) {
                    *word |= places[0][usize::from(pair[0])] | places[1][usize::from(pair[1])];
                }
            }
            match self.format {
                TileFormat::E2m1 => put_low_words(self.format, lane, &words, tile),
                TileFormat::E2m3 | TileFormat::E3m2 => {
                    put_low_words(self.format, lane, &words, tile);
                    for step in [0, 2] {
                        let [even, odd] = [words[step], words[step + 1]].map(|word| (word >> 32) as u32);
                        put(tile, upper_offset(lane, step), even | odd.rotate_left(8));
                    }
                }
                _ => {
                    for (step, word) in words.iter().enumerate() {
                        put(tile, word_offset(self.format, lane, step, 0), *word as u32);
                        put(tile, word_offset(self.format, lane, step, 1), (*word >> 32) as u32);
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn put_low_words(format: TileFormat, lane: usize, words: &[u64], tile: &mut [u8]) {
    for (step, word) in words.iter().enumerate() {
        put(tile, word_offset(format, lane, step, 0), *word as u32);
    }
}

#[inline(always)]
fn put(tile: &mut [u8], offset: usize, word: u32) {
    tile[offset..offset + 4].copy_from_slice(&word.to_le_bytes());
}

/// Packs the 16 rows of `row_tile` as BF16.
fn pack_dense(layout: &TileLayout, parts: &[WeightSource<'_>], row_tile: usize, tiles: &mut [u8]) {
    tiles.fill(0);
    for row in 0..TILE_ROWS {
        let source = layout.source_row(row_tile, row).and_then(|row| find_row(parts, row));
        let Some((&WeightSource::Dense { dtype, shape, bytes }, row_of_part)) = source else { continue };
        let row_bytes = shape[1] * dtype.size_bytes();
        let values = &bytes[row_of_part * row_bytes..][..row_bytes];
        for (k, value) in values.chunks_exact(dtype.size_bytes()).enumerate() {
            let bits = match (dtype, value) {
                (DenseDtype::Bf16, &[a, b]) => [a, b],
                (DenseDtype::F16, &[a, b]) => {
                    bf16::from_f32(f16::from_le_bytes([a, b]).to_f32()).to_le_bytes()
                }
                (DenseDtype::F32, &[a, b, c, d]) => {
                    bf16::from_f32(f32::from_le_bytes([a, b, c, d])).to_le_bytes()
                }
                _ => unreachable!("chunks have the size of the type"),
            };
            let tile = &mut tiles[k / TILE_COLS * layout.format.tile_bytes()..];
            let in_step = k % STEP;
            let (lane, pair) = (row % 8 * 4 + in_step % 8 / 2, row / 8 + in_step / 8 * 2);
            let at = word_offset(layout.format, lane, k % TILE_COLS / STEP, pair) + k % 2 * 2;
            tile[at..at + 2].copy_from_slice(&bits);
        }
    }
}

//! Packing and the reference decode against the formats' definitions.

use super::decode::element;
use super::format::scale_offset;
use super::{
    MAX_DISTANCE, RowOrder, SCALE_BYTES, TILE_COLS, TILE_ROWS, TileFormat, TileLayout, decode_row, pack,
};
use crate::backend::{DenseDtype, WeightSource};
use crate::mx::{ElementType, MxFormat, MxTensor, ScaleRounding, Specials, pack as pack_bits};

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, n: u64) -> u64 {
        ((self.next() >> 32) * n) >> 32
    }
}

struct Packed {
    layout: TileLayout,
    tiles: Vec<u8>,
    factors: Vec<f32>,
    spreads: Vec<u8>,
}

/// Packs with every output byte poisoned before, in two calls where there is more than one row tile.
fn pack_all(parts: &[WeightSource<'_>], order: RowOrder) -> Packed {
    let shape = [parts.iter().map(|p| p.shape()[0]).sum(), parts[0].shape()[1]];
    let format = TileFormat::of(&parts[0]).expect("blocks of 32");
    let layout = TileLayout { format, shape, order };
    let mut tiles = vec![0xA5; layout.bytes()];
    let mut factors = vec![-1.0; layout.padded_rows()];
    let mut spreads = vec![77; layout.padded_rows()];
    let first = layout.row_tiles() / 2;
    let (tiles_a, tiles_b) = tiles.split_at_mut(first * layout.row_tile_bytes());
    let (factors_a, factors_b) = factors.split_at_mut(first * TILE_ROWS);
    let (spreads_a, spreads_b) = spreads.split_at_mut(first * TILE_ROWS);
    pack(&layout, parts, 0, tiles_a, factors_a, spreads_a);
    pack(&layout, parts, first, tiles_b, factors_b, spreads_b);
    Packed { layout, tiles, factors, spreads }
}

fn mx(tensor: MxTensor<'_>) -> WeightSource<'_> {
    WeightSource::Mx { tensor, scale_rounding: ScaleRounding::Floor, activation: None, rotation: None }
}

fn packed_codes(element: ElementType, codes: &[u8]) -> Vec<u8> {
    let bits = element.spec().bits;
    let mut bytes = vec![0; codes.len() * bits as usize / 8];
    pack_bits(codes, bits, &mut bytes);
    bytes
}

/// Codes that stand for a finite number.
fn finite(element: ElementType, code: u8) -> u8 {
    let code = code & element.spec().code_mask();
    if element.decode(code).is_finite() { code } else { code & 0x3F }
}

#[test]
fn every_code_at_every_place_decodes_to_its_value() {
    for element_type in ElementType::ALL {
        let codes = 1 + usize::from(element_type.spec().code_mask());
        // Sixteen rows of a tile, all places in turn with every code: row and column shift the sequence.
        for shift in 0..codes {
            let code =
                |row: usize, k: usize| finite(element_type, ((row * 37 + k * 11 + shift) % codes) as u8);
            let all: Vec<u8> =
                (0..TILE_ROWS * TILE_COLS).map(|i| code(i / TILE_COLS, i % TILE_COLS)).collect();
            let bytes = packed_codes(element_type, &all);
            let scales = [127; TILE_ROWS * 2];
            let format = MxFormat::new(element_type);
            let tensor = MxTensor::new(format, [TILE_ROWS, TILE_COLS], &bytes, &scales).expect("a tensor");
            let packed = pack_all(&[mx(tensor)], RowOrder::Stacked);
            for row in 0..TILE_ROWS {
                for k in 0..TILE_COLS {
                    let value = element(packed.layout.format, &packed.tiles, row, k).to_f32();
                    let expected = element_type.decode(code(row, k));
                    assert_eq!(value, expected, "{element_type:?} {row} {k}: {:#x}", code(row, k));
                    let negative_zero = expected == 0.0 && expected.is_sign_negative();
                    assert!(!negative_zero || value.is_sign_negative(), "{element_type:?} {row} {k}: -0");
                }
            }
        }
    }
}

#[test]
fn every_code_at_every_distance_is_exact() {
    for element_type in ElementType::ALL {
        let format = MxFormat::new(element_type);
        for distance in 0..=254_u8 {
            // The first block sets the row's largest scale; the seven others hold every code.
            let mut all = vec![finite(element_type, 1); 32];
            all.extend((0..=255).map(|code| finite(element_type, code)));
            let mut scales = vec![254 - distance; all.len() / 32];
            scales[0] = 254;
            let bytes = packed_codes(element_type, &all);
            let tensor = MxTensor::new(format, [1, all.len()], &bytes, &scales).expect("a tensor");
            let packed = pack_all(&[mx(tensor)], RowOrder::Stacked);
            let tile_bytes = packed.layout.format.tile_bytes();
            for (k, &code) in all.iter().enumerate().skip(32) {
                let tile = &packed.tiles[k / TILE_COLS * tile_bytes..];
                let value = f64::from(element(packed.layout.format, tile, 0, k % TILE_COLS).to_f32());
                let exact = f64::from(element_type.decode(code)) * f64::from(-i32::from(distance)).exp2();
                let expected = if distance <= MAX_DISTANCE { exact } else { 0.0 };
                assert_eq!(value, expected, "{element_type:?} {code:#x} at distance {distance}");
            }
            assert_eq!(packed.factors[0], 127.0_f32.exp2());
            assert_eq!(packed.spreads[0], distance);
        }
    }
}

/// A tensor with scales of a wide range, zero blocks among them, and the parts of it that are stacked.
fn random_tensor(random: &mut Random, element: ElementType, [rows, cols]: [usize; 2]) -> (Vec<u8>, Vec<u8>) {
    let mut codes: Vec<u8> = (0..rows * cols).map(|_| finite(element, random.next() as u8)).collect();
    for block in codes.chunks_exact_mut(32) {
        if random.below(8) == 0 {
            block.fill(0);
        }
    }
    let center = 20 + random.below(200);
    let scales = (0..rows * cols / 32).map(|_| (center + random.below(30)) as u8).collect();
    (packed_codes(element, &codes), scales)
}

#[test]
fn odd_shapes_decode_to_the_tensor() {
    let mut random = Random(3);
    for element in ElementType::ALL {
        for (shapes, order) in [
            (vec![[1, 32]], RowOrder::Stacked),
            (vec![[16, 64]], RowOrder::Stacked),
            (vec![[17, 96], [30, 96], [1, 96]], RowOrder::Stacked),
            (vec![[5, 160], [5, 160]], RowOrder::Paired),
            (vec![[24, 64], [24, 64]], RowOrder::Paired),
        ] {
            let data: Vec<_> =
                shapes.iter().map(|&shape| (random_tensor(&mut random, element, shape), shape)).collect();
            let tensors: Vec<MxTensor<'_>> = data
                .iter()
                .map(|((codes, scales), shape)| {
                    MxTensor::new(MxFormat::new(element), *shape, codes, scales).expect("a tensor")
                })
                .collect();
            let parts: Vec<_> = tensors.iter().map(|tensor| mx(*tensor)).collect();
            let packed = pack_all(&parts, order);
            let cols = packed.layout.shape[1];
            let (mut expected, mut actual) = (vec![0.0; cols], vec![0.0; cols]);
            let rows = tensors.iter().flat_map(|tensor| (0..tensor.shape()[0]).map(move |row| (tensor, row)));
            for (row, (tensor, row_of_part)) in rows.enumerate() {
                tensor.dequantize_row(row_of_part, &mut expected);
                decode_row(&packed.layout, &packed.tiles, &packed.factors, row, &mut actual);
                assert_eq!(expected, actual, "{element:?} {shapes:?} row {row}");
            }
            padding_is_zero(&packed);
        }
    }
}

fn padding_is_zero(packed: &Packed) {
    let Packed { layout, tiles, factors, .. } = packed;
    for row_tile in 0..layout.row_tiles() {
        for row in 0..TILE_ROWS {
            let padding = layout.source_row(row_tile, row).is_none();
            let no_factor = layout.format == TileFormat::Bf16;
            assert!(
                !padding || no_factor || factors[row_tile * TILE_ROWS + row] == 0.0,
                "factor of a row of padding"
            );
            for k in 0..layout.k_tiles() * TILE_COLS {
                if !padding && k < layout.shape[1] {
                    continue;
                }
                let tile = &tiles[row_tile * layout.row_tile_bytes()..]
                    [k / TILE_COLS * layout.format.tile_bytes()..];
                assert_eq!(element(layout.format, tile, row, k % TILE_COLS).to_bits() & 0x7FFF, 0);
            }
        }
    }
}

#[test]
fn rows_with_a_nan_or_an_infinity_have_the_factor_nan_and_leave_the_others_alone() {
    for element_type in ElementType::ALL {
        let spec = element_type.spec();
        for special in 0..=spec.code_mask() {
            let is_special = !element_type.decode(special).is_finite();
            if !is_special && special != 1 {
                continue;
            }
            let mut codes = vec![finite(element_type, 1); 3 * 64];
            codes[64 + 40] = special;
            let bytes = packed_codes(element_type, &codes);
            let mut scales = [127, 127, 127, 126, 127, 127];
            if !is_special {
                scales[2] = 255;
            }
            let tensor =
                MxTensor::new(MxFormat::new(element_type), [3, 64], &bytes, &scales).expect("a tensor");
            let packed = pack_all(&[mx(tensor)], RowOrder::Stacked);
            assert_eq!(packed.factors[0], 1.0);
            assert!(packed.factors[1].is_nan(), "{element_type:?} {special:#x}");
            assert_eq!(packed.factors[2], 1.0);
        }
        assert!(spec.specials == Specials::None || spec.bits == 8);
    }
}

#[test]
fn zero_blocks_take_no_part_in_a_rows_scale() {
    let mut codes = vec![0; 96];
    codes[..32].fill(2);
    codes[64..].fill(3);
    let bytes = packed_codes(ElementType::E2m1, &codes);
    let tensor =
        MxTensor::new(MxFormat::new(ElementType::E2m1), [1, 96], &bytes, &[100, 254, 98]).expect("a tensor");
    let packed = pack_all(&[mx(tensor)], RowOrder::Stacked);
    assert_eq!(packed.factors[0], (-27.0_f32).exp2());
    assert_eq!(packed.spreads[0], 2);
    let scale = |tile: usize, block: usize| {
        packed.tiles[tile * packed.layout.format.tile_bytes() + scale_offset(packed.layout.format, 0, block)]
    };
    let unit = TileFormat::E2m1.unit_exponent();
    assert_eq!([scale(0, 0), scale(0, 1), scale(1, 0), scale(1, 1)], [unit, 0, unit - 2, 0]);
}

#[test]
fn dense_rows_become_bf16() {
    let values: Vec<f32> = (0..5 * 70).map(|i| (i as f32 - 100.0) * 0.37).collect();
    for dtype in [DenseDtype::Bf16, DenseDtype::F16, DenseDtype::F32] {
        let bytes: Vec<u8> = match dtype {
            DenseDtype::Bf16 => values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect(),
            DenseDtype::F16 => values.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect(),
            DenseDtype::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        };
        let packed =
            pack_all(&[WeightSource::Dense { dtype, shape: [5, 70], bytes: &bytes }], RowOrder::Stacked);
        let mut row_values = vec![0.0; 70];
        for (row, expected) in values.chunks_exact(70).enumerate() {
            decode_row(&packed.layout, &packed.tiles, &packed.factors, row, &mut row_values);
            for (actual, expected) in row_values.iter().zip(expected) {
                let source = if dtype == DenseDtype::F16 {
                    half::f16::from_f32(*expected).to_f32()
                } else {
                    *expected
                };
                assert_eq!(*actual, half::bf16::from_f32(source).to_f32(), "{dtype:?} {row}");
            }
        }
        padding_is_zero(&packed);
    }
}

#[test]
fn tiles_take_the_bytes_of_the_format() {
    let bits = |format: TileFormat| (format.tile_bytes() * 8) as f64 / (TILE_ROWS * TILE_COLS) as f64;
    assert_eq!(bits(TileFormat::E2m1), 4.25);
    assert_eq!(bits(TileFormat::E2m3), 6.25);
    assert_eq!(bits(TileFormat::Int8), 8.25);
    assert_eq!(bits(TileFormat::Bf16), 16.0);
    assert!(TileFormat::ALL.iter().all(|f| f.tile_bytes() % 16 == 0 && SCALE_BYTES == 32));
}

#[test]
fn rows_are_where_the_layout_says() {
    for (shape, order) in
        [([35, 64], RowOrder::Stacked), ([10, 64], RowOrder::Paired), ([48, 64], RowOrder::Paired)]
    {
        let layout = TileLayout { format: TileFormat::E2m1, shape, order };
        for row in 0..shape[0] {
            let (row_tile, in_tile) = layout.place_of(row);
            assert_eq!(layout.source_row(row_tile, in_tile), Some(row), "{order:?}");
        }
    }
}

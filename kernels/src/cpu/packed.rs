//! The layout of weights in memory: sixteen rows interleaved, so that a vector lane is an output.
//!
//! Rows come in groups of [`LANES`]; the last group is padded with zero rows. Along K there are blocks of 32; a dense
//! weight's last block is padded with zeros. A group's blocks follow each other, and a block holds, in this order:
//!
//! | storage | per block | content |
//! |---|---|---|
//! | 4 bits | 4 x 16 u32 | byte j of word g of a row: code 8g + j, and in its high nibble code 8g + 4 + j |
//! | 6 bits | 2 x 3 x 16 u32 | word 0 of half h of a row, byte j: the upper pairs of codes 16h + j + 4i, i = 0 .. 3; words 1 and 2: low nibbles as above |
//! | INT8 | 8 x 16 u32 | byte j of word g of a row: code 4g + j |
//! | FP8 | 32 x 16 u8 | code k of each row |
//! | BF16, F16 | 32 x 16 u16 | element k of each row |
//! | F32 | 32 x 16 f32 | element k of each row |
//!
//! Where codes are integers, or become integers by a table, four consecutive ones of a row are the bytes of a 32-bit
//! lane after a shift and a mask: the operand of an int8 dot product. A block's words are needed in the order of their
//! addresses: what memory delivers ahead depends on it (6-bit codes with their upper pairs at the end came at half the
//! speed).
//!
//! Scales are apart: 16 bytes per group and block. So MXFP4 takes 4.25 bits per weight here too.

use super::arena::Arena;
use super::linear::IntegerCodec;
use super::memory::AlignedBytes;
use super::pool::{DisjointSlices, Pool};
use super::simd::{HalfFields, LANES, half_bits};
use crate::backend::{DenseDtype, WeightSource};
use crate::mx::{E8m0, ElementType, MxFormat, Specials, unpack};

/// Word of a row's block of 6-bit codes with the low nibbles of codes `8 g .. 8 g + 8`.
pub(crate) const fn sextet_low_word(g: usize) -> usize {
    g / 2 * 3 + 1 + g % 2
}

/// Word of a row's block of 6-bit codes with the upper pairs of codes `16 h .. 16 h + 16`.
pub(crate) const fn sextet_upper_word(h: usize) -> usize {
    h * 3
}

/// Elements along K in one block.
pub(crate) const BLOCK: usize = 32;

/// How a block's elements are stored and decoded.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Storage {
    /// 4-bit codes through a table of 16 values.
    Nibbles([f32; 16]),
    /// 6-bit sign-magnitude codes through a table of the 32 magnitudes.
    Sextets([f32; 32]),
    /// FP8 codes.
    Fp8(HalfFields),
    /// Two's complement bytes; the scale's exponent is lowered by `fraction_bits` instead of each element.
    Int8 {
        /// Fraction bits of the element.
        fraction_bits: u32,
    },
    /// Dense elements.
    Dense(DenseDtype),
}

impl Storage {
    fn of(element: ElementType) -> Self {
        let spec = element.spec();
        let fields = HalfFields {
            bits: spec.bits,
            shift: 10_u32.saturating_sub(spec.mantissa_bits),
            factor: f32::from_bits(((127 + 15 - spec.bias) as u32) << 23),
        };
        match (spec.bits, spec.exponent_bits) {
            (4, _) => Self::Nibbles(std::array::from_fn(|code| element.decode(code as u8))),
            (6, _) => Self::Sextets(std::array::from_fn(|code| element.decode(code as u8))),
            (_, 0) => Self::Int8 { fraction_bits: spec.mantissa_bits },
            _ => Self::Fp8(fields),
        }
    }

    /// Bytes of one block of [`LANES`] rows.
    pub(crate) fn block_bytes(&self) -> usize {
        LANES
            * BLOCK
            * match self {
                Self::Nibbles(_) => 4,
                Self::Sextets(_) => 6,
                Self::Fp8(_) | Self::Int8 { .. } => 8,
                Self::Dense(dtype) => 8 * dtype.size_bytes(),
            }
            / 8
    }
}

/// A weight in this layout.
#[derive(Debug)]
pub(crate) struct PackedWeight {
    /// `[N, K]`.
    pub(crate) shape: [usize; 2],
    pub(crate) storage: Storage,
    /// `[groups, blocks]` of [`Storage::block_bytes`].
    pub(crate) codes: AlignedBytes,
    /// `[groups, blocks, LANES]`, empty for a dense weight.
    pub(crate) scales: AlignedBytes,
    /// How to multiply as integers, where the elements are some.
    pub(crate) integer: Option<IntegerCodec>,
}

/// Why a weight was not packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PackError {
    /// There is no kernel for the blocks.
    UnsupportedBlock,
    /// The system refused this many bytes.
    OutOfMemory(usize),
}

impl PackedWeight {
    /// Packs the stacked rows of `parts`, which stack with each other.
    pub(crate) fn new(
        parts: &[WeightSource<'_>],
        pool: &mut Pool,
        arena: &mut Arena,
    ) -> Result<Self, PackError> {
        let cols = parts[0].shape()[1];
        let rows = parts.iter().map(|p| p.shape()[0]).sum();
        let storage = match &parts[0] {
            WeightSource::Mx { tensor, activation, .. } => {
                // The activation's blocks must be whole in a row too.
                let fits = activation.is_none_or(|a| cols.is_multiple_of(a.format.block.size()));
                if tensor.format().block.size() != BLOCK || !fits {
                    return Err(PackError::UnsupportedBlock);
                }
                Storage::of(tensor.format().element)
            }
            WeightSource::Dense { dtype, .. } => Storage::Dense(*dtype),
        };
        let integer = parts[0].scheme().and_then(IntegerCodec::for_scheme);
        let (groups, blocks) = (usize::div_ceil(rows, LANES), usize::div_ceil(cols, BLOCK));
        let has_scales = !matches!(storage, Storage::Dense(_));
        let code_bytes = groups * blocks * storage.block_bytes();
        let scale_bytes = if has_scales { groups * blocks * LANES } else { 0 };
        let mut zeroed = |bytes| arena.zeroed(bytes).ok_or(PackError::OutOfMemory(bytes));
        let (mut codes, mut scales) = (zeroed(code_bytes)?, zeroed(scale_bytes)?);
        let code_groups = DisjointSlices::new(codes.as_mut_slice(), blocks * storage.block_bytes());
        let scale_groups =
            DisjointSlices::new(scales.as_mut_slice(), if has_scales { blocks * LANES } else { 0 });
        pool.run(groups, &|group, _| {
            // SAFETY: each group is a task of its own.
            let (codes, scales) = unsafe { (code_groups.slice(group), scale_groups.slice(group)) };
            pack_group(&storage, parts, group * LANES, codes, scales);
        });
        Ok(Self { shape: [rows, cols], storage, codes, scales, integer })
    }

    /// Row groups of [`LANES`] rows.
    pub(crate) fn groups(&self) -> usize {
        self.shape[0].div_ceil(LANES)
    }

    /// Blocks of [`BLOCK`] elements along K.
    pub(crate) fn blocks(&self) -> usize {
        self.shape[1].div_ceil(BLOCK)
    }

    /// Decodes row `row` into `out` (K values).
    pub(crate) fn decode_row(&self, row: usize, out: &mut [f32]) {
        let (group, lane, blocks) = (row / LANES, row % LANES, self.blocks());
        let block_bytes = self.storage.block_bytes();
        for (b, out) in out.chunks_mut(BLOCK).enumerate() {
            let bytes = &self.codes.as_slice()[(group * blocks + b) * block_bytes..][..block_bytes];
            // Byte j of word w of this row.
            let byte = |w: usize, j: usize| usize::from(bytes[(w * LANES + lane) * 4 + j]);
            let scale = || E8m0(self.scales.as_slice()[(group * blocks + b) * LANES + lane]).to_f32();
            for (k, out) in out.iter_mut().enumerate() {
                let nibble = |word| byte(word, k % 4) >> (k / 4 % 2 * 4) & 15;
                *out = match &self.storage {
                    Storage::Nibbles(table) => table[nibble(k / 8)] * scale(),
                    Storage::Sextets(table) => {
                        let upper = byte(sextet_upper_word(k / 16), k % 4) >> (k / 4 % 4 * 2) & 3;
                        let code = nibble(sextet_low_word(k / 8)) | upper << 4;
                        let magnitude = table[code & 31] * scale();
                        if code & 32 == 0 { magnitude } else { -magnitude }
                    }
                    Storage::Fp8(fields) => {
                        let half = half_bits(bytes[k * LANES + lane].into(), *fields);
                        half::f16::from_bits(half).to_f32() * fields.factor * scale()
                    }
                    Storage::Int8 { fraction_bits } => {
                        let code = byte(k / 4, k % 4) as u8 as i8;
                        f32::from(code) / (1u32 << fraction_bits) as f32 * scale()
                    }
                    Storage::Dense(dtype) => {
                        let size = dtype.size_bytes();
                        let at = &bytes[(k * LANES + lane) * size..][..size];
                        match dtype {
                            DenseDtype::Bf16 => half::bf16::from_le_bytes([at[0], at[1]]).to_f32(),
                            DenseDtype::F16 => half::f16::from_le_bytes([at[0], at[1]]).to_f32(),
                            DenseDtype::F32 => f32::from_le_bytes([at[0], at[1], at[2], at[3]]),
                        }
                    }
                };
            }
        }
    }
}

/// Packs rows `first .. first + LANES` of the stacked `parts` (fewer at the end) into one group's bytes.
fn pack_group(
    storage: &Storage,
    parts: &[WeightSource<'_>],
    first: usize,
    codes: &mut [u8],
    scales: &mut [u8],
) {
    let mut row_codes = vec![0; parts[0].shape()[1]];
    for lane in 0..LANES {
        let mut row = first + lane;
        let Some(part) = parts.iter().find(|part| {
            let rows = part.shape()[0];
            let inside = row < rows;
            if !inside {
                row -= rows;
            }
            inside
        }) else {
            return;
        };
        match part {
            WeightSource::Mx { tensor, .. } => {
                let format = tensor.format();
                unpack(tensor.row_codes(row), format.element.spec().bits, &mut row_codes);
                pack_mx_row(storage, format, &row_codes, tensor.row_scales(row), lane, codes, scales);
            }
            WeightSource::Dense { dtype, bytes, shape } => {
                let size = dtype.size_bytes();
                let row_bytes = shape[1] * size;
                for (k, value) in bytes[row * row_bytes..][..row_bytes].chunks_exact(size).enumerate() {
                    codes[(k * LANES + lane) * size..][..size].copy_from_slice(value);
                }
            }
        }
    }
}

/// Packs one row's codes into lane `lane` of its group.
fn pack_mx_row(
    storage: &Storage,
    format: MxFormat,
    row_codes: &[u8],
    row_scales: &[u8],
    lane: usize,
    codes: &mut [u8],
    scales: &mut [u8],
) {
    let spec = format.element.spec();
    let blocks = codes.chunks_exact_mut(storage.block_bytes());
    for (b, ((block, out), &scale)) in row_codes.chunks_exact(BLOCK).zip(blocks).zip(row_scales).enumerate() {
        for (k, &code) in block.iter().enumerate() {
            // Byte k % 4 of word w of this row.
            let at = |w: usize| (w * LANES + lane) * 4 + k % 4;
            match storage {
                Storage::Nibbles(_) => out[at(k / 8)] |= code << (k / 4 % 2 * 4),
                Storage::Sextets(_) => {
                    out[at(sextet_low_word(k / 8))] |= (code & 15) << (k / 4 % 2 * 4);
                    out[at(sextet_upper_word(k / 16))] |= (code >> 4) << (k / 4 % 4 * 2);
                }
                Storage::Int8 { .. } => out[at(k / 4)] = code,
                Storage::Fp8(_) => out[k * LANES + lane] = code,
                Storage::Dense(_) => unreachable!("an MX row has codes"),
            }
        }
        // A NaN element makes every product of its row NaN, as a NaN scale does: the E4M3 decoder need not know.
        let has_nan = spec.specials == Specials::NanOnly && block.iter().any(|c| c & 0x7F == 0x7F);
        scales[b * LANES + lane] = if has_nan { E8m0::NAN.0 } else { scale };
    }
}

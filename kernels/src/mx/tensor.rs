//! A packed MX matrix: checked once, then trusted.

use super::{Block, E8m0, MxFormat, unpack};

/// A `[rows, cols]` matrix in the on-disk layout: per row a little-endian bit stream of codes, and one E8M0 byte per
/// block along `cols`.
#[derive(Debug, Clone, Copy)]
pub struct MxTensor<'a> {
    format: MxFormat,
    shape: [usize; 2],
    codes: &'a [u8],
    scales: &'a [u8],
}

/// Why bytes are no MX tensor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MxTensorError {
    /// A block would span two rows.
    #[error("{cols} columns are not a multiple of the block size {block}")]
    PartialBlock {
        /// Columns.
        cols: usize,
        /// Block size.
        block: usize,
    },
    /// The codes or scales have the wrong size.
    #[error("{what} of a {format} tensor {shape:?} take {expected} bytes, not {actual}")]
    WrongSize {
        /// `codes` or `scales`.
        what: &'static str,
        /// The format.
        format: MxFormat,
        /// `[rows, cols]`.
        shape: [usize; 2],
        /// Bytes that the shape needs.
        expected: usize,
        /// Bytes given.
        actual: usize,
    },
}

impl<'a> MxTensor<'a> {
    /// Takes packed `codes` and `scales` of a `[rows, cols]` matrix.
    ///
    /// # Errors
    /// `cols` is no multiple of the block size, or a slice has the wrong length.
    pub fn new(
        format: MxFormat,
        shape: [usize; 2],
        codes: &'a [u8],
        scales: &'a [u8],
    ) -> Result<Self, MxTensorError> {
        let [rows, cols] = shape;
        let block = format.block.size();
        if !cols.is_multiple_of(block) {
            return Err(MxTensorError::PartialBlock { cols, block });
        }
        for (what, expected, actual) in [
            ("codes", rows * format.code_bytes(cols), codes.len()),
            ("scales", rows * format.scale_bytes(cols), scales.len()),
        ] {
            if expected != actual {
                return Err(MxTensorError::WrongSize { what, format, shape, expected, actual });
            }
        }
        Ok(Self { format, shape, codes, scales })
    }

    /// The format.
    pub fn format(&self) -> MxFormat {
        self.format
    }

    /// `[rows, cols]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Bytes of codes and scales.
    pub fn num_bytes(&self) -> usize {
        self.codes.len() + self.scales.len()
    }

    /// Packed codes of row `row`.
    pub fn row_codes(&self, row: usize) -> &'a [u8] {
        let bytes = self.format.code_bytes(self.shape[1]);
        &self.codes[row * bytes..][..bytes]
    }

    /// Scales of row `row`, one per block.
    pub fn row_scales(&self, row: usize) -> &'a [u8] {
        let blocks = self.format.scale_bytes(self.shape[1]);
        &self.scales[row * blocks..][..blocks]
    }

    /// Decodes row `row` into `out` (`cols` values): code value times scale, rounded to F32 once.
    ///
    /// # Panics
    /// `out` is not `cols` long.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.shape[1], "out holds one row");
        let (values, bits) = (self.format.element.values(), self.format.element.spec().bits);
        let block = self.format.block.size();
        let mut codes = [0; Block::MAX];
        let codes = &mut codes[..block];
        let packed = self.row_codes(row).chunks_exact(self.format.code_bytes(block));
        for ((out, packed), &scale) in out.chunks_exact_mut(block).zip(packed).zip(self.row_scales(row)) {
            unpack(packed, bits, codes);
            // Both factors are exact, 2^-127 included, so the product is rounded once.
            let scale = E8m0(scale).to_f32();
            for (out, &code) in out.iter_mut().zip(&*codes) {
                *out = values[usize::from(code)] * scale;
            }
        }
    }
}

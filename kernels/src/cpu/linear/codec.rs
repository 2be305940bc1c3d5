//! How the codes of a weight become the integers of an int8 dot product.

use crate::cpu::packed::{BLOCK, sextet_low_word, sextet_upper_word};
use crate::cpu::simd::dot::Dot;
use crate::cpu::simd::{LANES, Lanes};
use crate::mx::{Cast, ElementType, Scheme};

/// Which elements a block's bytes hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CodeKind {
    /// 4-bit codes.
    Nibbles,
    /// 6-bit codes.
    Sextets,
    /// Two's complement bytes.
    Bytes,
}

/// A weight whose elements are integers times a power of two, and the integers its activations become.
#[derive(Debug, Clone)]
pub(crate) struct IntegerCodec {
    pub(super) kind: CodeKind,
    /// The integer of each code; of the low four bits where codes have four.
    pub(super) integers: [i8; 64],
    /// The power of two that makes integers of the elements: E2M1 x 2, E2M3 x 8, INT8 x 64.
    pub(super) factor_log2: i32,
    /// Activations that have integers of their own in a byte.
    pub(super) image: Option<Cast>,
}

impl IntegerCodec {
    /// The codec for `scheme`; `None` if its weights are no integers.
    pub(crate) fn for_scheme(scheme: Scheme) -> Option<Self> {
        let element = scheme.weight.format.element;
        let factor = element.spec().int8_factor()?;
        let bits = element.spec().bits;
        let kind = match bits {
            4 => CodeKind::Nibbles,
            6 => CodeKind::Sextets,
            _ => CodeKind::Bytes,
        };
        let code = |c: usize| (c & ((1 << bits.min(6)) - 1)) as u8;
        let has_image = |cast: &Cast| {
            cast.format.block.size() == BLOCK && cast.format.element.spec().int8_factor().is_some()
        };
        Some(Self {
            kind,
            integers: std::array::from_fn(|c| (element.decode(code(c)) * factor) as i8),
            factor_log2: log2(factor),
            image: scheme.activation.filter(has_image),
        })
    }

    /// The table for [`Dot::table`], raised by `offset`.
    pub(super) fn table(&self, offset: i32) -> [u8; 64] {
        self.integers.map(|i| (i32::from(i) + offset) as u8)
    }

    /// Bytes of an activation's integer.
    pub(crate) fn planes(&self) -> usize {
        if self.image.is_some() { 1 } else { 2 }
    }
}

/// Exponent of a power of two.
pub(super) const fn log2(power: f32) -> i32 {
    (power.to_bits() >> 23) as i32 - 127
}

/// The integer factor of an element type with int8 integers, as an exponent.
pub(super) fn factor_log2(element: ElementType) -> Option<i32> {
    element.spec().int8_factor().map(log2)
}

/// Decodes quads, four consecutive elements along K of a row group, and multiplies them.
///
/// # Safety
/// As [`Dot`]; `block` points to a whole block of the layout, `scales` to those of a block's rows, `half < 2`.
pub(super) trait Codec<D: Dot>: Copy {
    /// Bytes of a block of a row group.
    const BLOCK_BYTES: usize;
    /// Bytes of the scales of a block of a row group.
    const SCALE_BYTES: usize = LANES;
    /// Whether products are those of [`Dot::dot_bytes`].
    const BYTES: bool;
    /// Whether scales are I32 that add to the exponent of an F32.
    const EXPONENTS: bool = false;
    /// The codec of `weight`'s integers.
    unsafe fn new(codec: &IntegerCodec) -> Self;
    /// Quads `4 * half .. 4 * half + 4` of a block.
    unsafe fn quads(self, block: *const u8, half: usize) -> [D; 4];
    /// The scales of a block's rows.
    #[inline(always)]
    unsafe fn scales(scales: *const u8) -> D::Float {
        // SAFETY: the trait's contract.
        unsafe { D::Float::from_e8m0(scales) }
    }
}

#[derive(Clone, Copy)]
pub(super) struct Nibbles<D: Dot>(D::Table);
#[derive(Clone, Copy)]
pub(super) struct Sextets<D: Dot>(D::Table);
#[derive(Clone, Copy)]
pub(super) struct Bytes;
/// What the other codecs decode to: raised bytes of codes, or (`BYTES`) of whole bytes, and scales as F32 or as
/// `EXPONENTS`.
#[derive(Clone, Copy)]
pub(super) struct Decoded<const BYTES: bool, const EXPONENTS: bool>;

/// Words `w` of a block's rows.
#[inline(always)]
unsafe fn words<D: Dot>(block: *const u8, w: usize) -> D {
    // SAFETY: the caller's block has them.
    unsafe { D::load(block.add(w * size_of::<[u32; 16]>())) }
}

/// Words `w..w + 4`.
#[inline(always)]
unsafe fn four_words<D: Dot>(block: *const u8, w: usize) -> [D; 4] {
    // SAFETY: as `words`.
    unsafe {
        [words::<D>(block, w), words::<D>(block, w + 1), words::<D>(block, w + 2), words::<D>(block, w + 3)]
    }
}

impl<D: Dot> Codec<D> for Nibbles<D> {
    const BLOCK_BYTES: usize = 4 * LANES * BLOCK / 8;
    const BYTES: bool = false;
    #[inline(always)]
    unsafe fn new(codec: &IntegerCodec) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { D::table(&codec.table(D::CODE_OFFSET)) })
    }
    #[inline(always)]
    unsafe fn quads(self, block: *const u8, half: usize) -> [D; 4] {
        // SAFETY: the trait's contract.
        unsafe {
            let (a, b) = (words::<D>(block, 2 * half), words::<D>(block, 2 * half + 1));
            let t = self.0;
            [a.nibbles::<false>(t), a.nibbles::<true>(t), b.nibbles::<false>(t), b.nibbles::<true>(t)]
        }
    }
}

impl<D: Dot> Codec<D> for Sextets<D> {
    const BLOCK_BYTES: usize = 6 * LANES * BLOCK / 8;
    const BYTES: bool = false;
    #[inline(always)]
    unsafe fn new(codec: &IntegerCodec) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { D::table(&codec.table(D::CODE_OFFSET)) })
    }
    #[inline(always)]
    unsafe fn quads(self, block: *const u8, half: usize) -> [D; 4] {
        // SAFETY: the trait's contract.
        unsafe {
            let upper = words::<D>(block, sextet_upper_word(half));
            let (a, b) = (
                words::<D>(block, sextet_low_word(2 * half)),
                words::<D>(block, sextet_low_word(2 * half + 1)),
            );
            let t = self.0;
            [
                a.sextets::<false, 0>(upper, t),
                a.sextets::<true, 1>(upper, t),
                b.sextets::<false, 2>(upper, t),
                b.sextets::<true, 3>(upper, t),
            ]
        }
    }
}

impl<D: Dot> Codec<D> for Bytes {
    const BLOCK_BYTES: usize = LANES * BLOCK;
    const BYTES: bool = true;
    #[inline(always)]
    unsafe fn new(_: &IntegerCodec) -> Self {
        Self
    }
    #[inline(always)]
    unsafe fn quads(self, block: *const u8, half: usize) -> [D; 4] {
        // SAFETY: the trait's contract.
        unsafe {
            let [a, b, c, d] = four_words::<D>(block, 4 * half);
            [a.raised_bytes(), b.raised_bytes(), c.raised_bytes(), d.raised_bytes()]
        }
    }
}

impl<const BYTES: bool, const EXPONENTS: bool, D: Dot> Codec<D> for Decoded<BYTES, EXPONENTS> {
    const BLOCK_BYTES: usize = LANES * BLOCK;
    const SCALE_BYTES: usize = LANES * size_of::<f32>();
    const BYTES: bool = BYTES;
    const EXPONENTS: bool = EXPONENTS;
    #[inline(always)]
    unsafe fn new(_: &IntegerCodec) -> Self {
        Self
    }
    #[inline(always)]
    unsafe fn quads(self, block: *const u8, half: usize) -> [D; 4] {
        // SAFETY: the trait's contract.
        unsafe { four_words(block, 4 * half) }
    }
    #[inline(always)]
    unsafe fn scales(scales: *const u8) -> D::Float {
        // SAFETY: the trait's contract.
        unsafe { D::Float::load(scales.cast()) }
    }
}

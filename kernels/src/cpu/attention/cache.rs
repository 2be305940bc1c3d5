//! Where keys and values lie in a block of the cache, how they are written, and how MX elements become bfloat16.
//!
//! A block holds, for each KV head, 16 tokens. Products want sixteen keys, or sixteen elements of values, in one vector;
//! bfloat16 products want them in pairs of neighbours:
//!
//! ```text
//!          keys                                     values
//! f32      [dim][16 tokens]                         [16 tokens][dim]
//! bf16     [dim / 2][16 tokens][2 elements]         [8 pairs of tokens][dim][2 tokens]
//! MX 8 bit [dim][16 tokens]                         [16 tokens][dim]
//! MX 4 bit [dim / 2][16 tokens], low nibble first   [16 tokens][dim / 32][16], elements i and 16 + i of a block
//! scales   [dim / 32][16 tokens]                    [dim / 32][16 tokens]
//! ```
//!
//! `dim` of values is rounded up to whole vectors; scales follow the codes.

use crate::backend::Heads;
use crate::cpu::simd::pairs::{CacheLanes, round_to_bf16};
use crate::cpu::simd::{HalfFields, LANES};
use crate::kv_cache_dtype::KvCacheDtype;
use crate::mx::{E8m0, quantize_block};

/// Elements that share a scale.
const BLOCK: usize = 32;

/// Magnitudes below count as zero in a bfloat16 cache: 2^-72. With probabilities of at least 2^-40, all sums of products
/// are then multiples of 2^-126: no sum is ever subnormal, which `vdpbf16ps` would take for zero.
pub(super) const SMALLEST: f32 = f32::from_bits((127 - 72) << 23);

/// The same for MX blocks, as a bound of the scale: the smallest element is at least 2^-9 times that.
const SMALLEST_SCALE: u8 = 127 - 60;

/// Placement of E4M3 in an IEEE half.
const E4M3: HalfFields = HalfFields { bits: 8, shift: 7, factor: 256.0 };

/// `v` in bfloat16, as the cache and queries hold it.
#[inline(always)]
pub(super) fn to_bf16(v: f32) -> u16 {
    if v.abs() < SMALLEST { 0 } else { round_to_bf16(v) }
}

/// Sizes and offsets, in bytes, of one layer's cache.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KvLayout {
    pub(super) heads: Heads,
    pub(super) dtype: KvCacheDtype,
}

impl KvLayout {
    /// The layout; `None` where `dtype` is MX and blocks of 32 do not divide the head dimension.
    pub(crate) fn new(heads: Heads, dtype: KvCacheDtype) -> Option<Self> {
        let divides = dtype.cast().is_none_or(|cast| heads.dim.is_multiple_of(cast.format.block.size()));
        divides.then_some(Self { heads, dtype })
    }

    /// Elements from one value row (of tokens, or of pairs of them) to the next.
    pub(super) fn stride(self) -> usize {
        self.heads.dim.next_multiple_of(LANES)
    }

    /// Bytes of `elements` codes or floats.
    fn element_bytes(self, elements: usize) -> usize {
        match (self.dtype, self.dtype.cast()) {
            (_, Some(cast)) => cast.format.code_bytes(elements),
            (KvCacheDtype::F32, None) => 4 * elements,
            (_, None) => 2 * elements,
        }
    }

    fn scale_bytes(self) -> usize {
        self.dtype.cast().map_or(0, |cast| LANES * cast.format.scale_bytes(self.heads.dim))
    }

    pub(super) fn key_head_bytes(self) -> usize {
        self.element_bytes(LANES * self.heads.dim) + self.scale_bytes()
    }

    pub(super) fn value_head_bytes(self) -> usize {
        self.element_bytes(LANES * self.stride()) + self.scale_bytes()
    }

    /// Bytes of one block of keys.
    pub(crate) fn key_block_bytes(self) -> usize {
        self.heads.kv * self.key_head_bytes()
    }

    /// Bytes of one block of values.
    pub(crate) fn value_block_bytes(self) -> usize {
        self.heads.kv * self.value_head_bytes()
    }

    /// Offset of a head's keys in a block.
    pub(super) fn keys_at(self, block: usize, head: usize) -> usize {
        block * self.key_block_bytes() + head * self.key_head_bytes()
    }

    /// Offset of a head's values in a block.
    pub(super) fn values_at(self, block: usize, head: usize) -> usize {
        block * self.value_block_bytes() + head * self.value_head_bytes()
    }

    /// Writes one token's key and value of one head as token `lane` of the block whose keys start at `k` and values at
    /// `v`.
    ///
    /// # Safety
    /// `k` and `v` point to a head's keys and values in this layout, aligned to 4 bytes; nobody else uses this token's
    /// elements.
    pub(super) unsafe fn write(self, k: *mut u8, v: *mut u8, lane: usize, key: &[f32], value: &[f32]) {
        let stride = self.stride();
        assert!(lane < LANES && key.len() == self.heads.dim && value.len() == self.heads.dim);
        // SAFETY: offsets are inside the head's part of the block.
        unsafe {
            match self.dtype {
                KvCacheDtype::F32 => {
                    let (k, v) = (k.cast::<f32>(), v.cast::<f32>());
                    for (d, (&x, &y)) in key.iter().zip(value).enumerate() {
                        *k.add(d * LANES + lane) = x;
                        *v.add(lane * stride + d) = y;
                    }
                }
                KvCacheDtype::Bf16 => {
                    let (k, v) = (k.cast::<u16>(), v.cast::<u16>());
                    for (d, (&x, &y)) in key.iter().zip(value).enumerate() {
                        *k.add((d / 2 * LANES + lane) * 2 + d % 2) = to_bf16(x);
                        *v.add((lane / 2 * stride + d) * 2 + lane % 2) = to_bf16(y);
                    }
                }
                KvCacheDtype::Mxfp8 | KvCacheDtype::Mxint8 | KvCacheDtype::Mxfp4 => {
                    let blocks = key.as_chunks::<BLOCK>().0.iter().zip(value.as_chunks::<BLOCK>().0);
                    for (b, (key, value)) in blocks.enumerate() {
                        self.write_mx(k, v, lane, b, key, value);
                    }
                }
            }
        }
    }

    /// [`write`](Self::write) for block `b` of an MX cache.
    unsafe fn write_mx(
        self,
        k: *mut u8,
        v: *mut u8,
        lane: usize,
        b: usize,
        key: &[f32; BLOCK],
        value: &[f32; BLOCK],
    ) {
        let dim = self.heads.dim;
        let packed = self.dtype == KvCacheDtype::Mxfp4;
        let (key, key_scale) = self.quantize(key);
        let (value, value_scale) = self.quantize(value);
        // SAFETY: the caller's conditions; offsets are those of the layout.
        unsafe {
            *k.add(self.element_bytes(LANES * dim) + b * LANES + lane) = key_scale;
            *v.add(self.element_bytes(LANES * dim) + b * LANES + lane) = value_scale;
            if packed {
                for (i, pair) in key.as_chunks::<2>().0.iter().enumerate() {
                    *k.add((b * BLOCK / 2 + i) * LANES + lane) = pair[0] | pair[1] << 4;
                }
                for i in 0..BLOCK / 2 {
                    *v.add((lane * dim + b * BLOCK) / 2 + i) = value[i] | value[i + BLOCK / 2] << 4;
                }
            } else {
                for i in 0..BLOCK {
                    *k.add((b * BLOCK + i) * LANES + lane) = key[i];
                    *v.add(lane * dim + b * BLOCK + i) = value[i];
                }
            }
        }
    }

    /// Codes, one a byte, and scale.
    fn quantize(self, x: &[f32; BLOCK]) -> ([u8; BLOCK], u8) {
        let cast = self.dtype.cast().expect("an MX cache");
        let mut codes = [0; BLOCK];
        let E8m0(scale) = quantize_block(cast, x, &mut codes);
        if scale < SMALLEST_SCALE {
            codes.fill(0);
        }
        (codes, scale)
    }

    /// Bfloat16 pairs `[dim / 2][16 tokens][2]` of the MX keys at `k`; fetches as many bytes from `ahead`.
    ///
    /// # Safety
    /// As [`CacheLanes`]; `k` points to a head's keys in this layout, `out` to space for `dim * 16` elements.
    #[inline(always)]
    pub(super) unsafe fn decode_keys<L: CacheLanes>(self, k: *const u8, ahead: *const u8, out: *mut u16) {
        // SAFETY: the caller's conditions.
        unsafe {
            match self.dtype {
                KvCacheDtype::Mxfp4 => self.keys_of::<L, Fp4>(k, ahead, out),
                KvCacheDtype::Mxint8 => self.keys_of::<L, Int8>(k, ahead, out),
                _ => self.keys_of::<L, Fp8>(k, ahead, out),
            }
        }
    }

    /// Bfloat16 pairs `[8 pairs of tokens][dim][2]` of the MX values at `v`; fetches as many bytes from `ahead`.
    ///
    /// # Safety
    /// As [`decode_keys`](Self::decode_keys).
    #[inline(always)]
    pub(super) unsafe fn decode_values<L: CacheLanes>(self, v: *const u8, ahead: *const u8, out: *mut u16) {
        // SAFETY: the caller's conditions.
        unsafe {
            match self.dtype {
                KvCacheDtype::Mxfp4 => self.values_of::<L, Fp4>(v, ahead, out),
                KvCacheDtype::Mxint8 => self.values_of::<L, Int8>(v, ahead, out),
                _ => self.values_of::<L, Fp8>(v, ahead, out),
            }
        }
    }

    #[inline(always)]
    unsafe fn keys_of<L: CacheLanes, C: Codec>(self, k: *const u8, ahead: *const u8, out: *mut u16) {
        let dim = self.heads.dim;
        // SAFETY: the caller's conditions; offsets are those of the layout.
        unsafe {
            let scales = k.add(C::bytes(LANES * dim));
            for b in 0..dim / BLOCK {
                let scale = L::from_e8m0(scales.add(b * LANES)).mul(L::splat(C::UNIT));
                for d in (b * BLOCK..(b + 1) * BLOCK).step_by(2) {
                    let at = C::bytes(d * LANES);
                    if at % 64 == 0 {
                        L::prefetch::<false>(ahead.wrapping_add(at));
                    }
                    let (first, second) = C::two_rows::<L>(k.add(at));
                    L::store_pairs(first.mul(scale), second.mul(scale), out.add(d * LANES));
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn values_of<L: CacheLanes, C: Codec>(self, v: *const u8, ahead: *const u8, out: *mut u16) {
        let dim = self.heads.dim;
        // SAFETY: the caller's conditions; offsets are those of the layout.
        unsafe {
            let scales = v.add(C::bytes(LANES * dim));
            for line in (0..C::bytes(LANES * dim)).step_by(64) {
                L::prefetch::<false>(ahead.wrapping_add(line));
            }
            for b in 0..dim / BLOCK {
                let scale = L::from_e8m0(scales.add(b * LANES)).mul(L::splat(C::UNIT)).to_array();
                for t in (0..LANES).step_by(2) {
                    let (first_scale, second_scale) = (L::splat(scale[t]), L::splat(scale[t + 1]));
                    let first = C::block::<L>(v.add(C::bytes(t * dim + b * BLOCK)));
                    let second = C::block::<L>(v.add(C::bytes((t + 1) * dim + b * BLOCK)));
                    let out = out.add(t * dim + b * BLOCK * 2);
                    L::store_pairs(first.0.mul(first_scale), second.0.mul(second_scale), out);
                    let out = out.add(2 * LANES);
                    L::store_pairs(first.1.mul(first_scale), second.1.mul(second_scale), out);
                }
            }
        }
    }
}

/// How the codes of an MX cache become numbers.
///
/// # Safety
/// As [`CacheLanes`].
trait Codec {
    /// Bits of a code.
    const BITS: usize;
    /// What scales are multiplied with.
    const UNIT: f32;

    /// Bytes of `elements` codes.
    #[inline(always)]
    fn bytes(elements: usize) -> usize {
        elements * Self::BITS / 8
    }

    /// Two rows of 16 elements of keys.
    unsafe fn two_rows<L: CacheLanes>(p: *const u8) -> (L, L);

    /// The 32 elements of a block of a value.
    #[inline(always)]
    unsafe fn block<L: CacheLanes>(p: *const u8) -> (L, L) {
        // SAFETY: the caller's conditions; the elements of 8-bit codes follow each other in both.
        unsafe { Self::two_rows(p) }
    }
}

struct Fp8;

impl Codec for Fp8 {
    const BITS: usize = 8;
    const UNIT: f32 = 1.0;

    #[inline(always)]
    unsafe fn two_rows<L: CacheLanes>(p: *const u8) -> (L, L) {
        // SAFETY: the caller's conditions.
        unsafe { (L::from_fp8(p, E4M3), L::from_fp8(p.add(LANES), E4M3)) }
    }
}

struct Int8;

impl Codec for Int8 {
    const BITS: usize = 8;
    /// Codes count in units of 2^-6.
    const UNIT: f32 = 1.0 / 64.0;

    #[inline(always)]
    unsafe fn two_rows<L: CacheLanes>(p: *const u8) -> (L, L) {
        // SAFETY: the caller's conditions.
        unsafe { (L::from_bytes(p.cast()), L::from_bytes(p.add(LANES).cast())) }
    }
}

struct Fp4;

impl Fp4 {
    const VALUES: [f32; 16] =
        [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];
}

impl Codec for Fp4 {
    const BITS: usize = 4;
    const UNIT: f32 = 1.0;

    #[inline(always)]
    unsafe fn two_rows<L: CacheLanes>(p: *const u8) -> (L, L) {
        // SAFETY: the caller's conditions.
        unsafe { L::from_nibble_bytes(p, &Self::VALUES) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mx::ElementType;

    #[test]
    fn the_table_is_e2m1() {
        let values: [f32; 16] = std::array::from_fn(|code| ElementType::E2m1.decode(code as u8));
        assert_eq!(Fp4::VALUES.map(f32::to_bits), values.map(f32::to_bits));
    }
}

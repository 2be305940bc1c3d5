//! What attention needs beyond [`Lanes`]: dot products of bfloat16 pairs, and the elements of an MX cache as floats.

use super::{LANES, Lanes};

/// Lanes with conversions of cache elements.
///
/// # Safety
/// As [`Lanes`].
pub(crate) trait CacheLanes: Lanes {
    /// Asks for the cache line at `p`, which may point anywhere, into the second (`FAR`) or the first cache.
    #[inline(always)]
    unsafe fn prefetch<const FAR: bool>(_: *const u8) {}

    /// The lanes that are not below `bound`, the others 0. NaN stays.
    #[inline(always)]
    unsafe fn zero_below(self, bound: f32) -> Self {
        // SAFETY: arrays have sixteen elements.
        unsafe {
            let mut v = self.to_array();
            for v in &mut v {
                if *v < bound {
                    *v = 0.0;
                }
            }
            Self::load(v.as_ptr())
        }
    }

    /// The lanes whose magnitude is not below `bound`, the others 0. NaN stays.
    #[inline(always)]
    unsafe fn zero_within(self, bound: f32) -> Self {
        // SAFETY: arrays have sixteen elements.
        unsafe {
            let mut v = self.to_array();
            for v in &mut v {
                if v.abs() < bound {
                    *v = 0.0;
                }
            }
            Self::load(v.as_ptr())
        }
    }

    /// Largest lane; which one it is where some are NaN is not determined.
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        // SAFETY: the caller's conditions.
        let mut v = unsafe { self.to_array() };
        let mut width = LANES / 2;
        while width > 0 {
            for i in 0..width {
                v[i] = if v[i] > v[i + width] { v[i] } else { v[i + width] };
            }
            width /= 2;
        }
        v[0]
    }

    /// Stores 16 bfloat16, rounded to nearest even.
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16) {
        // SAFETY: the caller's conditions.
        unsafe {
            let mut out = [0; LANES];
            for (out, v) in out.iter_mut().zip(self.to_array()) {
                *out = round_to_bf16(v);
            }
            p.cast::<[u16; LANES]>().write_unaligned(out);
        }
    }

    /// Stores 16 pairs of bfloat16, `low` and `high` by turns; the lanes are bfloat16 values.
    #[inline(always)]
    unsafe fn store_pairs(low: Self, high: Self, p: *mut u16) {
        // SAFETY: the caller's conditions.
        unsafe {
            let (low, high) = (low.to_array(), high.to_array());
            let mut out = [0_u32; LANES];
            for (i, out) in out.iter_mut().enumerate() {
                *out = low[i].to_bits() >> 16 | high[i].to_bits() & 0xFFFF_0000;
            }
            p.cast::<[u32; LANES]>().write_unaligned(out);
        }
    }

    /// 16 signed bytes.
    #[inline(always)]
    unsafe fn from_bytes(p: *const i8) -> Self {
        // SAFETY: the caller's conditions.
        unsafe {
            let mut out = [0.0; LANES];
            for (out, byte) in out.iter_mut().zip(p.cast::<[i8; LANES]>().read_unaligned()) {
                *out = f32::from(byte);
            }
            Self::load(out.as_ptr())
        }
    }

    /// The low and the high nibbles of 16 bytes, through `table`.
    #[inline(always)]
    unsafe fn from_nibble_bytes(p: *const u8, table: &[f32; 16]) -> (Self, Self) {
        // SAFETY: the caller's conditions.
        unsafe {
            let bytes = p.cast::<[u8; LANES]>().read_unaligned();
            let (mut low, mut high) = ([0.0; LANES], [0.0; LANES]);
            for i in 0..LANES {
                low[i] = table[usize::from(bytes[i] & 15)];
                high[i] = table[usize::from(bytes[i] >> 4)];
            }
            (Self::load(low.as_ptr()), Self::load(high.as_ptr()))
        }
    }
}

/// To bfloat16, to nearest even; NaN stays NaN.
#[inline(always)]
pub(crate) fn round_to_bf16(v: f32) -> u16 {
    let bits = v.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
    (if v.is_nan() { bits >> 16 | 0x40 } else { rounded }) as u16
}

impl CacheLanes for super::Portable {}
#[cfg(target_arch = "aarch64")]
impl CacheLanes for super::neon::Neon {}

/// How products of queries with keys, and of probabilities with values, are summed.
///
/// # Safety
/// As [`Lanes`].
pub(crate) trait Products: Copy {
    /// The accumulators.
    type Acc: CacheLanes;
    /// Stored elements.
    type Element: Copy;
    /// 16 steps, one per lane.
    type Vector: Copy;
    /// One step, for all lanes.
    type Step: Copy;
    /// Elements that one step takes.
    const STEP: usize;

    /// 16 steps.
    unsafe fn load(p: *const Self::Element) -> Self::Vector;
    /// One step for all lanes.
    unsafe fn splat(p: *const Self::Element) -> Self::Step;
    /// Adds the products, element by element.
    unsafe fn dot(acc: Self::Acc, v: Self::Vector, s: Self::Step) -> Self::Acc;
    /// Zeros every element but `element` of each step.
    unsafe fn keep(v: Self::Vector, element: usize) -> Self::Vector;
    /// Stores 16 elements, rounded as they are stored.
    unsafe fn store(v: Self::Acc, p: *mut Self::Element);
}

/// Products of F32: one fused multiply-add.
#[derive(Clone, Copy)]
pub(crate) struct F32Products<L>(std::marker::PhantomData<L>);

impl<L: CacheLanes> Products for F32Products<L> {
    type Acc = L;
    type Element = f32;
    type Vector = L;
    type Step = L;
    const STEP: usize = 1;

    #[inline(always)]
    unsafe fn load(p: *const f32) -> L {
        // SAFETY: the caller's conditions.
        unsafe { L::load(p) }
    }
    #[inline(always)]
    unsafe fn splat(p: *const f32) -> L {
        // SAFETY: the caller's conditions.
        unsafe { L::splat(*p) }
    }
    #[inline(always)]
    unsafe fn dot(acc: L, v: L, s: L) -> L {
        // SAFETY: the caller's conditions.
        unsafe { v.mul_add(s, acc) }
    }
    #[inline(always)]
    unsafe fn keep(v: L, _: usize) -> L {
        v
    }
    #[inline(always)]
    unsafe fn store(v: L, p: *mut f32) {
        // SAFETY: the caller's conditions.
        unsafe { v.store(p) }
    }
}

/// Products of bfloat16 pairs, by two fused multiply-adds of F32: the second element's, then the first's. That is what
/// `vdpbf16ps` does, except with subnormal numbers, which it takes for zero; the caller sees to it that there are none.
#[derive(Clone, Copy)]
pub(crate) struct WidenedPairs<L>(std::marker::PhantomData<L>);

impl<L: CacheLanes> Products for WidenedPairs<L> {
    type Acc = L;
    type Element = u16;
    /// First and second elements.
    type Vector = (L, L);
    type Step = (L, L);
    const STEP: usize = 2;

    #[inline(always)]
    unsafe fn load(p: *const u16) -> (L, L) {
        // SAFETY: the caller's conditions.
        unsafe {
            let pairs = p.cast::<[u32; LANES]>().read_unaligned();
            let (mut first, mut second) = ([0.0; LANES], [0.0; LANES]);
            for i in 0..LANES {
                first[i] = f32::from_bits(pairs[i] << 16);
                second[i] = f32::from_bits(pairs[i] & 0xFFFF_0000);
            }
            (L::load(first.as_ptr()), L::load(second.as_ptr()))
        }
    }
    #[inline(always)]
    unsafe fn splat(p: *const u16) -> (L, L) {
        // SAFETY: the caller's conditions.
        unsafe {
            let pair = p.cast::<u32>().read_unaligned();
            (L::splat(f32::from_bits(pair << 16)), L::splat(f32::from_bits(pair & 0xFFFF_0000)))
        }
    }
    #[inline(always)]
    unsafe fn dot(acc: L, v: (L, L), s: (L, L)) -> L {
        // SAFETY: the caller's conditions.
        unsafe { v.0.mul_add(s.0, v.1.mul_add(s.1, acc)) }
    }
    #[inline(always)]
    unsafe fn keep(v: (L, L), element: usize) -> (L, L) {
        // SAFETY: the caller's conditions.
        let zero = unsafe { L::splat(0.0) };
        if element == 0 { (v.0, zero) } else { (zero, v.1) }
    }
    #[inline(always)]
    unsafe fn store(v: L, p: *mut u16) {
        // SAFETY: the caller's conditions.
        unsafe { v.store_bf16(p) }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::Avx512Pairs;

/// Every method's safety is the traits' contract.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::super::x86::{Avx2, Avx512};
    use super::{CacheLanes, Products};

    #[inline(always)]
    unsafe fn prefetch<const FAR: bool>(p: *const u8) {
        // SAFETY: the caller's conditions.
        unsafe {
            if FAR {
                _mm_prefetch::<_MM_HINT_T1>(p.cast());
            } else {
                _mm_prefetch::<_MM_HINT_T0>(p.cast());
            }
        }
    }

    impl CacheLanes for Avx2 {
        #[inline(always)]
        unsafe fn prefetch<const FAR: bool>(p: *const u8) {
            // SAFETY: the trait's contract.
            unsafe { prefetch::<FAR>(p) }
        }
    }

    impl CacheLanes for Avx512 {
        #[inline(always)]
        unsafe fn prefetch<const FAR: bool>(p: *const u8) {
            // SAFETY: the trait's contract.
            unsafe { prefetch::<FAR>(p) }
        }
        #[inline(always)]
        unsafe fn zero_below(self, bound: f32) -> Self {
            // SAFETY: the trait's contract.
            unsafe {
                let kept = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(self.0, _mm512_set1_ps(bound));
                Self(_mm512_maskz_mov_ps(kept, self.0))
            }
        }
        #[inline(always)]
        unsafe fn zero_within(self, bound: f32) -> Self {
            // SAFETY: the trait's contract.
            unsafe {
                let magnitude = _mm512_abs_ps(self.0);
                let kept = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(magnitude, _mm512_set1_ps(bound));
                Self(_mm512_maskz_mov_ps(kept, self.0))
            }
        }
        #[inline(always)]
        unsafe fn largest(self) -> f32 {
            // SAFETY: the trait's contract.
            unsafe { _mm512_reduce_max_ps(self.0) }
        }
        #[inline(always)]
        unsafe fn store_pairs(low: Self, high: Self, p: *mut u16) {
            // SAFETY: the trait's contract.
            unsafe {
                let low = _mm512_srli_epi32::<16>(_mm512_castps_si512(low.0));
                let high = _mm512_castps_si512(high.0);
                // The odd words of `high`, the even ones of `low`.
                let pairs = _mm512_mask_mov_epi16(low, 0xAAAA_AAAA, high);
                _mm512_storeu_si512(p.cast(), pairs);
            }
        }
        #[inline(always)]
        unsafe fn from_bytes(p: *const i8) -> Self {
            // SAFETY: the trait's contract.
            Self(unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) })
        }
        #[inline(always)]
        unsafe fn from_nibble_bytes(p: *const u8, table: &[f32; 16]) -> (Self, Self) {
            // SAFETY: the trait's contract.
            unsafe {
                let table = _mm512_loadu_ps(table.as_ptr());
                // The permutation looks at an index's low four bits only.
                let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
                (
                    Self(_mm512_permutexvar_ps(bytes, table)),
                    Self(_mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), table)),
                )
            }
        }
    }

    /// Products of bfloat16 pairs by `vdpbf16ps`; needs AVX512_BF16.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512Pairs;

    impl Products for Avx512Pairs {
        type Acc = Avx512;
        type Element = u16;
        type Vector = __m512i;
        type Step = __m512i;
        const STEP: usize = 2;

        #[inline(always)]
        unsafe fn load(p: *const u16) -> __m512i {
            // SAFETY: the trait's contract.
            unsafe { _mm512_loadu_si512(p.cast()) }
        }
        #[inline(always)]
        unsafe fn splat(p: *const u16) -> __m512i {
            // SAFETY: the trait's contract.
            unsafe { _mm512_set1_epi32(p.cast::<i32>().read_unaligned()) }
        }
        #[inline(always)]
        unsafe fn dot(acc: Avx512, v: __m512i, s: __m512i) -> Avx512 {
            // SAFETY: the trait's contract.
            unsafe {
                let (v, s) = (
                    std::mem::transmute::<__m512i, __m512bh>(v),
                    std::mem::transmute::<__m512i, __m512bh>(s),
                );
                Avx512(_mm512_dpbf16_ps(acc.0, v, s))
            }
        }
        #[inline(always)]
        unsafe fn keep(v: __m512i, element: usize) -> __m512i {
            // SAFETY: the trait's contract.
            unsafe { _mm512_maskz_mov_epi16(if element == 0 { 0x5555_5555 } else { 0xAAAA_AAAA }, v) }
        }
        #[inline(always)]
        unsafe fn store(v: Avx512, p: *mut u16) {
            // SAFETY: the trait's contract.
            unsafe {
                let rounded = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v.0));
                _mm256_storeu_si256(p.cast(), rounded);
            }
        }
    }
}

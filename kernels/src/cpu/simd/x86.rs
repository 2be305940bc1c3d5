//! The x86-64 lanes. Every method's safety is the trait's contract.

use std::arch::x86_64::*;

use super::{HalfFields, LANES, Lanes};

/// One 512-bit register.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(pub(in crate::cpu) __m512);

/// Sixteen halves with the fields of `code` words placed by `fields`.
#[inline(always)]
unsafe fn place_fields(code: __m256i, fields: HalfFields) -> __m256i {
    // SAFETY: the caller's conditions.
    unsafe {
        let sign = _mm256_and_si256(
            _mm256_sll_epi16(code, _mm_cvtsi32_si128(16 - fields.bits as i32)),
            _mm256_set1_epi16(i16::MIN),
        );
        let mask = ((1u32 << (fields.bits - 1)) - 1) << fields.shift;
        let magnitude = _mm256_and_si256(
            _mm256_sll_epi16(code, _mm_cvtsi32_si128(fields.shift as i32)),
            _mm256_set1_epi16(mask as i16),
        );
        _mm256_or_si256(sign, magnitude)
    }
}

// Helpers are functions, not closures: a closure that is not inlined would lose the instruction set.
impl Avx512 {
    /// Sign-magnitude codes: bits 0..=3 from `low`, 4 (magnitude) and 5 (sign) from `high`.
    #[inline(always)]
    unsafe fn sextet(low: __m512i, high: __m512i, t0: __m512, t1: __m512) -> Self {
        // SAFETY: the caller's conditions.
        unsafe {
            // (low & 15) | (high & !15); the lookup takes bits 0..=4.
            let code = _mm512_ternarylogic_epi32::<0xCA>(_mm512_set1_epi32(15), low, high);
            let magnitude = _mm512_permutex2var_ps(t0, code, t1);
            // magnitude ^ (sign & top bit)
            Self(_mm512_castsi512_ps(_mm512_ternarylogic_epi32::<0x78>(
                _mm512_castps_si512(magnitude),
                _mm512_slli_epi32::<26>(code),
                _mm512_set1_epi32(i32::MIN),
            )))
        }
    }
}

impl Lanes for Avx512 {
    const REGISTERS: usize = 32;

    #[inline(always)]
    unsafe fn splat(v: f32) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_set1_ps(v) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the trait's contract.
        unsafe { _mm512_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_add_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_sub_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_mul_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_div_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_max_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_min_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0) })
    }
    #[inline(always)]
    unsafe fn mul_pow2(self, n: Self) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_scalef_ps(self.0, n.0) })
    }
    #[inline(always)]
    unsafe fn keep(self, from: usize, to: usize, fill: f32) -> Self {
        let (below_to, below_from) = ((1u32 << to.min(LANES)) - 1, (1u32 << from.min(LANES)) - 1);
        let inside = (below_to & !below_from) as u16;
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_mask_mov_ps(_mm512_set1_ps(fill), inside, self.0) })
    }
    #[inline(always)]
    unsafe fn from_bf16(p: *const u16) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        })
    }
    #[inline(always)]
    unsafe fn from_f16(p: *const u16) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) })
    }
    #[inline(always)]
    unsafe fn from_e8m0(p: *const u8) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe {
            let byte = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
            let normal = _mm512_slli_epi32::<23>(byte);
            // Byte 0 is the subnormal 2^-127; byte 255 is NaN where the shift makes Inf.
            let zero = _mm512_cmpeq_epi32_mask(byte, _mm512_setzero_si512());
            let nan = _mm512_cmpeq_epi32_mask(byte, _mm512_set1_epi32(255));
            let v = _mm512_mask_mov_epi32(normal, zero, _mm512_set1_epi32(1 << 22));
            let v = _mm512_mask_mov_epi32(v, nan, _mm512_set1_epi32(0x7FC0_0000));
            _mm512_castsi512_ps(v)
        })
    }
    #[inline(always)]
    unsafe fn from_fp8(p: *const u8, fields: HalfFields) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe {
            let code = _mm256_cvtepu8_epi16(_mm_loadu_si128(p.cast()));
            _mm512_mul_ps(_mm512_cvtph_ps(place_fields(code, fields)), _mm512_set1_ps(fields.factor))
        })
    }
    #[inline(always)]
    unsafe fn from_sextets(
        low: *const u32,
        half: usize,
        high: *const u32,
        pair: usize,
        table: &[f32; 32],
    ) -> [Self; 4] {
        // SAFETY: the trait's contract.
        unsafe {
            let (t0, t1) = (_mm512_loadu_ps(table.as_ptr()), _mm512_loadu_ps(table.as_ptr().add(16)));
            let low = _mm512_loadu_si512(low.cast());
            // Left by four: the pair of byte 0 comes to bits 4 and 5.
            let high = _mm512_rol_epi32::<4>(_mm512_loadu_si512(high.cast()));
            let mut quad = [Self(t0); 4];
            for (j, out) in quad.iter_mut().enumerate() {
                let low = _mm512_srl_epi32(low, _mm_cvtsi32_si128((8 * j + 4 * half) as i32));
                let high = _mm512_rorv_epi32(high, _mm512_set1_epi32((8 * j + 2 * pair) as i32));
                *out = Self::sextet(low, high, t0, t1);
            }
            quad
        }
    }
}

/// Two 256-bit registers, lanes 0..8 and 8..16.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(pub(in crate::cpu) __m256, pub(in crate::cpu) __m256);

impl Avx2 {
    #[inline(always)]
    unsafe fn from_halves(h: __m256i) -> Self {
        // SAFETY: the caller's conditions.
        unsafe {
            Self(
                _mm256_cvtph_ps(_mm256_castsi256_si128(h)),
                _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(h)),
            )
        }
    }

    #[inline(always)]
    unsafe fn pow2(n: __m256) -> __m256 {
        // SAFETY: the caller's conditions.
        unsafe {
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
        }
    }

    #[inline(always)]
    unsafe fn keep_half(v: __m256, first: i32, from: usize, to: usize, fill: f32) -> __m256 {
        // SAFETY: the caller's conditions.
        unsafe {
            let lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(first));
            let before = _mm256_cmpgt_epi32(_mm256_set1_epi32(from.min(LANES) as i32), lane);
            let inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(to.min(LANES) as i32), lane);
            let inside = _mm256_castsi256_ps(_mm256_andnot_si256(before, inside));
            _mm256_blendv_ps(_mm256_set1_ps(fill), v, inside)
        }
    }

    #[inline(always)]
    unsafe fn bf16_half(p: *const u16) -> __m256 {
        // SAFETY: the caller's conditions.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    unsafe fn e8m0_half(p: *const u8) -> __m256 {
        // SAFETY: the caller's conditions.
        unsafe {
            let byte = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
            let zero = _mm256_cmpeq_epi32(byte, _mm256_setzero_si256());
            let nan = _mm256_cmpeq_epi32(byte, _mm256_set1_epi32(255));
            let v = _mm256_slli_epi32::<23>(byte);
            let v = _mm256_blendv_epi8(v, _mm256_set1_epi32(1 << 22), zero);
            _mm256_castsi256_ps(_mm256_blendv_epi8(v, _mm256_set1_epi32(0x7FC0_0000), nan))
        }
    }

    /// Sign-magnitude codes: bits 0..=3 from `low`; 4 (magnitude) and 5 (sign) are bits 0 and 1 of `high`.
    #[inline(always)]
    unsafe fn sextet(low: __m256i, high: __m256i, table: &[f32; 32]) -> __m256 {
        // SAFETY: the caller's conditions.
        unsafe {
            let [t0, t1] = table.as_chunks::<16>().0 else { unreachable!("32 entries") };
            let (lower, upper) = (Self::lookup16(low, t0), Self::lookup16(low, t1));
            let bit4 = _mm256_castsi256_ps(_mm256_slli_epi32::<31>(high));
            let sign = _mm256_and_si256(_mm256_slli_epi32::<30>(high), _mm256_set1_epi32(i32::MIN));
            _mm256_xor_ps(_mm256_blendv_ps(lower, upper, bit4), _mm256_castsi256_ps(sign))
        }
    }

    #[inline(always)]
    unsafe fn lookup16(index: __m256i, table: &[f32; 16]) -> __m256 {
        // SAFETY: the caller's conditions.
        unsafe {
            let (t0, t1) = (_mm256_loadu_ps(table.as_ptr()), _mm256_loadu_ps(table.as_ptr().add(8)));
            // The permutation looks at an index's low three bits; bit 3 chooses the half of the table.
            let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index));
            _mm256_blendv_ps(_mm256_permutevar8x32_ps(t0, index), _mm256_permutevar8x32_ps(t1, index), upper)
        }
    }
}

macro_rules! both {
    ($a:expr, $b:expr, $f:ident) => {
        // SAFETY: the caller's conditions.
        Self(unsafe { $f($a.0, $b.0) }, unsafe { $f($a.1, $b.1) })
    };
}

impl Lanes for Avx2 {
    const REGISTERS: usize = 16;

    #[inline(always)]
    unsafe fn splat(v: f32) -> Self {
        // SAFETY: the trait's contract.
        let v = unsafe { _mm256_set1_ps(v) };
        Self(v, v)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the trait's contract.
        unsafe {
            _mm256_storeu_ps(p, self.0);
            _mm256_storeu_ps(p.add(8), self.1);
        }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self(_mm256_fmadd_ps(self.0, b.0, c.0), _mm256_fmadd_ps(self.1, b.1, c.1)) }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        both!(self, b, _mm256_add_ps)
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        both!(self, b, _mm256_sub_ps)
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        both!(self, b, _mm256_mul_ps)
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        both!(self, b, _mm256_div_ps)
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        both!(self, b, _mm256_max_ps)
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        both!(self, b, _mm256_min_ps)
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        // SAFETY: the trait's contract.
        unsafe { Self(_mm256_round_ps::<NEAREST>(self.0), _mm256_round_ps::<NEAREST>(self.1)) }
    }
    #[inline(always)]
    unsafe fn mul_pow2(self, n: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self(_mm256_mul_ps(self.0, Self::pow2(n.0)), _mm256_mul_ps(self.1, Self::pow2(n.1))) }
    }
    #[inline(always)]
    unsafe fn keep(self, from: usize, to: usize, fill: f32) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            Self(Self::keep_half(self.0, 0, from, to, fill), Self::keep_half(self.1, 8, from, to, fill))
        }
    }
    #[inline(always)]
    unsafe fn from_bf16(p: *const u16) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self(Self::bf16_half(p), Self::bf16_half(p.add(8))) }
    }
    #[inline(always)]
    unsafe fn from_f16(p: *const u16) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self::from_halves(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn from_e8m0(p: *const u8) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self(Self::e8m0_half(p), Self::e8m0_half(p.add(8))) }
    }
    #[inline(always)]
    unsafe fn from_fp8(p: *const u8, fields: HalfFields) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            let code = _mm256_cvtepu8_epi16(_mm_loadu_si128(p.cast()));
            Self::from_halves(place_fields(code, fields)).mul(Self::splat(fields.factor))
        }
    }
    #[inline(always)]
    unsafe fn from_sextets(
        low: *const u32,
        half: usize,
        high: *const u32,
        pair: usize,
        table: &[f32; 32],
    ) -> [Self; 4] {
        // SAFETY: the trait's contract.
        unsafe {
            let low = (_mm256_loadu_si256(low.cast()), _mm256_loadu_si256(low.add(8).cast()));
            let high = (_mm256_loadu_si256(high.cast()), _mm256_loadu_si256(high.add(8).cast()));
            let mut quad = [Self::splat(0.0); 4];
            for (j, out) in quad.iter_mut().enumerate() {
                let by_low = _mm_cvtsi32_si128((8 * j + 4 * half) as i32);
                let by_high = _mm_cvtsi32_si128((8 * j + 2 * pair) as i32);
                let upper = (_mm256_srl_epi32(high.0, by_high), _mm256_srl_epi32(high.1, by_high));
                *out = Self(
                    Self::sextet(_mm256_srl_epi32(low.0, by_low), upper.0, table),
                    Self::sextet(_mm256_srl_epi32(low.1, by_low), upper.1, table),
                );
            }
            quad
        }
    }
}

//! The x86-64 int8 dot products. Every method's safety is the trait's contract.

use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::dot::{Dot, DotWork};
use super::x86::{Avx2, Avx512};

/// [`Dot::prefetch`].
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

/// One 512-bit register; AVX-512 with VNNI and VBMI.
#[derive(Clone, Copy)]
pub(crate) struct Avx512Vnni(__m512i);

impl Dot for Avx512Vnni {
    type Float = Avx512;
    type Table = __m512i;
    const CODE_OFFSET: i32 = 64;
    const BYTE_OFFSET: i32 = 128;
    const ONE_DOT: bool = true;

    #[inline(always)]
    unsafe fn prefetch<const FAR: bool>(p: *const u8) {
        // SAFETY: the trait's contract.
        unsafe { prefetch::<FAR>(p) }
    }
    #[inline(always)]
    unsafe fn outlined<W: DotWork>(work: W) -> W::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c")]
        unsafe fn run<W: DotWork>(work: W) -> W::Output {
            // SAFETY: the trait's contract.
            unsafe { work.run::<Avx512Vnni>() }
        }
        // SAFETY: the trait's contract.
        unsafe { run(work) }
    }
    #[inline(always)]
    unsafe fn splat(v: i32) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_set1_epi32(v) })
    }
    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_loadu_si512(p.cast()) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut u8) {
        // SAFETY: the trait's contract.
        unsafe { _mm512_storeu_si512(p.cast(), self.0) }
    }
    #[inline(always)]
    unsafe fn table(bytes: &[u8; 64]) -> __m512i {
        // SAFETY: the trait's contract.
        unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
    }
    #[inline(always)]
    unsafe fn nibbles<const HIGH: bool>(self, table: __m512i) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            // The lookup takes six bits; the two above the nibble do not matter, since the table repeats.
            let code = if HIGH { _mm512_srli_epi16::<4>(self.0) } else { self.0 };
            Self(_mm512_permutexvar_epi8(code, table))
        }
    }
    #[inline(always)]
    unsafe fn sextets<const HIGH: bool, const PAIR: u32>(self, upper: Self, table: __m512i) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            let low = if HIGH { _mm512_srli_epi16::<4>(self.0) } else { self.0 };
            let upper = match PAIR {
                0 => _mm512_slli_epi16::<4>(upper.0),
                1 => _mm512_slli_epi16::<2>(upper.0),
                2 => upper.0,
                _ => _mm512_srli_epi16::<2>(upper.0),
            };
            // (low & 15) | (upper & !15); the lookup takes six bits.
            let code = _mm512_ternarylogic_epi32::<0xCA>(_mm512_set1_epi8(15), low, upper);
            Self(_mm512_permutexvar_epi8(code, table))
        }
    }
    #[inline(always)]
    unsafe fn raised_bytes(self) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_xor_si512(self.0, _mm512_set1_epi8(i8::MIN)) })
    }
    #[inline(always)]
    unsafe fn dot_codes(self, w: Self, x: Self) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_dpbusd_epi32(self.0, w.0, x.0) })
    }
    #[inline(always)]
    unsafe fn dot_bytes(self, w: Self, x: Self) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_dpbusd_epi32(self.0, w.0, x.0) })
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_add_epi32(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn as_floats(self) -> Avx512 {
        // SAFETY: the trait's contract.
        Avx512(unsafe { _mm512_castsi512_ps(self.0) })
    }
    #[inline(always)]
    unsafe fn nearest(v: Avx512) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_cvtps_epi32(v.0) })
    }
    #[inline(always)]
    unsafe fn binade(v: Avx512) -> Avx512 {
        // SAFETY: the trait's contract.
        Avx512(unsafe { _mm512_and_ps(v.0, _mm512_castsi512_ps(_mm512_set1_epi32(0x7F80_0000))) })
    }
    #[inline(always)]
    unsafe fn max_magnitude(p: *const f32) -> u32 {
        // SAFETY: the trait's contract.
        unsafe {
            let mask = _mm512_set1_epi32(i32::MAX);
            let a = _mm512_and_si512(_mm512_loadu_si512(p.cast()), mask);
            let b = _mm512_and_si512(_mm512_loadu_si512(p.add(16).cast()), mask);
            _mm512_reduce_max_epi32(_mm512_max_epi32(a, b)) as u32
        }
    }
    #[inline(always)]
    unsafe fn sum(self, b: Self) -> i32 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_reduce_add_epi32(_mm512_add_epi32(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn upper_byte(self) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { _mm512_srai_epi32::<8>(_mm512_add_epi32(self.0, _mm512_set1_epi32(128))) })
    }
    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut i8) {
        // SAFETY: the trait's contract.
        unsafe { _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(self.0)) }
    }
}

/// How bytes are multiplied in 256-bit registers.
///
/// # Safety
/// Every method: the processor has the instructions.
pub(crate) trait Multiply256: Copy {
    /// As [`Dot::BYTE_OFFSET`].
    const BYTE_OFFSET: i32;
    /// As [`Dot::ONE_DOT`].
    const ONE_DOT: bool;
    /// What raises two's complement bytes by the offset, by exclusive or.
    const FLIP: i8;

    /// As [`Dot::outlined`].
    unsafe fn outlined<W: DotWork>(work: W) -> W::Output;
    /// As [`Dot::dot_codes`].
    unsafe fn dot_codes(sum: __m256i, w: __m256i, x: __m256i) -> __m256i;
    /// As [`Dot::dot_bytes`].
    unsafe fn dot_bytes(sum: __m256i, w: __m256i, x: __m256i) -> __m256i;
}

/// AVX2: products of 16-bit pairs.
#[derive(Clone, Copy)]
pub(crate) struct Pairs;

impl Multiply256 for Pairs {
    const BYTE_OFFSET: i32 = 0;
    const ONE_DOT: bool = false;
    const FLIP: i8 = 0;

    #[inline(always)]
    unsafe fn outlined<W: DotWork>(work: W) -> W::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn run<W: DotWork>(work: W) -> W::Output {
            // SAFETY: the trait's contract.
            unsafe { work.run::<Dot256<Pairs>>() }
        }
        // SAFETY: the trait's contract.
        unsafe { run(work) }
    }

    /// `vpmaddubsw` adds two products in 16 bits, saturating. It cannot saturate here: a weight's byte is at most 128
    /// (64 raised by 64, E3M0's largest; the others stay below 125) and x at least -128, so a pair is within
    /// -2^15 ..= 2 * 128 * 127.
    #[inline(always)]
    unsafe fn dot_codes(sum: __m256i, w: __m256i, x: __m256i) -> __m256i {
        // SAFETY: the trait's contract.
        unsafe {
            let pairs = _mm256_maddubs_epi16(w, x);
            _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }

    /// Signed by signed bytes, in 16-bit halves: even bytes, then odd ones.
    #[inline(always)]
    unsafe fn dot_bytes(sum: __m256i, w: __m256i, x: __m256i) -> __m256i {
        // SAFETY: the trait's contract.
        unsafe {
            let (low_w, low_x) = (_mm256_slli_epi16::<8>(w), _mm256_slli_epi16::<8>(x));
            let evens = _mm256_madd_epi16(_mm256_srai_epi16::<8>(low_w), _mm256_srai_epi16::<8>(low_x));
            let odds = _mm256_madd_epi16(_mm256_srai_epi16::<8>(w), _mm256_srai_epi16::<8>(x));
            _mm256_add_epi32(sum, _mm256_add_epi32(evens, odds))
        }
    }
}

/// AVX-VNNI: `vpdpbusd`.
#[derive(Clone, Copy)]
pub(crate) struct Vnni;

impl Multiply256 for Vnni {
    const BYTE_OFFSET: i32 = 128;
    const ONE_DOT: bool = true;
    const FLIP: i8 = i8::MIN;

    #[inline(always)]
    unsafe fn outlined<W: DotWork>(work: W) -> W::Output {
        #[target_feature(enable = "avxvnni,avx2,fma,f16c")]
        unsafe fn run<W: DotWork>(work: W) -> W::Output {
            // SAFETY: the trait's contract.
            unsafe { work.run::<Dot256<Vnni>>() }
        }
        // SAFETY: the trait's contract.
        unsafe { run(work) }
    }
    #[inline(always)]
    unsafe fn dot_codes(sum: __m256i, w: __m256i, x: __m256i) -> __m256i {
        // SAFETY: the trait's contract.
        unsafe { _mm256_dpbusd_avx_epi32(sum, w, x) }
    }
    #[inline(always)]
    unsafe fn dot_bytes(sum: __m256i, w: __m256i, x: __m256i) -> __m256i {
        // SAFETY: the trait's contract.
        unsafe { _mm256_dpbusd_avx_epi32(sum, w, x) }
    }
}

/// Two 256-bit registers, lanes 0..8 and 8..16, multiplied by `M`.
#[derive(Clone, Copy)]
pub(crate) struct Dot256<M>(__m256i, __m256i, PhantomData<M>);

impl<M> Dot256<M> {
    #[inline(always)]
    const fn new(a: __m256i, b: __m256i) -> Self {
        Self(a, b, PhantomData)
    }

    #[inline(always)]
    unsafe fn sextet<const HIGH: bool, const PAIR: u32>(
        low: __m256i,
        upper: __m256i,
        table: (__m256i, __m256i),
    ) -> __m256i {
        // SAFETY: the caller's conditions.
        unsafe {
            let low = if HIGH { _mm256_srli_epi16::<4>(low) } else { low };
            let low = _mm256_and_si256(low, _mm256_set1_epi8(15));
            // Bits 4 and 5 of the code to the top of a byte, where the blends look.
            let (bit4, sign) = match PAIR {
                0 => (_mm256_slli_epi16::<7>(upper), _mm256_slli_epi16::<6>(upper)),
                1 => (_mm256_slli_epi16::<5>(upper), _mm256_slli_epi16::<4>(upper)),
                2 => (_mm256_slli_epi16::<3>(upper), _mm256_slli_epi16::<2>(upper)),
                _ => (_mm256_slli_epi16::<1>(upper), upper),
            };
            let magnitude = _mm256_blendv_epi8(
                _mm256_shuffle_epi8(table.0, low),
                _mm256_shuffle_epi8(table.1, low),
                bit4,
            );
            // Raised by 64: 64 - m = 128 - (64 + m).
            let negative = _mm256_sub_epi8(_mm256_set1_epi8(i8::MIN), magnitude);
            _mm256_blendv_epi8(magnitude, negative, sign)
        }
    }

    #[inline(always)]
    unsafe fn fold(a: __m256i, b: __m256i) -> [i32; 8] {
        let mut lanes = [0; 8];
        // SAFETY: the caller's conditions.
        unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), _mm256_add_epi32(a, b)) };
        lanes
    }

    #[inline(always)]
    unsafe fn low_bytes(v: __m256i) -> __m128i {
        // SAFETY: the caller's conditions.
        unsafe {
            let bytes = _mm256_shuffle_epi8(
                v,
                _mm256_broadcastsi128_si256(_mm_setr_epi8(
                    0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                )),
            );
            _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256::<1>(bytes))
        }
    }
}

impl<M: Multiply256> Dot for Dot256<M> {
    type Float = Avx2;
    type Table = (__m256i, __m256i);
    const CODE_OFFSET: i32 = 64;
    const BYTE_OFFSET: i32 = M::BYTE_OFFSET;
    const ONE_DOT: bool = M::ONE_DOT;

    #[inline(always)]
    unsafe fn prefetch<const FAR: bool>(p: *const u8) {
        // SAFETY: the trait's contract.
        unsafe { prefetch::<FAR>(p) }
    }
    #[inline(always)]
    unsafe fn outlined<W: DotWork>(work: W) -> W::Output {
        // SAFETY: the trait's contract.
        unsafe { M::outlined(work) }
    }
    #[inline(always)]
    unsafe fn splat(v: i32) -> Self {
        // SAFETY: the trait's contract.
        let v = unsafe { _mm256_set1_epi32(v) };
        Self::new(v, v)
    }
    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self::new(_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut u8) {
        // SAFETY: the trait's contract.
        unsafe {
            _mm256_storeu_si256(p.cast(), self.0);
            _mm256_storeu_si256(p.add(32).cast(), self.1);
        }
    }
    #[inline(always)]
    unsafe fn table(bytes: &[u8; 64]) -> Self::Table {
        // SAFETY: the trait's contract.
        unsafe {
            let [lower, upper, ..] = bytes.as_chunks::<16>().0 else { unreachable!("64 bytes") };
            (
                _mm256_broadcastsi128_si256(_mm_loadu_si128(lower.as_ptr().cast())),
                _mm256_broadcastsi128_si256(_mm_loadu_si128(upper.as_ptr().cast())),
            )
        }
    }
    #[inline(always)]
    unsafe fn nibbles<const HIGH: bool>(self, table: Self::Table) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            let (a, b) = if HIGH {
                (_mm256_srli_epi16::<4>(self.0), _mm256_srli_epi16::<4>(self.1))
            } else {
                (self.0, self.1)
            };
            let mask = _mm256_set1_epi8(15);
            Self::new(
                _mm256_shuffle_epi8(table.0, _mm256_and_si256(a, mask)),
                _mm256_shuffle_epi8(table.0, _mm256_and_si256(b, mask)),
            )
        }
    }
    #[inline(always)]
    unsafe fn sextets<const HIGH: bool, const PAIR: u32>(self, upper: Self, table: Self::Table) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            Self::new(
                Self::sextet::<HIGH, PAIR>(self.0, upper.0, table),
                Self::sextet::<HIGH, PAIR>(self.1, upper.1, table),
            )
        }
    }
    #[inline(always)]
    unsafe fn raised_bytes(self) -> Self {
        // SAFETY: the trait's contract.
        let flip = unsafe { _mm256_set1_epi8(M::FLIP) };
        // SAFETY: the trait's contract.
        unsafe { Self::new(_mm256_xor_si256(self.0, flip), _mm256_xor_si256(self.1, flip)) }
    }
    #[inline(always)]
    unsafe fn dot_codes(self, w: Self, x: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self::new(M::dot_codes(self.0, w.0, x.0), M::dot_codes(self.1, w.1, x.1)) }
    }
    #[inline(always)]
    unsafe fn dot_bytes(self, w: Self, x: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self::new(M::dot_bytes(self.0, w.0, x.0), M::dot_bytes(self.1, w.1, x.1)) }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self::new(_mm256_add_epi32(self.0, b.0), _mm256_add_epi32(self.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn as_floats(self) -> Avx2 {
        // SAFETY: the trait's contract.
        unsafe { Avx2(_mm256_castsi256_ps(self.0), _mm256_castsi256_ps(self.1)) }
    }
    #[inline(always)]
    unsafe fn nearest(v: Avx2) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self::new(_mm256_cvtps_epi32(v.0), _mm256_cvtps_epi32(v.1)) }
    }
    #[inline(always)]
    unsafe fn binade(v: Avx2) -> Avx2 {
        // SAFETY: the trait's contract.
        unsafe {
            let mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7F80_0000));
            Avx2(_mm256_and_ps(v.0, mask), _mm256_and_ps(v.1, mask))
        }
    }
    #[inline(always)]
    unsafe fn max_magnitude(p: *const f32) -> u32 {
        // SAFETY: the trait's contract.
        unsafe {
            let (a, b) = (Self::load(p.cast()), Self::load(p.add(16).cast()));
            let mask = _mm256_set1_epi32(i32::MAX);
            let a = _mm256_max_epi32(_mm256_and_si256(a.0, mask), _mm256_and_si256(a.1, mask));
            let b = _mm256_max_epi32(_mm256_and_si256(b.0, mask), _mm256_and_si256(b.1, mask));
            let v = _mm256_max_epi32(a, b);
            let v = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
            let v = _mm_max_epi32(v, _mm_shuffle_epi32::<0b01_00_11_10>(v));
            _mm_cvtsi128_si32(_mm_max_epi32(v, _mm_shuffle_epi32::<0b10_11_00_01>(v))) as u32
        }
    }
    #[inline(always)]
    unsafe fn sum(self, b: Self) -> i32 {
        // SAFETY: the trait's contract.
        unsafe {
            let (a, b) = (Self::fold(self.0, self.1), Self::fold(b.0, b.1));
            a.into_iter().chain(b).sum()
        }
    }
    #[inline(always)]
    unsafe fn upper_byte(self) -> Self {
        // SAFETY: the trait's contract.
        unsafe {
            let half = _mm256_set1_epi32(128);
            Self::new(
                _mm256_srai_epi32::<8>(_mm256_add_epi32(self.0, half)),
                _mm256_srai_epi32::<8>(_mm256_add_epi32(self.1, half)),
            )
        }
    }
    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut i8) {
        // SAFETY: the trait's contract.
        unsafe {
            _mm_storeu_si128(p.cast(), _mm_unpacklo_epi64(Self::low_bytes(self.0), Self::low_bytes(self.1)));
        }
    }
}

//! Sixteen float lanes on every instruction set.
//!
//! Kernels are written once over [`Lanes`]. Each implementation performs the same correctly rounded operation on the
//! same lane, so that every instruction set gives the same bits: a result depends on the kernel's order of
//! operations alone. The portable lanes are the definition.

/// Lanes of a [`Lanes`] value, and rows of a weight's row group.
pub(crate) const LANES: usize = 16;

/// Instruction sets with a [`Lanes`] implementation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Isa {
    /// AVX-512 F, BW, DQ, VL with F16C and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX2 with F16C and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// Plain Rust.
    Portable,
}

impl Isa {
    /// Instruction sets of this processor, best first; never empty.
    pub(crate) fn available() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
            {
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                {
                    found.push(Self::Avx512);
                }
                found.push(Self::Avx2);
            }
        }
        found.push(Self::Portable);
        found
    }

    /// Name for people and metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }
}

/// Defines `fn name(isa, args..)` that calls the generic `body::<L>(args..)` compiled for that instruction set.
macro_rules! dispatch {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $($body:tt)::+) => {
        $(#[$meta])*
        ///
        /// # Safety
        /// `isa` came from [`Isa::available`](crate::cpu::simd::Isa::available); the generic function's own
        /// conditions hold.
        #[allow(clippy::too_many_arguments, reason = "the generic function's arguments")]
        $vis unsafe fn $name(isa: $crate::cpu::simd::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments, reason = "the generic function's arguments")]
            unsafe fn avx512($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: the caller's conditions.
                unsafe { $($body)::+::<$crate::cpu::simd::x86::Avx512>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments, reason = "the generic function's arguments")]
            unsafe fn avx2($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: the caller's conditions.
                unsafe { $($body)::+::<$crate::cpu::simd::x86::Avx2>($($arg),*) }
            }
            match isa {
                // SAFETY: the processor has these instructions, since `isa` is available.
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::simd::Isa::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::simd::Isa::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: the caller's conditions.
                $crate::cpu::simd::Isa::Portable => unsafe {
                    $($body)::+::<$crate::cpu::simd::Portable>($($arg),*)
                },
            }
        }
    };
}
pub(crate) use dispatch;

/// Placement of a float format's fields in an IEEE half: the half's value is the element's times
/// `2^(bias - 15)`, subnormals included.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HalfFields {
    /// Bits of the code.
    pub(crate) bits: u32,
    /// Left shift that puts the magnitude's exponent and mantissa in place.
    pub(crate) shift: u32,
    /// `2^(15 - bias)`.
    pub(crate) factor: f32,
}

/// Sixteen `f32` lanes.
///
/// # Safety
/// Every method: the processor has the implementation's instructions, and pointers are valid for the
/// sixteen elements they are said to point to (no alignment needed).
pub(crate) trait Lanes: Copy {
    /// Vector registers of this instruction set; a tile of accumulators must fit.
    const REGISTERS: usize;
    /// All lanes `v`.
    unsafe fn splat(v: f32) -> Self;
    /// 16 floats.
    unsafe fn load(p: *const f32) -> Self;
    /// Stores 16 floats.
    unsafe fn store(self, p: *mut f32);
    /// `self * b + c`, rounded once.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
    /// Sum.
    unsafe fn add(self, b: Self) -> Self;
    /// Difference.
    unsafe fn sub(self, b: Self) -> Self;
    /// Product.
    unsafe fn mul(self, b: Self) -> Self;
    /// Quotient.
    unsafe fn div(self, b: Self) -> Self;
    /// Larger of the two; `b` where either is NaN.
    unsafe fn max(self, b: Self) -> Self;
    /// Smaller of the two; `b` where either is NaN.
    unsafe fn min(self, b: Self) -> Self;
    /// Nearest integer, ties to even.
    unsafe fn round(self) -> Self;
    /// `self * 2^n` for integral `n` in -126 ..= 127.
    unsafe fn mul_pow2(self, n: Self) -> Self;
    /// Lanes `i` with `from <= i < to` as they are, the others `fill`.
    unsafe fn keep(self, from: usize, to: usize, fill: f32) -> Self;
    /// 16 bfloat16.
    unsafe fn from_bf16(p: *const u16) -> Self;
    /// 16 IEEE halves.
    unsafe fn from_f16(p: *const u16) -> Self;
    /// Signed byte `index` of each of 16 words.
    unsafe fn from_i8(p: *const u32, index: usize) -> Self;
    /// 16 E8M0 bytes: 2^(b - 127), NaN for 255.
    unsafe fn from_e8m0(p: *const u8) -> Self;
    /// 16 FP8 codes whose fields are `fields`.
    unsafe fn from_fp8(p: *const u8, fields: HalfFields) -> Self;
    /// The four low (`half` 0) or high (`half` 1) nibbles of 16 words' bytes, through `table`.
    unsafe fn from_nibbles(p: *const u32, half: usize, table: &[f32; 16]) -> [Self; 4];
    /// 6-bit sign-magnitude codes: bits 0..=3 are the nibbles as in [`from_nibbles`](Self::from_nibbles) of `low`, bits
    /// 4 and 5 bits `2 * pair` and `2 * pair + 1` of the bytes of `high`. `table` has the 32 magnitudes.
    unsafe fn from_sextets(
        low: *const u32,
        half: usize,
        high: *const u32,
        pair: usize,
        table: &[f32; 32],
    ) -> [Self; 4];

    /// The lanes as an array.
    #[inline(always)]
    unsafe fn to_array(self) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        // SAFETY: the array has 16 elements.
        unsafe { self.store(out.as_mut_ptr()) };
        out
    }

    /// Sum of the lanes, as a tree: i + (i + 8), then 4, 2, 1.
    #[inline(always)]
    unsafe fn reduce_add(self) -> f32 {
        // SAFETY: the caller's conditions.
        let mut v = unsafe { self.to_array() };
        let mut width = LANES / 2;
        while width > 0 {
            for i in 0..width {
                v[i] += v[i + width];
            }
            width /= 2;
        }
        v[0]
    }

    /// Largest lane.
    #[inline(always)]
    unsafe fn reduce_max(self) -> f32 {
        // SAFETY: the caller's conditions.
        unsafe { self.to_array() }.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    /// e^self to 2 ulp, for inputs clamped to -87 ..= 88: argument reduction by ln 2 in two parts, then a polynomial
    /// of degree 6 (Cephes `expf`).
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        // SAFETY: the caller's conditions.
        unsafe {
            // `max` and `min` return their second operand where one is NaN: NaN stays NaN.
            let x = Self::splat(88.0).min(Self::splat(-87.0).max(self));
            let n = x.mul(Self::splat(std::f32::consts::LOG2_E)).round();
            let r = n.mul_add(Self::splat(-0.693_359_4), x);
            let r = n.mul_add(Self::splat(2.121_944_4e-4), r);
            let mut p = Self::splat(1.987_569_2e-4);
            for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
                p = p.mul_add(r, Self::splat(c));
            }
            let y = p.mul_add(r.mul(r), r).add(Self::splat(1.0));
            y.mul_pow2(n)
        }
    }
}

/// The defining lanes: plain Rust.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; LANES]);

impl Portable {
    #[inline(always)]
    fn map2(self, b: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], b.0[i])))
    }
}

#[inline(always)]
fn half_bits(code: u16, fields: HalfFields) -> u16 {
    let sign = (code >> (fields.bits - 1)) & 1;
    let magnitude = code & ((1 << (fields.bits - 1)) - 1);
    sign << 15 | magnitude << fields.shift
}

// Bodies are safe or deref pointers as the trait's contract allows.
impl Lanes for Portable {
    const REGISTERS: usize = 16;

    #[inline(always)]
    unsafe fn splat(v: f32) -> Self {
        Self([v; LANES])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { p.cast::<[f32; LANES]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<[f32; LANES]>().write_unaligned(self.0) };
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i].mul_add(b.0[i], c.0[i])))
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        self.map2(b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        self.map2(b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        self.map2(b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        self.map2(b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        self.map2(b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        self.map2(b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        Self(self.0.map(f32::round_ties_even))
    }
    #[inline(always)]
    unsafe fn mul_pow2(self, n: Self) -> Self {
        self.map2(n, |a, n| a * f32::from_bits(((n as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn keep(self, from: usize, to: usize, fill: f32) -> Self {
        Self(std::array::from_fn(|i| if from <= i && i < to { self.0[i] } else { fill }))
    }
    #[inline(always)]
    unsafe fn from_bf16(p: *const u16) -> Self {
        // SAFETY: the trait's contract.
        let v = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        Self(v.map(|b| f32::from_bits(u32::from(b) << 16)))
    }
    #[inline(always)]
    unsafe fn from_f16(p: *const u16) -> Self {
        // SAFETY: the trait's contract.
        let v = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        Self(v.map(|b| half::f16::from_bits(b).to_f32()))
    }
    #[inline(always)]
    unsafe fn from_i8(p: *const u32, index: usize) -> Self {
        // SAFETY: the trait's contract.
        let v = unsafe { p.cast::<[[i8; 4]; LANES]>().read_unaligned() };
        Self(v.map(|bytes| f32::from(bytes[index])))
    }
    #[inline(always)]
    unsafe fn from_e8m0(p: *const u8) -> Self {
        // SAFETY: the trait's contract.
        let v = unsafe { p.cast::<[u8; LANES]>().read_unaligned() };
        Self(v.map(|b| crate::mx::E8m0(b).to_f32()))
    }
    #[inline(always)]
    unsafe fn from_fp8(p: *const u8, fields: HalfFields) -> Self {
        // SAFETY: the trait's contract.
        let v = unsafe { p.cast::<[u8; LANES]>().read_unaligned() };
        Self(v.map(|c| half::f16::from_bits(half_bits(c.into(), fields)).to_f32() * fields.factor))
    }
    #[inline(always)]
    unsafe fn from_nibbles(p: *const u32, half: usize, table: &[f32; 16]) -> [Self; 4] {
        // SAFETY: the trait's contract.
        let v = unsafe { p.cast::<[[u8; 4]; LANES]>().read_unaligned() };
        std::array::from_fn(|j| Self(v.map(|bytes| table[usize::from(bytes[j] >> (4 * half)) & 15])))
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
        let (low, high) = unsafe {
            (
                low.cast::<[[u8; 4]; LANES]>().read_unaligned(),
                high.cast::<[[u8; 4]; LANES]>().read_unaligned(),
            )
        };
        std::array::from_fn(|j| {
            Self(std::array::from_fn(|i| {
                let upper = usize::from(high[i][j] >> (2 * pair)) & 3;
                let code = usize::from(low[i][j] >> (4 * half)) & 15 | upper << 4;
                let magnitude = table[code & 31];
                if code & 32 == 0 { magnitude } else { -magnitude }
            }))
        })
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod x86 {
    //! The x86-64 lanes. Every method's safety is the trait's contract.
    #![allow(
        clippy::undocumented_unsafe_blocks,
        reason = "each block relies on the contract of `Lanes` alone"
    )]

    use std::arch::x86_64::*;

    use super::{HalfFields, LANES, Lanes};

    /// One 512-bit register.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(pub(in crate::cpu) __m512);

    /// Sixteen halves with the fields of `code` words placed by `fields`.
    #[inline(always)]
    unsafe fn place_fields(code: __m256i, fields: HalfFields) -> __m256i {
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
            Self(unsafe { _mm512_set1_ps(v) })
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self {
            Self(unsafe { _mm512_loadu_ps(p) })
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            unsafe { _mm512_storeu_ps(p, self.0) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, b: Self, c: Self) -> Self {
            Self(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
        }
        #[inline(always)]
        unsafe fn add(self, b: Self) -> Self {
            Self(unsafe { _mm512_add_ps(self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn sub(self, b: Self) -> Self {
            Self(unsafe { _mm512_sub_ps(self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn mul(self, b: Self) -> Self {
            Self(unsafe { _mm512_mul_ps(self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn div(self, b: Self) -> Self {
            Self(unsafe { _mm512_div_ps(self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn max(self, b: Self) -> Self {
            Self(unsafe { _mm512_max_ps(self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn min(self, b: Self) -> Self {
            Self(unsafe { _mm512_min_ps(self.0, b.0) })
        }
        #[inline(always)]
        unsafe fn round(self) -> Self {
            Self(unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0) })
        }
        #[inline(always)]
        unsafe fn mul_pow2(self, n: Self) -> Self {
            Self(unsafe { _mm512_scalef_ps(self.0, n.0) })
        }
        #[inline(always)]
        unsafe fn keep(self, from: usize, to: usize, fill: f32) -> Self {
            let (below_to, below_from) = ((1u32 << to.min(LANES)) - 1, (1u32 << from.min(LANES)) - 1);
            let inside = (below_to & !below_from) as u16;
            Self(unsafe { _mm512_mask_mov_ps(_mm512_set1_ps(fill), inside, self.0) })
        }
        #[inline(always)]
        unsafe fn from_bf16(p: *const u16) -> Self {
            Self(unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
            })
        }
        #[inline(always)]
        unsafe fn from_f16(p: *const u16) -> Self {
            Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) })
        }
        #[inline(always)]
        unsafe fn from_i8(p: *const u32, index: usize) -> Self {
            Self(unsafe {
                let shift = _mm_cvtsi32_si128(24 - 8 * index as i32);
                let top = _mm512_sll_epi32(_mm512_loadu_si512(p.cast()), shift);
                _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(top))
            })
        }
        #[inline(always)]
        unsafe fn from_e8m0(p: *const u8) -> Self {
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
            Self(unsafe {
                let code = _mm256_cvtepu8_epi16(_mm_loadu_si128(p.cast()));
                _mm512_mul_ps(_mm512_cvtph_ps(place_fields(code, fields)), _mm512_set1_ps(fields.factor))
            })
        }
        #[inline(always)]
        unsafe fn from_nibbles(p: *const u32, half: usize, table: &[f32; 16]) -> [Self; 4] {
            unsafe {
                let table = _mm512_loadu_ps(table.as_ptr());
                let w = _mm512_loadu_si512(p.cast());
                let mut quad = [Self(table); 4];
                for (j, out) in quad.iter_mut().enumerate() {
                    // The permutation looks at an index's low four bits only.
                    let shift = _mm_cvtsi32_si128((8 * j + 4 * half) as i32);
                    *out = Self(_mm512_permutexvar_ps(_mm512_srl_epi32(w, shift), table));
                }
                quad
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
    pub(crate) struct Avx2(__m256, __m256);

    impl Avx2 {
        #[inline(always)]
        unsafe fn from_halves(h: __m256i) -> Self {
            unsafe {
                Self(
                    _mm256_cvtph_ps(_mm256_castsi256_si128(h)),
                    _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(h)),
                )
            }
        }

        #[inline(always)]
        unsafe fn pow2(n: __m256) -> __m256 {
            unsafe {
                let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
            }
        }

        #[inline(always)]
        unsafe fn keep_half(v: __m256, first: i32, from: usize, to: usize, fill: f32) -> __m256 {
            unsafe {
                let lane =
                    _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(first));
                let before = _mm256_cmpgt_epi32(_mm256_set1_epi32(from.min(LANES) as i32), lane);
                let inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(to.min(LANES) as i32), lane);
                let inside = _mm256_castsi256_ps(_mm256_andnot_si256(before, inside));
                _mm256_blendv_ps(_mm256_set1_ps(fill), v, inside)
            }
        }

        #[inline(always)]
        unsafe fn bf16_half(p: *const u16) -> __m256 {
            unsafe {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            }
        }

        #[inline(always)]
        unsafe fn e8m0_half(p: *const u8) -> __m256 {
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
            unsafe {
                let (t0, t1) = (_mm256_loadu_ps(table.as_ptr()), _mm256_loadu_ps(table.as_ptr().add(8)));
                // The permutation looks at an index's low three bits; bit 3 chooses the half of the table.
                let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index));
                _mm256_blendv_ps(
                    _mm256_permutevar8x32_ps(t0, index),
                    _mm256_permutevar8x32_ps(t1, index),
                    upper,
                )
            }
        }
    }

    macro_rules! both {
        ($a:expr, $b:expr, $f:ident) => {
            Self(unsafe { $f($a.0, $b.0) }, unsafe { $f($a.1, $b.1) })
        };
    }

    impl Lanes for Avx2 {
        const REGISTERS: usize = 16;

        #[inline(always)]
        unsafe fn splat(v: f32) -> Self {
            let v = unsafe { _mm256_set1_ps(v) };
            Self(v, v)
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self {
            unsafe { Self(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            unsafe {
                _mm256_storeu_ps(p, self.0);
                _mm256_storeu_ps(p.add(8), self.1);
            }
        }
        #[inline(always)]
        unsafe fn mul_add(self, b: Self, c: Self) -> Self {
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
            unsafe { Self(_mm256_round_ps::<NEAREST>(self.0), _mm256_round_ps::<NEAREST>(self.1)) }
        }
        #[inline(always)]
        unsafe fn mul_pow2(self, n: Self) -> Self {
            unsafe { Self(_mm256_mul_ps(self.0, Self::pow2(n.0)), _mm256_mul_ps(self.1, Self::pow2(n.1))) }
        }
        #[inline(always)]
        unsafe fn keep(self, from: usize, to: usize, fill: f32) -> Self {
            unsafe {
                Self(Self::keep_half(self.0, 0, from, to, fill), Self::keep_half(self.1, 8, from, to, fill))
            }
        }
        #[inline(always)]
        unsafe fn from_bf16(p: *const u16) -> Self {
            unsafe { Self(Self::bf16_half(p), Self::bf16_half(p.add(8))) }
        }
        #[inline(always)]
        unsafe fn from_f16(p: *const u16) -> Self {
            unsafe { Self::from_halves(_mm256_loadu_si256(p.cast())) }
        }
        #[inline(always)]
        unsafe fn from_i8(p: *const u32, index: usize) -> Self {
            unsafe {
                let shift = _mm_cvtsi32_si128(24 - 8 * index as i32);
                let lo = _mm256_sll_epi32(_mm256_loadu_si256(p.cast()), shift);
                let hi = _mm256_sll_epi32(_mm256_loadu_si256(p.add(8).cast()), shift);
                Self(
                    _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(lo)),
                    _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(hi)),
                )
            }
        }
        #[inline(always)]
        unsafe fn from_e8m0(p: *const u8) -> Self {
            unsafe { Self(Self::e8m0_half(p), Self::e8m0_half(p.add(8))) }
        }
        #[inline(always)]
        unsafe fn from_fp8(p: *const u8, fields: HalfFields) -> Self {
            unsafe {
                let code = _mm256_cvtepu8_epi16(_mm_loadu_si128(p.cast()));
                Self::from_halves(place_fields(code, fields)).mul(Self::splat(fields.factor))
            }
        }
        #[inline(always)]
        unsafe fn from_nibbles(p: *const u32, half: usize, table: &[f32; 16]) -> [Self; 4] {
            unsafe {
                let (lo, hi) = (_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(8).cast()));
                let mut quad = [Self::splat(0.0); 4];
                for (j, out) in quad.iter_mut().enumerate() {
                    let shift = _mm_cvtsi32_si128((8 * j + 4 * half) as i32);
                    *out = Self(
                        Self::lookup16(_mm256_srl_epi32(lo, shift), table),
                        Self::lookup16(_mm256_srl_epi32(hi, shift), table),
                    );
                }
                quad
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
}

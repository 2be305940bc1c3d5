//! Sixteen float lanes on every instruction set.
//!
//! Kernels are written once over [`Lanes`]. Each implementation performs the same correctly rounded operation on the
//! same lane, so that every instruction set gives the same bits: a result depends on the kernel's order of
//! operations alone. The portable lanes are the definition.

/// Lanes of a [`Lanes`] value, and rows of a weight's row group.
pub(crate) const LANES: usize = 16;

/// Defines `fn name(isa, args..)` that calls the generic `body::<L>(args..)` compiled for that instruction set.
macro_rules! dispatch {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $($body:tt)::+) => {
        $(#[$meta])*
        ///
        /// # Safety
        /// `isa` [is available](crate::isa::Isa::is_available); the generic function's own
        /// conditions hold.
        #[allow(clippy::too_many_arguments, reason = "the generic function's arguments")]
        $vis unsafe fn $name(isa: $crate::isa::Isa, $($arg: $ty),*) $(-> $ret)? {
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
                $crate::isa::Isa::Avx512Vnni | $crate::isa::Isa::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::isa::Isa::AvxVnni | $crate::isa::Isa::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: as above; Advanced SIMD is part of the target, there is nothing to enable.
                #[cfg(target_arch = "aarch64")]
                $crate::isa::Isa::NeonDot | $crate::isa::Isa::Neon => unsafe {
                    $($body)::+::<$crate::cpu::simd::neon::Neon>($($arg),*)
                },
                // SAFETY: the caller's conditions.
                $crate::isa::Isa::Portable => unsafe {
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
    /// 16 E8M0 bytes: 2^(b - 127), NaN for 255.
    unsafe fn from_e8m0(p: *const u8) -> Self;
    /// 16 FP8 codes whose fields are `fields`.
    unsafe fn from_fp8(p: *const u8, fields: HalfFields) -> Self;
    /// Four 6-bit sign-magnitude codes of each word: bits 0..=3 are the low (`half` 0) or high nibbles of `low`'s bytes, bits
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
pub(crate) struct Portable(pub(in crate::cpu) [f32; LANES]);

impl Portable {
    #[inline(always)]
    fn map2(self, b: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], b.0[i])))
    }
}

/// Bits of the IEEE half that holds `code`'s fields.
#[inline(always)]
pub(crate) fn half_bits(code: u16, fields: HalfFields) -> u16 {
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

pub(crate) mod dot;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
#[cfg(target_arch = "aarch64")]
mod neon_dot;
pub(crate) mod pairs;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86;
#[cfg(target_arch = "x86_64")]
mod x86_dot;

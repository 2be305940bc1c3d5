//! Sixteen lanes of int8 dot products on every instruction set.
//!
//! As with [`Lanes`], kernels are written once over [`Dot`]. Integer sums are exact (they wrap, and end inside 32 bits),
//! so that every instruction set gives the same bits however it multiplies.

#[cfg(target_arch = "x86_64")]
use super::x86_dot::{Avx2Dot, Avx512Vnni};
use super::{Isa, LANES, Lanes, Portable};

/// Work that is written over [`Dot`].
pub(crate) trait DotWork {
    /// Its result.
    type Output;

    /// Does the work; `#[inline(always)]` in every implementation, since the caller's instruction set reaches only what
    /// is inlined into it.
    ///
    /// # Safety
    /// The processor has the instructions of `D`, and what the work says.
    unsafe fn run<D: Dot>(self) -> Self::Output;
}

impl Isa {
    /// Does `work` on this instruction set.
    ///
    /// # Safety
    /// `self` came from [`Isa::available`]; the work's own conditions hold.
    pub(crate) unsafe fn dot<W: DotWork>(self, work: W) -> W::Output {
        // SAFETY: the processor has the instructions, since `self` is available.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Self::Avx512Vnni => Avx512Vnni::outlined(work),
                // AVX-512 has AVX2.
                #[cfg(target_arch = "x86_64")]
                Self::Avx512 | Self::Avx2 => Avx2Dot::outlined(work),
                Self::Portable => PortableDot::outlined(work),
            }
        }
    }
}

/// Sixteen 32-bit lanes: sums, or four bytes each.
///
/// A weight's bytes are its integers plus an offset, where the instructions want one operand without sign:
/// [`CODE_OFFSET`](Self::CODE_OFFSET) for weights of 4 and 6 bits, [`BYTE_OFFSET`](Self::BYTE_OFFSET) for whole bytes.
///
/// # Safety
/// Every method: the processor has the implementation's instructions, and pointers are valid for what they are said to
/// point to (no alignment needed).
pub(crate) trait Dot: Copy {
    /// The float lanes beside these.
    type Float: Lanes;
    /// Table of [`nibbles`](Self::nibbles) and [`sextets`](Self::sextets).
    type Table: Copy;
    /// What the bytes of 4- and 6-bit weights are raised by.
    const CODE_OFFSET: i32;
    /// What the bytes of 8-bit weights are raised by.
    const BYTE_OFFSET: i32;
    /// Whether [`dot_bytes`](Self::dot_bytes) is [`dot_codes`](Self::dot_codes).
    const ONE_DOT: bool;

    /// Asks for the cache line at `p`, which may point anywhere, into the second (`FAR`) or the first cache.
    unsafe fn prefetch<const FAR: bool>(p: *const u8);
    /// Runs `work` as a function of its own, compiled for these instructions.
    unsafe fn outlined<W: DotWork>(work: W) -> W::Output;

    /// All lanes `v`.
    unsafe fn splat(v: i32) -> Self;
    /// 16 words.
    unsafe fn load(p: *const u8) -> Self;
    /// The table of 64 bytes; those behind 16 repeat the first 16 where codes have four bits.
    unsafe fn table(bytes: &[u8; 64]) -> Self::Table;
    /// The low (`HIGH` false) or high nibble of each byte of `self` through `table`.
    unsafe fn nibbles<const HIGH: bool>(self, table: Self::Table) -> Self;
    /// 6-bit sign-magnitude codes through `table`: bits 0..=3 from the low or high nibbles of `self`, bits 4 and 5 from
    /// bits `2 PAIR` and `2 PAIR + 1` of the bytes of `upper`. Entry 32 + m is minus entry m.
    unsafe fn sextets<const HIGH: bool, const PAIR: u32>(self, upper: Self, table: Self::Table) -> Self;
    /// Two's complement bytes, raised.
    unsafe fn raised_bytes(self) -> Self;
    /// `self[i] + sum_j w[i][j] * x[i][j]` over the four bytes of 4- or 6-bit weights and of signed `x`.
    unsafe fn dot_codes(self, w: Self, x: Self) -> Self;
    /// As [`dot_codes`](Self::dot_codes), for 8-bit weights.
    unsafe fn dot_bytes(self, w: Self, x: Self) -> Self;
    /// The lanes' bits as floats.
    unsafe fn as_floats(self) -> Self::Float;

    /// Nearest integers, ties to even, of values within 2^22.
    unsafe fn nearest(v: Self::Float) -> Self;
    /// Largest power of two at or below each magnitude; 0 below the normal ones.
    unsafe fn binade(v: Self::Float) -> Self::Float;
    /// Largest magnitude of 32 floats, as the bits of an F32: NaN and infinities are above all finite values.
    unsafe fn max_magnitude(p: *const f32) -> u32;
    /// Sum of two vectors' lanes.
    unsafe fn sum(self, b: Self) -> i32;
    /// `(self + 128) >> 8`.
    unsafe fn upper_byte(self) -> Self;
    /// Low byte of each lane.
    unsafe fn store_bytes(self, p: *mut i8);
}

/// The defining lanes: plain Rust, signed by signed.
#[derive(Clone, Copy)]
pub(crate) struct PortableDot([i32; LANES]);

impl PortableDot {
    #[inline(always)]
    fn map_bytes(self, f: impl Fn(u8) -> u8) -> Self {
        Self(self.0.map(|word| i32::from_le_bytes(word.to_le_bytes().map(&f))))
    }
}

// Bodies are safe or deref pointers as the trait's contract allows.
impl Dot for PortableDot {
    type Float = Portable;
    type Table = [u8; 64];
    const CODE_OFFSET: i32 = 0;
    const BYTE_OFFSET: i32 = 0;
    const ONE_DOT: bool = true;

    #[inline(always)]
    unsafe fn prefetch<const FAR: bool>(_: *const u8) {}
    #[inline(never)]
    unsafe fn outlined<W: DotWork>(work: W) -> W::Output {
        // SAFETY: the caller's conditions.
        unsafe { work.run::<Self>() }
    }
    #[inline(always)]
    unsafe fn splat(v: i32) -> Self {
        Self([v; LANES])
    }
    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self {
        // SAFETY: the trait's contract.
        Self(unsafe { p.cast::<[i32; LANES]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn table(bytes: &[u8; 64]) -> [u8; 64] {
        *bytes
    }
    #[inline(always)]
    unsafe fn nibbles<const HIGH: bool>(self, table: [u8; 64]) -> Self {
        self.map_bytes(|b| table[usize::from(if HIGH { b >> 4 } else { b & 15 })])
    }
    #[inline(always)]
    unsafe fn sextets<const HIGH: bool, const PAIR: u32>(self, upper: Self, table: [u8; 64]) -> Self {
        Self(std::array::from_fn(|i| {
            let (low, upper) = (self.0[i].to_le_bytes(), upper.0[i].to_le_bytes());
            i32::from_le_bytes(std::array::from_fn(|j| {
                let low = if HIGH { low[j] >> 4 } else { low[j] & 15 };
                table[usize::from(low | (upper[j] >> (2 * PAIR) & 3) << 4)]
            }))
        }))
    }
    #[inline(always)]
    unsafe fn raised_bytes(self) -> Self {
        self
    }
    #[inline(always)]
    unsafe fn dot_codes(self, w: Self, x: Self) -> Self {
        Self(std::array::from_fn(|i| {
            let pairs = w.0[i].to_le_bytes().into_iter().zip(x.0[i].to_le_bytes());
            pairs.fold(self.0[i], |sum, (w, x)| sum.wrapping_add(i32::from(w as i8) * i32::from(x as i8)))
        }))
    }
    #[inline(always)]
    unsafe fn dot_bytes(self, w: Self, x: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { self.dot_codes(w, x) }
    }
    #[inline(always)]
    unsafe fn as_floats(self) -> Portable {
        Portable(self.0.map(|bits| f32::from_bits(bits as u32)))
    }
    #[inline(always)]
    unsafe fn nearest(v: Portable) -> Self {
        Self(v.0.map(|v| v.round_ties_even() as i32))
    }
    #[inline(always)]
    unsafe fn binade(v: Portable) -> Portable {
        Portable(v.0.map(|v| f32::from_bits(v.to_bits() & 0x7F80_0000)))
    }
    #[inline(always)]
    unsafe fn max_magnitude(p: *const f32) -> u32 {
        // SAFETY: the trait's contract.
        let v = unsafe { p.cast::<[u32; 2 * LANES]>().read_unaligned() };
        v.into_iter().fold(0, |max, bits| max.max(bits & 0x7FFF_FFFF))
    }
    #[inline(always)]
    unsafe fn sum(self, b: Self) -> i32 {
        self.0.into_iter().chain(b.0).sum()
    }
    #[inline(always)]
    unsafe fn upper_byte(self) -> Self {
        Self(self.0.map(|v| (v + 128) >> 8))
    }
    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut i8) {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<[i8; LANES]>().write_unaligned(self.0.map(|v| v as i8)) };
    }
}

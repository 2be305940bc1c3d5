//! Sixteen lanes of int8 dot products on every instruction set.
//!
//! As with [`Lanes`], kernels are written once over [`Dot`]. Integer sums are exact (they wrap, and end inside 32 bits),
//! so that every instruction set gives the same bits however it multiplies.

#[cfg(target_arch = "aarch64")]
use super::neon_dot::NeonDot;
#[cfg(target_arch = "x86_64")]
use super::x86_dot::{Avx512Vnni, Dot256, Pairs, Vnni};
use super::{LANES, Lanes, Portable};
use crate::isa::Isa;

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
    /// `self` [is available](Isa::is_available); the work's own conditions hold.
    pub(crate) unsafe fn dot<W: DotWork>(self, work: W) -> W::Output {
        // SAFETY: the processor has the instructions, since `self` is available.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Self::Avx512Vnni => Avx512Vnni::outlined(work),
                #[cfg(target_arch = "x86_64")]
                Self::AvxVnni => Dot256::<Vnni>::outlined(work),
                // AVX-512 has AVX2.
                #[cfg(target_arch = "x86_64")]
                Self::Avx512 | Self::Avx2 => Dot256::<Pairs>::outlined(work),
                #[cfg(target_arch = "aarch64")]
                Self::NeonDot => NeonDot::<true>::outlined(work),
                #[cfg(target_arch = "aarch64")]
                Self::Neon => NeonDot::<false>::outlined(work),
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
    /// Writes the 16 words.
    unsafe fn store(self, p: *mut u8);
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
    /// Sums, wrapping.
    unsafe fn add(self, b: Self) -> Self;
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
    unsafe fn store(self, p: *mut u8) {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<[i32; LANES]>().write_unaligned(self.0) };
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
    unsafe fn add(self, b: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i].wrapping_add(b.0[i])))
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What every method makes of some bytes, offsets taken away.
    struct Everything<'a> {
        words: &'a [[u8; 64]; 3],
        x: &'a [i8; 64],
    }

    impl DotWork for Everything<'_> {
        type Output = Vec<i32>;

        #[inline(always)]
        unsafe fn run<D: Dot>(self) -> Vec<i32> {
            // Magnitudes to 60 in both halves, as E2M3 has them.
            let signed: [i8; 64] =
                std::array::from_fn(|c| (c % 32 * 60 / 31) as i8 * if c < 32 { 1 } else { -1 });
            // To 64, as E3M0 has them.
            let nibbles: [i8; 64] = std::array::from_fn(|c| [64, 1, 7, 0, -64, -1, -13, 32][c % 8]);
            // SAFETY: the caller's conditions; arrays have what is read.
            unsafe {
                let table = D::table(&signed.map(|v| (i32::from(v) + D::CODE_OFFSET) as u8));
                let nibbles = D::table(&nibbles.map(|v| (i32::from(v) + D::CODE_OFFSET) as u8));
                let [a, b, bytes] = self.words.each_ref().map(|words| D::load(words.as_ptr()));
                let x = D::load(self.x.as_ptr().cast());
                let zero = D::splat(0);
                let codes = [
                    a.nibbles::<false>(nibbles),
                    a.nibbles::<true>(nibbles),
                    a.sextets::<false, 0>(b, table),
                    a.sextets::<true, 1>(b, table),
                    a.sextets::<false, 2>(b, table),
                    a.sextets::<true, 3>(b, table),
                ];
                let mut out = Vec::new();
                let sums =
                    self.x.as_chunks::<4>().0.iter().map(|x| x.iter().map(|&x| i32::from(x)).sum::<i32>());
                let sums: Vec<i32> = sums.collect();
                for code in codes {
                    let lanes = lanes::<D>(D::splat(-7).dot_codes(code, x));
                    out.extend(lanes.iter().zip(&sums).map(|(lane, sum)| lane - D::CODE_OFFSET * sum));
                }
                let lanes_of = lanes::<D>(zero.dot_bytes(bytes.raised_bytes(), x));
                out.extend(lanes_of.iter().zip(&sums).map(|(lane, sum)| lane - D::BYTE_OFFSET * sum));
                let floats: [f32; 32] = std::array::from_fn(|i| (f32::from(self.x[i]) + 0.5) * 200.0);
                let v = D::nearest(D::Float::load(floats.as_ptr()));
                out.extend(lanes::<D>(v));
                out.extend(lanes::<D>(v.upper_byte()));
                out.push(v.sum(v.upper_byte()));
                out.push(D::max_magnitude(floats.as_ptr()) as i32);
                out.extend(D::binade(D::Float::load(floats.as_ptr())).to_array().map(|v| v.to_bits() as i32));
                let mut low = [0_i8; LANES];
                v.store_bytes(low.as_mut_ptr());
                out.extend(low.map(i32::from));
                out
            }
        }
    }

    /// The lanes, read as bytes: whatever their bits are as floats.
    unsafe fn lanes<D: Dot>(v: D) -> [i32; LANES] {
        // SAFETY: the caller's conditions; a store changes no bits.
        unsafe { v.as_floats().to_array().map(|v| v.to_bits() as i32) }
    }

    #[cfg(target_arch = "x86_64")]
    mod evex {
        use std::arch::x86_64::*;

        use super::super::super::x86_dot::{Dot256, Multiply256};
        use super::DotWork;

        /// AVX-VNNI as AVX-512 encodes it, for processors that have only that.
        #[derive(Clone, Copy)]
        pub(super) struct EvexVnni;

        impl Multiply256 for EvexVnni {
            const BYTE_OFFSET: i32 = 128;
            const ONE_DOT: bool = true;
            const FLIP: i8 = i8::MIN;

            #[inline(always)]
            unsafe fn outlined<W: DotWork>(work: W) -> W::Output {
                #[target_feature(enable = "avx512vnni,avx512vl,avx2,fma,f16c")]
                unsafe fn run<W: DotWork>(work: W) -> W::Output {
                    // SAFETY: the caller's conditions.
                    unsafe { work.run::<Dot256<EvexVnni>>() }
                }
                // SAFETY: the caller's conditions.
                unsafe { run(work) }
            }
            #[inline(always)]
            unsafe fn dot_codes(sum: __m256i, w: __m256i, x: __m256i) -> __m256i {
                // SAFETY: the caller's conditions.
                unsafe { _mm256_dpbusd_epi32(sum, w, x) }
            }
            #[inline(always)]
            unsafe fn dot_bytes(sum: __m256i, w: __m256i, x: __m256i) -> __m256i {
                // SAFETY: the caller's conditions.
                unsafe { _mm256_dpbusd_epi32(sum, w, x) }
            }
        }
    }

    #[test]
    fn every_instruction_set_multiplies_as_plain_rust_does() {
        let mut state = 1_u32;
        let mut byte = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        for round in 0..200 {
            let mut words: [[u8; 64]; 3] = std::array::from_fn(|_| std::array::from_fn(|_| byte()));
            let mut x: [i8; 64] = std::array::from_fn(|_| byte() as i8);
            if round == 0 {
                // Everything at the ends of its range, and of one sign.
                words = [[0x88; 64], [0xFF; 64], [0x80; 64]];
                x = [i8::MIN; 64];
            }
            let work = || Everything { words: &words, x: &x };
            // SAFETY: plain Rust is always there.
            let expected = unsafe { Isa::Portable.dot(work()) };
            for isa in Isa::ALL.iter().copied().filter(|isa| isa.is_available()) {
                // SAFETY: available.
                assert_eq!(unsafe { isa.dot(work()) }, expected, "{isa:?}");
            }
            #[cfg(target_arch = "x86_64")]
            if Isa::Avx512Vnni.is_available() {
                // SAFETY: as above.
                assert_eq!(unsafe { Dot256::<evex::EvexVnni>::outlined(work()) }, expected, "256-bit VNNI");
            }
        }
    }
}

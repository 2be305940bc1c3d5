//! The AArch64 int8 dot products, signed by signed: nothing is raised. Every method's safety is the trait's contract.

use std::arch::aarch64::*;
use std::arch::asm;

use super::LANES;
use super::dot::{Dot, DotWork};
use super::neon::Neon;

/// Four 128-bit registers; `SDOT` of Armv8.2 if `DOT`, else widening products.
#[derive(Clone, Copy)]
pub(crate) struct NeonDot<const DOT: bool>([int32x4_t; 4]);

/// Applies an operation to each of the four registers of its operands.
macro_rules! each {
    ($($v:expr),+ => |$($x:ident),+| $body:expr) => {
        // SAFETY: the caller's conditions.
        unsafe {
            [each!(@ 0, $($v),+ => |$($x),+| $body), each!(@ 1, $($v),+ => |$($x),+| $body),
             each!(@ 2, $($v),+ => |$($x),+| $body), each!(@ 3, $($v),+ => |$($x),+| $body)]
        }
    };
    (@ $i:literal, $($v:expr),+ => |$($x:ident),+| $body:expr) => {{
        $(let $x = $v[$i];)+
        $body
    }};
}

/// `sum` plus four products per lane. (The intrinsic of `sdot` is not stable.)
#[inline(always)]
unsafe fn dot<const DOT: bool>(sum: int32x4_t, w: int32x4_t, x: int32x4_t) -> int32x4_t {
    // SAFETY: the caller's conditions.
    unsafe {
        if DOT {
            let mut sum = sum;
            asm!(".arch_extension dotprod", "sdot {sum:v}.4s, {w:v}.16b, {x:v}.16b",
                 sum = inout(vreg) sum, w = in(vreg) w, x = in(vreg) x,
                 options(pure, nomem, nostack, preserves_flags));
            return sum;
        }
        let (w, x) = (vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(x));
        // |products| <= 2^14, so pairs fit 32 bits, and 16-bit products do not overflow.
        let low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)));
        let high = vpaddlq_s16(vmull_high_s8(w, x));
        vaddq_s32(sum, vpaddq_s32(low, high))
    }
}

/// Low or high nibbles of bytes.
#[inline(always)]
unsafe fn nibble<const HIGH: bool>(words: int32x4_t) -> uint8x16_t {
    // SAFETY: the caller's conditions.
    unsafe {
        let bytes = vreinterpretq_u8_s32(words);
        if HIGH { vshrq_n_u8::<4>(bytes) } else { vandq_u8(bytes, vdupq_n_u8(15)) }
    }
}

/// Low byte of each of four lanes, times four vectors.
#[inline(always)]
unsafe fn low_bytes(v: [int32x4_t; 4]) -> int8x16_t {
    // SAFETY: the caller's conditions.
    unsafe {
        let low = vuzp1q_s16(vreinterpretq_s16_s32(v[0]), vreinterpretq_s16_s32(v[1]));
        let high = vuzp1q_s16(vreinterpretq_s16_s32(v[2]), vreinterpretq_s16_s32(v[3]));
        vuzp1q_s8(vreinterpretq_s8_s16(low), vreinterpretq_s8_s16(high))
    }
}

impl<const DOT: bool> Dot for NeonDot<DOT> {
    type Float = Neon;
    type Table = uint8x16x4_t;
    const CODE_OFFSET: i32 = 0;
    const BYTE_OFFSET: i32 = 0;
    const ONE_DOT: bool = true;

    #[inline(always)]
    unsafe fn prefetch<const FAR: bool>(p: *const u8) {
        // SAFETY: the trait's contract.
        unsafe {
            if FAR {
                asm!("prfm pldl2keep, [{p}]", p = in(reg) p, options(readonly, nostack, preserves_flags));
            } else {
                asm!("prfm pldl1keep, [{p}]", p = in(reg) p, options(readonly, nostack, preserves_flags));
            }
        }
    }
    // Advanced SIMD is part of every AArch64 target, and `sdot` is assembly: there is nothing to enable.
    #[inline(never)]
    unsafe fn outlined<W: DotWork>(work: W) -> W::Output {
        // SAFETY: the trait's contract.
        unsafe { work.run::<Self>() }
    }
    #[inline(always)]
    unsafe fn splat(v: i32) -> Self {
        // SAFETY: the trait's contract.
        Self([unsafe { vdupq_n_s32(v) }; 4])
    }
    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self {
        const AT: [usize; 4] = [0, 16, 32, 48];
        Self(each!(AT => |at| vreinterpretq_s32_u8(vld1q_u8(p.add(at)))))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut u8) {
        for (i, quarter) in self.0.into_iter().enumerate() {
            // SAFETY: the trait's contract.
            unsafe { vst1q_u8(p.add(16 * i), vreinterpretq_u8_s32(quarter)) };
        }
    }
    #[inline(always)]
    unsafe fn table(bytes: &[u8; 64]) -> uint8x16x4_t {
        // SAFETY: the trait's contract.
        unsafe { vld1q_u8_x4(bytes.as_ptr()) }
    }
    #[inline(always)]
    unsafe fn nibbles<const HIGH: bool>(self, table: uint8x16x4_t) -> Self {
        Self(each!(self.0 => |v| vreinterpretq_s32_u8(vqtbl1q_u8(table.0, nibble::<HIGH>(v)))))
    }
    #[inline(always)]
    unsafe fn sextets<const HIGH: bool, const PAIR: u32>(self, upper: Self, table: uint8x16x4_t) -> Self {
        Self(each!(self.0, upper.0 => |low, upper| {
            let by = vdupq_n_s8(4 - 2 * PAIR as i8);
            let upper = vandq_u8(vshlq_u8(vreinterpretq_u8_s32(upper), by), vdupq_n_u8(0x30));
            vreinterpretq_s32_u8(vqtbl4q_u8(table, vorrq_u8(nibble::<HIGH>(low), upper)))
        }))
    }
    #[inline(always)]
    unsafe fn raised_bytes(self) -> Self {
        self
    }
    #[inline(always)]
    unsafe fn dot_codes(self, w: Self, x: Self) -> Self {
        Self(each!(self.0, w.0, x.0 => |sum, w, x| dot::<DOT>(sum, w, x)))
    }
    #[inline(always)]
    unsafe fn dot_bytes(self, w: Self, x: Self) -> Self {
        // SAFETY: the trait's contract.
        unsafe { self.dot_codes(w, x) }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        Self(each!(self.0, b.0 => |a, b| vaddq_s32(a, b)))
    }
    #[inline(always)]
    unsafe fn as_floats(self) -> Neon {
        Neon(each!(self.0 => |v| vreinterpretq_f32_s32(v)))
    }
    #[inline(always)]
    unsafe fn nearest(v: Neon) -> Self {
        Self(each!(v.0 => |v| vcvtnq_s32_f32(v)))
    }
    #[inline(always)]
    unsafe fn binade(v: Neon) -> Neon {
        Neon(each!(v.0 => |v| {
            vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), vdupq_n_u32(0x7F80_0000)))
        }))
    }
    #[inline(always)]
    unsafe fn max_magnitude(p: *const f32) -> u32 {
        // SAFETY: the trait's contract.
        unsafe {
            let mask = vdupq_n_u32(0x7FFF_FFFF);
            let mut max = vdupq_n_u32(0);
            for i in 0..2 * LANES / 4 {
                max = vmaxq_u32(max, vandq_u32(vld1q_u32(p.add(4 * i).cast()), mask));
            }
            vmaxvq_u32(max)
        }
    }
    #[inline(always)]
    unsafe fn sum(self, b: Self) -> i32 {
        let pairs = each!(self.0, b.0 => |a, b| vaddq_s32(a, b));
        // SAFETY: the trait's contract.
        unsafe { vaddvq_s32(vaddq_s32(vaddq_s32(pairs[0], pairs[1]), vaddq_s32(pairs[2], pairs[3]))) }
    }
    #[inline(always)]
    unsafe fn upper_byte(self) -> Self {
        Self(each!(self.0 => |v| vshrq_n_s32::<8>(vaddq_s32(v, vdupq_n_s32(128)))))
    }
    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut i8) {
        // SAFETY: the trait's contract.
        unsafe { vst1q_s8(p, low_bytes(self.0)) }
    }
}

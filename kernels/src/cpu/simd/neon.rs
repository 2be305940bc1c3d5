//! The AArch64 lanes. Every method's safety is the trait's contract.

use std::arch::aarch64::*;
use std::arch::asm;

use super::{HalfFields, LANES, Lanes};

/// Four 128-bit registers, lanes 0..4, 4..8, 8..12 and 12..16.
#[derive(Clone, Copy)]
pub(crate) struct Neon(pub(in crate::cpu) [float32x4_t; 4]);

/// Applies an operation to each of the four registers of its operands.
macro_rules! each {
    ($($v:expr),+ => |$($x:ident),+| $body:expr) => {
        // SAFETY: the caller's conditions.
        Neon(unsafe {
            [each!(@ 0, $($v),+ => |$($x),+| $body), each!(@ 1, $($v),+ => |$($x),+| $body),
             each!(@ 2, $($v),+ => |$($x),+| $body), each!(@ 3, $($v),+ => |$($x),+| $body)]
        })
    };
    (@ $i:literal, $($v:expr),+ => |$($x:ident),+| $body:expr) => {{
        $(let $x = $v[$i];)+
        $body
    }};
}

/// Four halves as floats. (The intrinsic of `fcvtl` is younger than the compiler that this crate asks for.)
#[inline(always)]
unsafe fn widen_halves(halves: uint16x4_t) -> float32x4_t {
    let floats: float32x4_t;
    // SAFETY: the caller's conditions.
    unsafe {
        asm!("fcvtl {floats:v}.4s, {halves:v}.4h", floats = lateout(vreg) floats, halves = in(vreg) halves,
             options(pure, nomem, nostack, preserves_flags));
    }
    floats
}

/// 16 bytes as four vectors of words.
#[inline(always)]
pub(super) unsafe fn widen_bytes(bytes: uint8x16_t) -> [uint32x4_t; 4] {
    // SAFETY: the caller's conditions.
    unsafe {
        let (low, high) = (vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes));
        [
            vmovl_u16(vget_low_u16(low)),
            vmovl_high_u16(low),
            vmovl_u16(vget_low_u16(high)),
            vmovl_high_u16(high),
        ]
    }
}

impl Neon {
    /// Entries `index`, words below 16, of `table`.
    #[inline(always)]
    unsafe fn lookup(index: uint32x4_t, table: &[f32; 16]) -> float32x4_t {
        // SAFETY: the caller's conditions.
        unsafe {
            // The four bytes of entry i are at 4 i.
            let first = vmulq_u32(index, vdupq_n_u32(0x0404_0404));
            let bytes = vaddq_u32(first, vdupq_n_u32(0x0302_0100));
            let table = vld1q_u8_x4(table.as_ptr().cast());
            vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(bytes)))
        }
    }

    /// Eight halves with the fields of `codes` placed by `fields`.
    #[inline(always)]
    unsafe fn place_fields(codes: uint16x8_t, fields: HalfFields) -> uint16x8_t {
        // SAFETY: the caller's conditions.
        unsafe {
            let sign = vandq_u16(vshlq_u16(codes, vdupq_n_s16(16 - fields.bits as i16)), vdupq_n_u16(0x8000));
            let mask = ((1_u32 << (fields.bits - 1)) - 1) << fields.shift;
            let magnitude =
                vandq_u16(vshlq_u16(codes, vdupq_n_s16(fields.shift as i16)), vdupq_n_u16(mask as u16));
            vorrq_u16(sign, magnitude)
        }
    }
}

impl Lanes for Neon {
    // There are 32 of half the width.
    const REGISTERS: usize = 16;

    #[inline(always)]
    unsafe fn splat(v: f32) -> Self {
        // SAFETY: the trait's contract.
        Self([unsafe { vdupq_n_f32(v) }; 4])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the trait's contract.
        unsafe { Self([vld1q_f32(p), vld1q_f32(p.add(4)), vld1q_f32(p.add(8)), vld1q_f32(p.add(12))]) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the trait's contract.
        unsafe {
            vst1q_f32(p, self.0[0]);
            vst1q_f32(p.add(4), self.0[1]);
            vst1q_f32(p.add(8), self.0[2]);
            vst1q_f32(p.add(12), self.0[3]);
        }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        each!(self.0, b.0, c.0 => |a, b, c| vfmaq_f32(c, a, b))
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        each!(self.0, b.0 => |a, b| vaddq_f32(a, b))
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        each!(self.0, b.0 => |a, b| vsubq_f32(a, b))
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        each!(self.0, b.0 => |a, b| vmulq_f32(a, b))
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        each!(self.0, b.0 => |a, b| vdivq_f32(a, b))
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        each!(self.0, b.0 => |a, b| vbslq_f32(vcgtq_f32(a, b), a, b))
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        each!(self.0, b.0 => |a, b| vbslq_f32(vcltq_f32(a, b), a, b))
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        each!(self.0 => |v| vrndnq_f32(v))
    }
    #[inline(always)]
    unsafe fn mul_pow2(self, n: Self) -> Self {
        each!(self.0, n.0 => |v, n| {
            let biased = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
            vmulq_f32(v, vreinterpretq_f32_s32(vshlq_n_s32::<23>(biased)))
        })
    }
    #[inline(always)]
    unsafe fn keep(self, from: usize, to: usize, fill: f32) -> Self {
        const INDEX: [[i32; 4]; 4] = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]];
        let (from, to) = (from.min(LANES) as i32, to.min(LANES) as i32);
        each!(self.0, INDEX => |v, index| {
            let index = vld1q_s32(index.as_ptr());
            let inside = vandq_u32(vcgeq_s32(index, vdupq_n_s32(from)), vcltq_s32(index, vdupq_n_s32(to)));
            vbslq_f32(inside, v, vdupq_n_f32(fill))
        })
    }
    #[inline(always)]
    unsafe fn from_bf16(p: *const u16) -> Self {
        const AT: [usize; 4] = [0, 4, 8, 12];
        each!(AT => |at| vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.add(at)))))
    }
    #[inline(always)]
    unsafe fn from_f16(p: *const u16) -> Self {
        const AT: [usize; 4] = [0, 4, 8, 12];
        each!(AT => |at| widen_halves(vld1_u16(p.add(at))))
    }
    #[inline(always)]
    unsafe fn from_e8m0(p: *const u8) -> Self {
        // SAFETY: the trait's contract.
        let words = unsafe { widen_bytes(vld1q_u8(p)) };
        each!(words => |byte| {
            let normal = vshlq_n_u32::<23>(byte);
            // Byte 0 is the subnormal 2^-127; byte 255 is NaN where the shift makes Inf.
            let v = vbslq_u32(vceqq_u32(byte, vdupq_n_u32(0)), vdupq_n_u32(1 << 22), normal);
            vreinterpretq_f32_u32(vbslq_u32(vceqq_u32(byte, vdupq_n_u32(255)), vdupq_n_u32(0x7FC0_0000), v))
        })
    }
    #[inline(always)]
    unsafe fn from_fp8(p: *const u8, fields: HalfFields) -> Self {
        // SAFETY: the trait's contract.
        let halves = unsafe {
            let bytes = vld1q_u8(p);
            let low = Self::place_fields(vmovl_u8(vget_low_u8(bytes)), fields);
            let high = Self::place_fields(vmovl_high_u8(bytes), fields);
            [vget_low_u16(low), vget_high_u16(low), vget_low_u16(high), vget_high_u16(high)]
        };
        each!(halves => |halves| vmulq_n_f32(widen_halves(halves), fields.factor))
    }
    #[inline(always)]
    unsafe fn from_sextets(
        low: *const u32,
        half: usize,
        high: *const u32,
        pair: usize,
        table: &[f32; 32],
    ) -> [Self; 4] {
        const AT: [usize; 4] = [0, 4, 8, 12];
        let [t0, t1] = table.as_chunks::<16>().0 else { unreachable!("32 entries") };
        // SAFETY: the trait's contract.
        let mut quad = [unsafe { Self::splat(0.0) }; 4];
        for (j, out) in quad.iter_mut().enumerate() {
            let by_low = -((8 * j + 4 * half) as i32);
            let by_high = -((8 * j + 2 * pair) as i32);
            *out = each!(AT => |at| {
                let low = vandq_u32(vshlq_u32(vld1q_u32(low.add(at)), vdupq_n_s32(by_low)), vdupq_n_u32(15));
                let upper = vshlq_u32(vld1q_u32(high.add(at)), vdupq_n_s32(by_high));
                let (lower, higher) = (Self::lookup(low, t0), Self::lookup(low, t1));
                let magnitude = vbslq_f32(vtstq_u32(upper, vdupq_n_u32(1)), higher, lower);
                let sign = vshlq_n_u32::<30>(vandq_u32(upper, vdupq_n_u32(2)));
                vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(magnitude), sign))
            });
        }
        quad
    }
}

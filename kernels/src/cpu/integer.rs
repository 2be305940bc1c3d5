//! Matrix products on int8 dot products (AVX-512 VNNI), for weights and activations whose elements are integers times
//! a power of two: E2M1 x 2, E2M3 x 8, INT8 x 64, INT4 x 4.
//!
//! A block's sum of products is exact here, and it is exact in [`mod@super::linear`] too: an integer below 2^24 times a
//! power of two. So both follow the same definition bit for bit, and this is only faster: four products per 32-bit lane
//! and instruction instead of one.
//!
//! `vpdpbusd` multiplies unsigned by signed bytes: weights are raised by an offset, and a block's sum starts at minus
//! offset times the sum of its activations.

#![allow(clippy::needless_range_loop, reason = "registers of a tile are indexed by row group and token")]

use std::arch::x86_64::*;
use std::sync::Arc;

use super::linear::{OutColumns, streamed_groups_per_task};
use super::memory::Scratch;
use super::packed::{BLOCK, PackedWeight};
use super::pool::{DisjointSlices, Pool};
use super::simd::LANES;
use crate::buffer::MemoryAccount;
use crate::mx::{Cast, Scheme, quantize_block};

/// Bytes of a row group's decoded block: 16 rows x 32 elements.
const DECODED: usize = LANES * BLOCK;
/// Row groups and tokens of a tile held in registers, sums and totals.
const TILE_GROUPS: usize = 2;
const TILE_TOKENS: usize = 6;
/// Row groups streamed together.
const STREAM_GROUPS: usize = 4;
/// Tokens up to which weights are decoded in registers instead of into scratch.
const STREAM_TOKENS: usize = 4;

/// Whether this processor has the instructions.
fn available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("avx512vbmi")
}

/// How the codes of a scheme's weights and activations become bytes.
#[derive(Debug, Clone)]
pub(crate) struct IntegerCodec {
    kind: Kind,
    /// Unsigned byte of each weight code of up to 6 bits: the integer, raised by `offset`.
    weights: [u8; 64],
    /// What the unsigned bytes are too high.
    offset: i32,
    activation: Cast,
    /// Signed byte of each activation code.
    activations: [i8; 256],
    /// One over the product of the factors that made integers of weights and activations.
    unit: f32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Nibbles,
    Sextets,
    Bytes,
}

impl IntegerCodec {
    /// The codec for `scheme`; `None` if its weights or activations are no integers, or without the instructions.
    pub(crate) fn for_scheme(scheme: Scheme) -> Option<Self> {
        let (weight, activation) = (scheme.weight.format, scheme.activation?);
        let blocks_fit = [weight, activation.format].iter().all(|f| f.block.size() == BLOCK);
        let weight_factor = weight.element.spec().int8_factor()?;
        let activation_factor = activation.format.element.spec().int8_factor()?;
        if !blocks_fit || !available() {
            return None;
        }
        let bits = weight.element.spec().bits;
        let (kind, offset) = match bits {
            4 => (Kind::Nibbles, 64),
            6 => (Kind::Sextets, 64),
            _ => (Kind::Bytes, 128),
        };
        let code = |code: usize| (code & ((1 << bits) - 1)) as u8;
        Some(Self {
            kind,
            weights: std::array::from_fn(|c| {
                ((weight.element.decode(code(c)) * weight_factor) as i32 + offset) as u8
            }),
            offset,
            activation,
            activations: std::array::from_fn(|c| {
                (activation.format.element.decode(c as u8) * activation_factor) as i8
            }),
            unit: 1.0 / (weight_factor * activation_factor),
        })
    }
}

/// Quantized activations `[tokens, K]`: signed bytes, the sum of each block's bytes, and its scale.
struct Activations<'a> {
    bytes: *const i8,
    /// `[tokens, blocks]`: minus offset times the sum.
    starts: &'a [i32],
    /// `[tokens, blocks]`: the activation's scale times the codec's unit.
    scales: &'a [f32],
    cols: usize,
    blocks: usize,
    tokens: usize,
}

struct Problem<'a> {
    weight: &'a PackedWeight,
    codec: &'a IntegerCodec,
    x: Activations<'a>,
    bias: Option<&'a [f32]>,
    out: *mut f32,
    out_stride: usize,
}

// SAFETY: tasks write disjoint columns of `out`; nothing writes the activations.
unsafe impl Sync for Problem<'_> {}

/// Unsigned bytes of elements `4q .. 4q+4` of a row group.
///
/// # Safety
/// [`available`]; `block` points to a whole block of the layout that `KIND` names, and `q < 8`.
#[inline(always)]
unsafe fn quad<const KIND: u8>(block: *const u8, q: usize, table: __m512i) -> __m512i {
    // SAFETY: this function's conditions.
    unsafe {
        if KIND == Kind::Bytes as u8 {
            let words = _mm512_loadu_si512(block.add(q * LANES * 4).cast());
            return _mm512_xor_si512(words, _mm512_set1_epi8(i8::MIN));
        }
        let low = _mm512_loadu_si512(block.add(q / 2 * LANES * 4).cast());
        let low = if q.is_multiple_of(2) { low } else { _mm512_srli_epi16::<4>(low) };
        if KIND == Kind::Nibbles as u8 {
            return _mm512_shuffle_epi8(table, _mm512_and_si512(low, _mm512_set1_epi8(15)));
        }
        let high = _mm512_loadu_si512(block.add((4 + q / 4) * LANES * 4).cast());
        let high = match q % 4 {
            0 => _mm512_slli_epi16::<4>(high),
            1 => _mm512_slli_epi16::<2>(high),
            2 => high,
            _ => _mm512_srli_epi16::<2>(high),
        };
        // (low & 15) | (high & !15); the lookup takes six bits.
        let code = _mm512_ternarylogic_epi32::<0xCA>(_mm512_set1_epi8(15), low, high);
        _mm512_permutexvar_epi8(code, table)
    }
}

/// Every unsafe method: [`available`]; groups are inside the weight, blocks and tokens inside the activations, and
/// scratch holds [`scratch_floats`].
impl Problem<'_> {
    #[inline(always)]
    unsafe fn block_ptr(&self, group: usize, block: usize) -> *const u8 {
        // SAFETY: this function's conditions.
        unsafe {
            let index = group * self.x.blocks + block;
            self.weight.codes.as_ptr().add(index * self.weight.storage.block_bytes())
        }
    }

    #[inline(always)]
    unsafe fn weight_scale(&self, group: usize, block: usize) -> __m512 {
        use super::simd::Lanes;
        // SAFETY: this function's conditions.
        unsafe {
            let index = group * self.x.blocks + block;
            super::simd::x86::Avx512::from_e8m0(self.weight.scales.as_ptr().add(index * LANES)).0
        }
    }

    #[inline(always)]
    unsafe fn table(&self) -> __m512i {
        // SAFETY: this function's conditions.
        unsafe { _mm512_loadu_si512(self.codec.weights.as_ptr().cast()) }
    }

    /// `total + (sum * activation scale) * weight scale`: the product in brackets is exact, as it is in the definition.
    #[inline(always)]
    unsafe fn accumulate(&self, sum: __m512i, weight: __m512, t: usize, b: usize, total: __m512) -> __m512 {
        // SAFETY: this function's conditions.
        unsafe {
            let scale = _mm512_set1_ps(*self.x.scales.get_unchecked(t * self.x.blocks + b));
            _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale), weight, total)
        }
    }

    /// Four activations of token `t`, in every lane.
    #[inline(always)]
    unsafe fn activations(&self, t: usize, k: usize) -> __m512i {
        // SAFETY: this function's conditions.
        unsafe { _mm512_set1_epi32(self.x.bytes.add(t * self.x.cols + k).cast::<i32>().read_unaligned()) }
    }

    #[inline(always)]
    unsafe fn start(&self, t: usize, b: usize) -> __m512i {
        // SAFETY: this function's conditions.
        unsafe { _mm512_set1_epi32(*self.x.starts.get_unchecked(t * self.x.blocks + b)) }
    }

    #[inline(always)]
    unsafe fn finish(&self, group: usize, token: usize, total: __m512) {
        let first = group * LANES;
        let lanes = (self.weight.shape[0] - first).min(LANES);
        let mask = ((1_u32 << lanes) - 1) as u16;
        // SAFETY: this function's conditions.
        unsafe {
            let bias = match self.bias {
                Some(bias) => _mm512_maskz_loadu_ps(mask, bias.as_ptr().add(first)),
                None => _mm512_setzero_ps(),
            };
            let out = self.out.add(token * self.out_stride + first);
            _mm512_mask_storeu_ps(out, mask, _mm512_add_ps(total, bias));
        }
    }

    /// `G` row groups for all `T` tokens, weights decoded in registers.
    #[inline(always)]
    unsafe fn stream<const KIND: u8, const G: usize, const T: usize>(&self, group: usize) {
        // SAFETY: this function's conditions.
        unsafe {
            let table = self.table();
            let mut total = [[_mm512_setzero_ps(); T]; G];
            for b in 0..self.x.blocks {
                let mut sum = [[_mm512_setzero_si512(); T]; G];
                for t in 0..T {
                    let start = self.start(t, b);
                    for sum in &mut sum {
                        sum[t] = start;
                    }
                }
                for q in 0..BLOCK / 4 {
                    let mut x = [_mm512_setzero_si512(); T];
                    for (t, x) in x.iter_mut().enumerate() {
                        *x = self.activations(t, b * BLOCK + 4 * q);
                    }
                    for (g, sum) in sum.iter_mut().enumerate() {
                        let w = quad::<KIND>(self.block_ptr(group + g, b), q, table);
                        for (sum, x) in sum.iter_mut().zip(x) {
                            *sum = _mm512_dpbusd_epi32(*sum, w, x);
                        }
                    }
                }
                for g in 0..G {
                    let scale = self.weight_scale(group + g, b);
                    for t in 0..T {
                        total[g][t] = self.accumulate(sum[g][t], scale, t, b, total[g][t]);
                    }
                }
            }
            for g in 0..G {
                for t in 0..T {
                    self.finish(group + g, t, total[g][t]);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn stream_groups<const KIND: u8, const G: usize, const T: usize>(&self, from: usize, to: usize) {
        // SAFETY: this function's conditions.
        unsafe {
            let mut group = from;
            while group + G <= to {
                self.stream::<KIND, G, T>(group);
                group += G;
            }
            if G > 2 && group + 2 <= to {
                self.stream::<KIND, 2, T>(group);
                group += 2;
            }
            while group < to {
                self.stream::<KIND, 1, T>(group);
                group += 1;
            }
        }
    }

    /// `G` row groups x `T` tokens over all of K, from decoded bytes `[blocks, 8, TILE_GROUPS, 64]`.
    #[inline(always)]
    unsafe fn tile<const G: usize, const T: usize>(
        &self,
        group: usize,
        token: usize,
        decoded: *const u8,
        scales: *const f32,
    ) {
        // SAFETY: this function's conditions.
        unsafe {
            let mut total = [[_mm512_setzero_ps(); G]; T];
            for b in 0..self.x.blocks {
                let mut sum = [[_mm512_setzero_si512(); G]; T];
                for (t, sum) in sum.iter_mut().enumerate() {
                    *sum = [self.start(token + t, b); G];
                }
                let block = decoded.add(b * TILE_GROUPS * DECODED);
                for q in 0..BLOCK / 4 {
                    let mut w = [_mm512_setzero_si512(); G];
                    for (g, w) in w.iter_mut().enumerate() {
                        *w = _mm512_loadu_si512(block.add((q * TILE_GROUPS + g) * 64).cast());
                    }
                    for (t, sum) in sum.iter_mut().enumerate() {
                        let x = self.activations(token + t, b * BLOCK + 4 * q);
                        for (sum, w) in sum.iter_mut().zip(w) {
                            *sum = _mm512_dpbusd_epi32(*sum, w, x);
                        }
                    }
                }
                for g in 0..G {
                    let scale = _mm512_loadu_ps(scales.add((b * TILE_GROUPS + g) * LANES));
                    for t in 0..T {
                        total[t][g] = self.accumulate(sum[t][g], scale, token + t, b, total[t][g]);
                    }
                }
            }
            for (t, total) in total.iter().enumerate() {
                for (g, total) in total.iter().enumerate() {
                    self.finish(group + g, token + t, *total);
                }
            }
        }
    }

    /// `G` row groups for all tokens, weights decoded once into `scratch`.
    #[inline(always)]
    unsafe fn blocked<const KIND: u8, const G: usize>(&self, group: usize, scratch: *mut f32) {
        // SAFETY: this function's conditions.
        unsafe {
            let table = self.table();
            let blocks = self.x.blocks;
            let scales = scratch;
            let decoded = scratch.add(blocks * TILE_GROUPS * LANES).cast::<u8>();
            for b in 0..blocks {
                for g in 0..G {
                    let block = self.block_ptr(group + g, b);
                    for q in 0..BLOCK / 4 {
                        let at = decoded.add(b * TILE_GROUPS * DECODED + (q * TILE_GROUPS + g) * 64);
                        _mm512_storeu_si512(at.cast(), quad::<KIND>(block, q, table));
                    }
                    let at = scales.add((b * TILE_GROUPS + g) * LANES);
                    _mm512_storeu_ps(at, self.weight_scale(group + g, b));
                }
            }
            let mut token = 0;
            while token + TILE_TOKENS <= self.x.tokens {
                self.tile::<G, TILE_TOKENS>(group, token, decoded, scales);
                token += TILE_TOKENS;
            }
            while token + 2 <= self.x.tokens {
                self.tile::<G, 2>(group, token, decoded, scales);
                token += 2;
            }
            if token < self.x.tokens {
                self.tile::<G, 1>(group, token, decoded, scales);
            }
        }
    }

    /// Row groups `from..to`.
    #[inline(always)]
    unsafe fn groups<const KIND: u8>(&self, from: usize, to: usize, scratch: *mut f32) {
        // SAFETY: this function's conditions.
        unsafe {
            match self.x.tokens {
                1 => self.stream_groups::<KIND, STREAM_GROUPS, 1>(from, to),
                2 => self.stream_groups::<KIND, STREAM_GROUPS, 2>(from, to),
                3 => self.stream_groups::<KIND, 2, 3>(from, to),
                STREAM_TOKENS => self.stream_groups::<KIND, 2, STREAM_TOKENS>(from, to),
                _ => {
                    let mut group = from;
                    while group + TILE_GROUPS <= to {
                        self.blocked::<KIND, TILE_GROUPS>(group, scratch);
                        group += TILE_GROUPS;
                    }
                    if group < to {
                        self.blocked::<KIND, 1>(group, scratch);
                    }
                }
            }
        }
    }

    /// # Safety
    /// [`available`]; the groups are inside the weight and this call's alone; `scratch` holds [`scratch_floats`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
    unsafe fn run(&self, from: usize, to: usize, scratch: *mut f32) {
        // SAFETY: this function's conditions.
        unsafe {
            match self.codec.kind {
                Kind::Nibbles => self.groups::<{ Kind::Nibbles as u8 }>(from, to, scratch),
                Kind::Sextets => self.groups::<{ Kind::Sextets as u8 }>(from, to, scratch),
                Kind::Bytes => self.groups::<{ Kind::Bytes as u8 }>(from, to, scratch),
            }
        }
    }
}

/// Floats of scratch per thread: a row group pair's scales and decoded bytes.
const fn scratch_floats(blocks: usize) -> usize {
    blocks * TILE_GROUPS * (LANES + DECODED / size_of::<f32>())
}

/// Scratch of [`linear`].
pub(crate) struct IntegerScratch {
    decoded: Scratch,
    scales: Scratch,
    bytes: Scratch<i8>,
    starts: Scratch<i32>,
}

impl IntegerScratch {
    /// Empty scratch whose size is charged to `memory`.
    pub(crate) fn new(memory: &Arc<MemoryAccount>) -> Self {
        Self {
            decoded: Scratch::new(memory),
            scales: Scratch::new(memory),
            bytes: Scratch::new(memory),
            starts: Scratch::new(memory),
        }
    }
}

/// Quantizes one row: bytes, and per block the start of its sums and its scale.
fn quantize_row(codec: &IntegerCodec, x: &[f32], bytes: &mut [i8], starts: &mut [i32], scales: &mut [f32]) {
    let blocks = x.chunks_exact(BLOCK).zip(bytes.chunks_exact_mut(BLOCK));
    for (((x, bytes), start), scale) in blocks.zip(starts).zip(scales) {
        let mut codes = [0; BLOCK];
        *scale = quantize_block(codec.activation, x, &mut codes).to_f32() * codec.unit;
        let mut sum = 0;
        for (byte, code) in bytes.iter_mut().zip(codes) {
            *byte = codec.activations[usize::from(code)];
            sum += i32::from(*byte);
        }
        *start = -codec.offset * sum;
    }
}

/// As [`super::linear::linear`], with `x` `[tokens, K]` quantized as the codec's scheme declares.
///
/// # Panics
/// A slice is too short.
#[allow(clippy::too_many_arguments, reason = "a matrix product")]
pub(crate) fn linear(
    pool: &mut Pool,
    scratch: &mut IntegerScratch,
    weight: &PackedWeight,
    codec: &IntegerCodec,
    bias: Option<&[f32]>,
    x: &[f32],
    tokens: usize,
    out: &mut [f32],
    columns: OutColumns,
) {
    let (cols, blocks) = (weight.shape[1], weight.blocks());
    assert!(x.len() >= tokens * cols, "x holds the rows");
    assert!(columns.column + weight.shape[0] <= columns.width, "the result's columns are inside a row");
    assert!(out.len() >= tokens * columns.width, "out holds the result");
    assert!(bias.is_none_or(|bias| bias.len() == weight.shape[0]), "one bias per output");

    let bytes = scratch.bytes.take(tokens * cols);
    let starts = scratch.starts.take(tokens * blocks);
    let scales = scratch.scales.take(tokens * blocks);
    let pieces = (
        DisjointSlices::new(bytes, cols),
        DisjointSlices::new(starts, blocks),
        DisjointSlices::new(scales, blocks),
    );
    pool.run(tokens, &|t, _| {
        // SAFETY: each row is taken once.
        let (bytes, starts, scales) = unsafe { (pieces.0.slice(t), pieces.1.slice(t), pieces.2.slice(t)) };
        quantize_row(codec, &x[t * cols..][..cols], bytes, starts, scales);
    });

    let threads = pool.threads();
    let per_thread = scratch_floats(blocks);
    let decoded = DisjointSlices::new(scratch.decoded.take(per_thread * threads), per_thread);
    let problem = Problem {
        weight,
        codec,
        x: Activations { bytes: bytes.as_ptr(), starts, scales, cols, blocks, tokens },
        bias,
        // SAFETY: inside `out`, as asserted.
        out: unsafe { out.as_mut_ptr().add(columns.column) },
        out_stride: columns.width,
    };
    let groups = weight.groups();
    let per_task =
        if tokens <= STREAM_TOKENS { streamed_groups_per_task(groups, threads) } else { TILE_GROUPS };
    pool.run(groups.div_ceil(per_task), &|task, thread| {
        let from = task * per_task;
        // SAFETY: one piece of scratch per thread; the groups are this task's alone; the codec exists only where the
        // instructions are available.
        unsafe {
            problem.run(from, (from + per_task).min(groups), decoded.slice(thread).as_mut_ptr());
        }
    });
}

//! Attention over the paged KV cache.
//!
//! A block of one KV head holds keys as `[dim, 16 tokens]`, so that scores of sixteen tokens are one vector, and values
//! as `[16 tokens, dim rounded up to 16]`, so that outputs are vectors. Blocks start at multiples of 16 positions, so
//! the order of every sum below depends on the positions alone, not on chunks, neighbours or where blocks lie:
//!
//! ```text
//! score[t] = scale * (q[0] k[t, 0] + q[1] k[t, 1] + ...)                   fused multiply-adds in order of dim
//! p[t]     = exp(score[t] - max),  sum = tree over lanes of (in order of blocks: p[16 i + lane])
//! out[d]   = (p[first] v[first, d] + ... + p[last] v[last, d]) * (1 / sum)  fused multiply-adds in order of t
//! ```

#![allow(clippy::needless_range_loop, reason = "registers are indexed by head and output vector")]

use super::simd::{LANES, Lanes, dispatch};
use crate::backend::{Heads, KV_BLOCK_TOKENS};

const _: () = assert!(KV_BLOCK_TOKENS == LANES, "a block's tokens are one vector");

/// Query heads that share loads of keys and values in registers.
const GROUP: usize = 4;
/// Output vectors accumulated at a time.
const OUT_VECTORS: usize = 4;

/// One element type of the cache.
pub(crate) trait KvElement: Copy + Send + Sync {
    /// From `f32`, rounded to nearest even.
    fn from_f32(v: f32) -> Self;
    /// 16 elements.
    ///
    /// # Safety
    /// As [`Lanes`].
    unsafe fn load<L: Lanes>(p: *const Self) -> L;
}

impl KvElement for f32 {
    #[inline(always)]
    fn from_f32(v: f32) -> Self {
        v
    }
    #[inline(always)]
    unsafe fn load<L: Lanes>(p: *const Self) -> L {
        // SAFETY: the caller's conditions.
        unsafe { L::load(p) }
    }
}

/// BF16 bits.
impl KvElement for u16 {
    #[inline(always)]
    fn from_f32(v: f32) -> Self {
        half::bf16::from_f32(v).to_bits()
    }
    #[inline(always)]
    unsafe fn load<L: Lanes>(p: *const Self) -> L {
        // SAFETY: the caller's conditions.
        unsafe { L::from_bf16(p) }
    }
}

/// Element counts of the cache's blocks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KvGeometry {
    pub(crate) heads: Heads,
}

impl KvGeometry {
    /// `dim` rounded up to whole vectors: the stride of a value row.
    pub(crate) fn v_stride(self) -> usize {
        self.heads.dim.next_multiple_of(LANES)
    }

    /// Elements of one block of keys.
    pub(crate) fn k_block(self) -> usize {
        self.heads.kv * self.heads.dim * LANES
    }

    /// Elements of one block of values.
    pub(crate) fn v_block(self) -> usize {
        self.heads.kv * self.v_stride() * LANES
    }

    fn k_at(self, block: usize, head: usize) -> usize {
        block * self.k_block() + head * self.heads.dim * LANES
    }

    fn v_at(self, block: usize, head: usize) -> usize {
        block * self.v_block() + head * self.v_stride() * LANES
    }

    /// Writes one token's key and value of `head` to `slot`.
    pub(crate) fn write<T: KvElement>(
        self,
        k: &mut [T],
        v: &mut [T],
        slot: usize,
        head: usize,
        key: &[f32],
        value: &[f32],
    ) {
        let (block, lane) = (slot / LANES, slot % LANES);
        let k = &mut k[self.k_at(block, head)..][..self.heads.dim * LANES];
        for (k, &x) in k[lane..].iter_mut().step_by(LANES).zip(key) {
            *k = T::from_f32(x);
        }
        let v = &mut v[self.v_at(block, head) + lane * self.v_stride()..][..self.heads.dim];
        for (v, &x) in v.iter_mut().zip(value) {
            *v = T::from_f32(x);
        }
    }
}

/// What one row attends to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowContext<'a> {
    /// Block numbers in position order.
    pub(crate) blocks: &'a [u32],
    /// First position seen.
    pub(crate) from: usize,
    /// One past the last position seen.
    pub(crate) to: usize,
}

/// One KV head's cache: (keys, values) of all blocks.
#[derive(Clone, Copy)]
pub(crate) struct HeadCache<'a, T> {
    pub(crate) k: &'a [T],
    pub(crate) v: &'a [T],
    pub(crate) geometry: KvGeometry,
    pub(crate) head: usize,
}

/// Attention of up to [`GROUP`] query heads `q` (`[heads, dim]`) of one row to one KV head, into `out` (`[heads, dim]`).
/// `scores` holds `heads * (blocks touched) * 16` floats.
#[inline(always)]
unsafe fn attend_group<L: Lanes, T: KvElement, const H: usize>(
    cache: HeadCache<'_, T>,
    context: RowContext<'_>,
    q: &[f32],
    scale: f32,
    scores: &mut [f32],
    out: &mut [f32],
) {
    let geometry = cache.geometry;
    let dim = geometry.heads.dim;
    let (first, last) = (context.from / LANES, (context.to - 1) / LANES);
    let count = last - first + 1;
    assert!(scores.len() >= H * count * LANES, "scores of every head and block");
    let blocks = &context.blocks[first..=last];
    // SAFETY: block numbers are inside the cache (asserted by slicing), and each vector is inside its block.
    unsafe {
        let mut max = [L::splat(f32::NEG_INFINITY); H];
        for (i, &block) in blocks.iter().enumerate() {
            let k = cache.k[geometry.k_at(block as usize, cache.head)..][..dim * LANES].as_ptr();
            let mut s = [L::splat(0.0); H];
            for d in 0..dim {
                let kd = T::load::<L>(k.add(d * LANES));
                for (h, s) in s.iter_mut().enumerate() {
                    *s = kd.mul_add(L::splat(*q.as_ptr().add(h * dim + d)), *s);
                }
            }
            let start = (first + i) * LANES;
            let (from, to) = (context.from.saturating_sub(start), (context.to - start).min(LANES));
            for (h, s) in s.iter().enumerate() {
                let s = s.mul(L::splat(scale)).keep(from, to, f32::NEG_INFINITY);
                max[h] = max[h].max(s);
                s.store(scores.as_mut_ptr().add((h * count + i) * LANES));
            }
        }
        let mut inverse_sum = [0.0; H];
        for h in 0..H {
            let max = L::splat(max[h].reduce_max());
            let mut sum = L::splat(0.0);
            for i in 0..count {
                let start = (first + i) * LANES;
                let (from, to) = (context.from.saturating_sub(start), (context.to - start).min(LANES));
                let at = scores.as_mut_ptr().add((h * count + i) * LANES);
                // Positions outside are 0, not e^-87.
                let p = L::load(at).sub(max).exp().keep(from, to, 0.0);
                sum = sum.add(p);
                p.store(at);
            }
            inverse_sum[h] = 1.0 / sum.reduce_add();
        }
        let stride = geometry.v_stride();
        for d in (0..stride).step_by(OUT_VECTORS * LANES) {
            let vectors = ((stride - d) / LANES).min(OUT_VECTORS);
            let mut o = [[L::splat(0.0); OUT_VECTORS]; H];
            for (i, &block) in blocks.iter().enumerate() {
                let start = (first + i) * LANES;
                let v = cache.v[geometry.v_at(block as usize, cache.head)..][..stride * LANES].as_ptr();
                for t in context.from.saturating_sub(start)..(context.to - start).min(LANES) {
                    let row = v.add(t * stride + d);
                    for j in 0..OUT_VECTORS {
                        if j < vectors {
                            let vj = T::load::<L>(row.add(j * LANES));
                            for (h, o) in o.iter_mut().enumerate() {
                                let p = *scores.as_ptr().add((h * count + i) * LANES + t);
                                o[j] = vj.mul_add(L::splat(p), o[j]);
                            }
                        }
                    }
                }
            }
            for h in 0..H {
                for j in 0..vectors {
                    let values = o[h][j].mul(L::splat(inverse_sum[h])).to_array();
                    let at = d + j * LANES;
                    let lanes = LANES.min(dim - at);
                    out[h * dim + at..][..lanes].copy_from_slice(&values[..lanes]);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn attend_heads<L: Lanes, T: KvElement>(
    cache: HeadCache<'_, T>,
    context: RowContext<'_>,
    q: &[f32],
    scale: f32,
    scores: &mut [f32],
    out: &mut [f32],
) {
    let width = GROUP * cache.geometry.heads.dim;
    let dim = cache.geometry.heads.dim;
    for (q, out) in q.chunks(width).zip(out.chunks_mut(width)) {
        // SAFETY: the caller's conditions.
        unsafe {
            match q.len() / dim {
                1 => attend_group::<L, T, 1>(cache, context, q, scale, scores, out),
                2 => attend_group::<L, T, 2>(cache, context, q, scale, scores, out),
                3 => attend_group::<L, T, 3>(cache, context, q, scale, scores, out),
                _ => attend_group::<L, T, GROUP>(cache, context, q, scale, scores, out),
            }
        }
    }
}

#[inline(always)]
unsafe fn attend_bf16<L: Lanes>(
    cache: HeadCache<'_, u16>,
    context: RowContext<'_>,
    q: &[f32],
    scale: f32,
    scores: &mut [f32],
    out: &mut [f32],
) {
    // SAFETY: the caller's conditions.
    unsafe { attend_heads::<L, u16>(cache, context, q, scale, scores, out) }
}

#[inline(always)]
unsafe fn attend_f32<L: Lanes>(
    cache: HeadCache<'_, f32>,
    context: RowContext<'_>,
    q: &[f32],
    scale: f32,
    scores: &mut [f32],
    out: &mut [f32],
) {
    // SAFETY: the caller's conditions.
    unsafe { attend_heads::<L, f32>(cache, context, q, scale, scores, out) }
}

dispatch! {
    /// All query heads of a row that share a KV head: `q` and `out` are `[heads, dim]`. BF16 cache.
    pub(crate) fn row_bf16(
        cache: HeadCache<'_, u16>,
        context: RowContext<'_>,
        q: &[f32],
        scale: f32,
        scores: &mut [f32],
        out: &mut [f32],
    ) = attend_bf16
}
dispatch! {
    /// As [`row_bf16`], for an F32 cache.
    pub(crate) fn row_f32(
        cache: HeadCache<'_, f32>,
        context: RowContext<'_>,
        q: &[f32],
        scale: f32,
        scores: &mut [f32],
        out: &mut [f32],
    ) = attend_f32
}

/// Floats of scores for one row over at most `context` positions.
pub(crate) fn score_floats(context: usize) -> usize {
    GROUP * (context.div_ceil(LANES) + 1) * LANES
}

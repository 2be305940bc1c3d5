//! Row operators: norms, SwiGLU, rotary embedding.

use super::simd::{LANES, Lanes, dispatch};

/// Runs the body for each vector of a row: its first index, and the lanes in use (fewer at the end). A macro, since a
/// closure that is not inlined would lose the instruction set.
macro_rules! for_vectors {
    ($width:expr, |$i:ident, $lanes:ident| $body:block) => {
        let width = $width;
        let mut $i = 0;
        while $i < width {
            let $lanes = LANES.min(width - $i);
            $body
            $i += LANES;
        }
    };
}

/// The lanes of `row[i..]`, zero past its end.
#[inline(always)]
unsafe fn load<L: Lanes>(row: &[f32], i: usize, lanes: usize) -> L {
    // SAFETY: whole vectors are inside the row; a partial one is copied first.
    unsafe {
        if lanes == LANES {
            return L::load(row.as_ptr().add(i));
        }
        let mut padded = [0.0; LANES];
        padded[..lanes].copy_from_slice(&row[i..]);
        L::load(padded.as_ptr())
    }
}

#[inline(always)]
unsafe fn store<L: Lanes>(v: L, row: &mut [f32], i: usize, lanes: usize) {
    // SAFETY: as `load`.
    unsafe {
        if lanes == LANES {
            return v.store(row.as_mut_ptr().add(i));
        }
        row[i..].copy_from_slice(&v.to_array()[..lanes]);
    }
}

/// `1 / sqrt(mean(x^2) + eps)`: squares summed per lane in order, then the lanes as a tree.
#[inline(always)]
unsafe fn inverse_rms<L: Lanes>(x: &[f32], eps: f32) -> f32 {
    // SAFETY: the caller's conditions.
    unsafe {
        let mut squares = L::splat(0.0);
        for_vectors!(x.len(), |i, lanes| {
            let v = load::<L>(x, i, lanes);
            squares = v.mul_add(v, squares);
        });
        1.0 / (squares.reduce_add() / x.len() as f32 + eps).sqrt()
    }
}

#[inline(always)]
unsafe fn rms_norm_row<L: Lanes>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    // SAFETY: the caller's conditions.
    unsafe {
        let scale = L::splat(inverse_rms::<L>(x, eps));
        for_vectors!(x.len(), |i, lanes| {
            let y = load::<L>(x, i, lanes).mul(scale).mul(load::<L>(weight, i, lanes));
            store(y, out, i, lanes);
        });
    }
}

#[inline(always)]
unsafe fn add_rms_norm_row<L: Lanes>(
    delta: &[f32],
    residual: &mut [f32],
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    // SAFETY: the caller's conditions.
    unsafe {
        for_vectors!(delta.len(), |i, lanes| {
            let sum = load::<L>(residual, i, lanes).add(load::<L>(delta, i, lanes));
            store(sum, residual, i, lanes);
        });
        rms_norm_row::<L>(residual, weight, eps, out);
    }
}

#[inline(always)]
unsafe fn head_norm_in_place<L: Lanes>(x: &mut [f32], weight: &[f32], eps: f32) {
    // SAFETY: the caller's conditions.
    unsafe {
        let scale = L::splat(inverse_rms::<L>(x, eps));
        for_vectors!(x.len(), |i, lanes| {
            let y = load::<L>(x, i, lanes).mul(scale).mul(load::<L>(weight, i, lanes));
            store(y, x, i, lanes);
        });
    }
}

#[inline(always)]
unsafe fn silu_mul_row<L: Lanes>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    // SAFETY: the caller's conditions.
    unsafe {
        let (zero, one) = (L::splat(0.0), L::splat(1.0));
        for_vectors!(out.len(), |i, lanes| {
            let g = load::<L>(gate, i, lanes);
            let silu = g.div(one.add(zero.sub(g).exp()));
            store(silu.mul(load::<L>(up, i, lanes)), out, i, lanes);
        });
    }
}

#[inline(always)]
unsafe fn rotate_head<L: Lanes>(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = head.split_at_mut(cos.len());
    // SAFETY: the caller's conditions.
    unsafe {
        for_vectors!(cos.len(), |i, lanes| {
            let (a, b) = (load::<L>(first, i, lanes), load::<L>(second, i, lanes));
            let (c, s) = (load::<L>(cos, i, lanes), load::<L>(sin, i, lanes));
            store(a.mul(c).sub(b.mul(s)), first, i, lanes);
            store(b.mul(c).add(a.mul(s)), second, i, lanes);
        });
    }
}

dispatch! {
    /// `out = x * inverse_rms(x) * weight`; slices of one length.
    pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) = rms_norm_row
}
dispatch! {
    /// `residual += delta`, then the norm of the residual into `out`.
    pub(crate) fn add_rms_norm(delta: &[f32], residual: &mut [f32], weight: &[f32], eps: f32, out: &mut [f32])
        = add_rms_norm_row
}
dispatch! {
    /// The norm of one head, in place.
    pub(crate) fn head_norm(x: &mut [f32], weight: &[f32], eps: f32) = head_norm_in_place
}
dispatch! {
    /// `out = gate / (1 + e^-gate) * up`.
    pub(crate) fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) = silu_mul_row
}
dispatch! {
    /// Rotates the pairs (i, i + d) of a head of 2d elements; `cos` and `sin` have d.
    pub(crate) fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) = rotate_head
}

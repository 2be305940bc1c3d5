//! Launcher of `rope.cu`.

use std::sync::Arc;

use super::{HEAD_DIMS, WARP, address, head_dim_index, int};
use crate::backend::{HeadNorm, Heads, KV_BLOCK_TOKENS, PagedKv};
use crate::buffer::{Buffer, Dtype};
use crate::cuda::{Context, Function, Launch};

/// Most threads of a block.
const MAX_THREADS: usize = 512;

/// Rotary embedding.
#[derive(Debug)]
pub(crate) struct RopeOperator {
    context: Arc<Context>,
    table: Function,
    /// For each of [`HEAD_DIMS`].
    rope_and_cache: [Function; HEAD_DIMS.len()],
}

impl RopeOperator {
    pub(crate) fn new(context: &Arc<Context>) -> Self {
        let names = [
            "ops_rope_and_cache_16",
            "ops_rope_and_cache_32",
            "ops_rope_and_cache_64",
            "ops_rope_and_cache_96",
            "ops_rope_and_cache_128",
            "ops_rope_and_cache_256",
        ];
        Self {
            table: context.function("ops_rope_table"),
            rope_and_cache: names.map(|name| context.function(name)),
            context: Arc::clone(context),
        }
    }

    /// F32 `out[m] = factor * [cos(p f_0) .. | sin(p f_0) ..]`, `p = positions[m]`, `f = inv_freq`.
    pub(crate) fn table(
        &self,
        positions: &Buffer,
        inv_freq: &Buffer,
        factor: f32,
        rows: usize,
        out: &mut Buffer,
    ) {
        if rows == 0 {
            return;
        }
        let half = inv_freq.len();
        let positions = address(positions, Dtype::U32, rows);
        let inv_freq = address(inv_freq, Dtype::F32, half);
        let out = address(out, Dtype::F32, rows * 2 * half);
        let threads = half.next_multiple_of(WARP).min(256);
        // SAFETY: every buffer has the elements that `rows` rows take, as checked above.
        unsafe {
            let launch = Launch::new(rows as u32, threads as u32);
            self.context.launch(&self.table, &launch, &[&positions, &inv_freq, &out, &int(half), &factor]);
        }
    }

    /// Norms (if asked) and rotates q and k, q in place; writes k and v to their slots.
    #[allow(clippy::too_many_arguments, reason = "one fused kernel")]
    pub(crate) fn rope_and_cache(
        &self,
        qkv: &mut Buffer,
        heads: Heads,
        rope: &Buffer,
        norm: Option<HeadNorm<'_>>,
        slots: &Buffer,
        rows: usize,
        cache: &mut PagedKv,
    ) {
        if rows == 0 {
            return;
        }
        let Heads { q, kv, dim } = heads;
        let kernel = &self.rope_and_cache[head_dim_index(dim)];
        let qkv = address(qkv, Dtype::Bf16, rows * heads.qkv_width());
        let rope = address(rope, Dtype::F32, rows * dim);
        let (q_norm, k_norm, eps) = match norm {
            Some(norm) => (address(norm.q, Dtype::F32, dim), address(norm.k, Dtype::F32, dim), norm.eps),
            None => (0, 0, 0.0),
        };
        let slots = address(slots, Dtype::U32, rows);
        let cached = cache.blocks * kv * KV_BLOCK_TOKENS * dim;
        let (k, v) = (address(&cache.k, Dtype::Bf16, cached), address(&cache.v, Dtype::Bf16, cached));
        // A head is handled by a power of two of threads, 16 elements each.
        let head_threads = (dim / 16).next_power_of_two();
        let threads = ((q + 2 * kv) * head_threads).next_multiple_of(WARP).min(MAX_THREADS);
        // SAFETY: every buffer has the elements that `rows` rows and the cache's blocks take, as checked above; slots are
        // of the cache, as every caller of this operator promises.
        unsafe {
            self.context.launch(
                kernel,
                &Launch::new(rows as u32, threads as u32),
                &[&qkv, &rope, &q_norm, &k_norm, &slots, &k, &v, &int(q), &int(kv), &eps],
            );
        }
    }
}

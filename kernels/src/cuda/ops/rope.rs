//! Launcher of `rope.cu` and `rope_mx.cu`.

use std::cell::RefCell;
use std::sync::Arc;

use super::kv::{KvKernels, kv_addresses};
use super::{WARP, address, int};
use crate::backend::{HeadNorm, Heads, PagedKv};
use crate::buffer::{Buffer, Dtype};
use crate::cuda::gemm::MxGrid;
use crate::cuda::{Context, Function, Launch};
use crate::kv_cache_dtype::KvCacheDtype;

/// Most threads of a block.
const MAX_THREADS: usize = 512;

/// Rotary embedding.
#[derive(Debug)]
pub(crate) struct RopeOperator {
    context: Arc<Context>,
    table: Function,
    /// For the caches that were reserved.
    rope_and_cache: RefCell<Vec<(&'static KvKernels, Function)>>,
}

impl RopeOperator {
    pub(crate) fn new(context: &Arc<Context>) -> Self {
        let table = context.function("ops_rope_table");
        Self { table, rope_and_cache: RefCell::default(), context: Arc::clone(context) }
    }

    /// Loads the kernel for a cache of `dtype`; to be called before [`rope_and_cache`](Self::rope_and_cache), not between
    /// launches.
    ///
    /// # Panics
    /// There is none.
    pub(crate) fn reserve(&self, dtype: KvCacheDtype, heads: Heads) {
        let mut loaded = self.rope_and_cache.borrow_mut();
        if loaded.iter().all(|(kernels, _)| !kernels.are_for(dtype, heads.dim)) {
            let kernels = KvKernels::find(dtype, heads.dim).expect("a cache that the device supports");
            loaded.push((kernels, self.context.function(kernels.rope)));
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
        let loaded = self.rope_and_cache.borrow();
        let kernel = loaded.iter().find(|(kernels, _)| kernels.are_for(cache.dtype, dim));
        let (_, kernel) = kernel.expect("the kernel was loaded when the cache was allocated");
        let qkv = address(qkv, Dtype::Bf16, rows * heads.qkv_width());
        let rope = address(rope, Dtype::F32, rows * dim);
        let (q_norm, k_norm, eps) = match norm {
            Some(norm) => (address(norm.q, Dtype::F32, dim), address(norm.k, Dtype::F32, dim), norm.eps),
            None => (0, 0, 0.0),
        };
        let slots = address(slots, Dtype::U32, rows);
        let [k, v] = kv_addresses(cache, heads);
        // A head is handled by a power of two of threads, 16 elements each.
        let head_threads = (dim / 16).next_power_of_two();
        let threads = ((q + 2 * kv) * head_threads).next_multiple_of(WARP).min(MAX_THREADS);
        // SAFETY: every buffer has the elements that `rows` rows and the cache's blocks take, as checked above; slots are
        // of the cache, as every caller of this operator promises.
        unsafe {
            let launch = Launch::new(rows as u32, threads as u32);
            let (q, kv) = (int(q), int(kv));
            match cache.dtype.cast() {
                None => self.context.launch(
                    kernel,
                    &launch,
                    &[&qkv, &rope, &q_norm, &k_norm, &slots, &k, &v, &q, &kv, &eps],
                ),
                Some(cast) => {
                    let grid = MxGrid::new(cast).expect("a cache's format is one that the kernels follow");
                    self.context.launch(
                        kernel,
                        &launch,
                        &[&qkv, &rope, &q_norm, &k_norm, &slots, &k, &v, &q, &kv, &eps, &grid],
                    );
                }
            }
        }
    }
}

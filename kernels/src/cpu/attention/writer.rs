//! Writing keys and values to the cache.

use super::cache::KvLayout;
use crate::cpu::simd::LANES;

/// Writes keys and values of rows to their places in the cache, from several threads.
pub(crate) struct CacheWriter {
    layout: KvLayout,
    k: DisjointBytes,
    v: DisjointBytes,
}

/// Bytes that several threads write, each at its own places.
struct DisjointBytes {
    start: *mut u8,
    len: usize,
}

// SAFETY: `CacheWriter::write` writes disjoint tokens by its contract.
unsafe impl Sync for DisjointBytes {}

impl CacheWriter {
    /// A writer to the cache with keys `k` and values `v`, which the caller keeps borrowed while it is used.
    pub(crate) fn new(layout: KvLayout, k: &mut [u8], v: &mut [u8]) -> Self {
        let bytes = |bytes: &mut [u8]| DisjointBytes { start: bytes.as_mut_ptr(), len: bytes.len() };
        Self { layout, k: bytes(k), v: bytes(v) }
    }

    /// Writes the keys and values `[kv heads, dim]` of one token to `slot`.
    ///
    /// # Safety
    /// The cache is still borrowed, and no two calls at the same time have the same slot.
    pub(crate) unsafe fn write(&self, slot: usize, keys: &[f32], values: &[f32]) {
        let (block, lane) = (slot / LANES, slot % LANES);
        let dim = self.layout.heads.dim;
        for (head, (key, value)) in keys.chunks_exact(dim).zip(values.chunks_exact(dim)).enumerate() {
            let (k, v) = (self.layout.keys_at(block, head), self.layout.values_at(block, head));
            assert!(k + self.layout.key_head_bytes() <= self.k.len, "block {block} is in the cache");
            assert!(v + self.layout.value_head_bytes() <= self.v.len, "block {block} is in the cache");
            // SAFETY: the head's part of the block is inside the cache.
            unsafe { self.layout.write(self.k.start.add(k), self.v.start.add(v), lane, key, value) };
        }
    }
}

//! Memory that tensors are read into, one after the other. A fresh buffer for each would be made page by page as it is
//! filled, which takes several times as long as copying from the page cache.

use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Most bytes of buffers that wait to be used again. Embeddings are larger than most other tensors, and only two.
const MOST_WAITING_BYTES: usize = 512 << 20;

/// Buffers of tensors that are gone.
#[derive(Debug, Default)]
pub(crate) struct BufferPool {
    waiting: Mutex<Vec<Vec<u8>>>,
}

impl BufferPool {
    /// `len` bytes of any content, which come back here when they are dropped.
    pub(super) fn take(self: &Arc<Self>, len: usize) -> TensorBytes {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        // Not one that is far too large: a tensor of its own size may be next.
        let fits = |buffer: &Vec<u8>| buffer.len() >= len && buffer.len() / 2 <= len;
        let best = waiting.iter().enumerate().filter(|(_, buffer)| fits(buffer));
        let best = best.min_by_key(|(_, buffer)| buffer.len()).map(|(index, _)| index);
        let bytes = best.map_or_else(|| vec![0; len], |index| waiting.swap_remove(index));
        TensorBytes { bytes, len, pool: Arc::downgrade(self) }
    }

    fn put(&self, buffer: Vec<u8>) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: usize = waiting.iter().map(Vec::len).sum();
        if bytes + buffer.len() <= MOST_WAITING_BYTES {
            waiting.push(buffer);
        }
    }
}

/// The bytes of a tensor.
#[derive(Debug)]
pub struct TensorBytes {
    /// `len` of them are the tensor's.
    bytes: Vec<u8>,
    len: usize,
    /// Where they go in the end, if that is still there.
    pool: Weak<BufferPool>,
}

impl TensorBytes {
    /// The bytes, to be filled.
    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }
}

impl From<Vec<u8>> for TensorBytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self { len: bytes.len(), bytes, pool: Weak::new() }
    }
}

impl Clone for TensorBytes {
    fn clone(&self) -> Self {
        self.to_vec().into()
    }
}

impl Deref for TensorBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Drop for TensorBytes {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.upgrade() {
            pool.put(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_used_again_where_they_fit() {
        let pool = Arc::new(BufferPool::default());
        let address = |bytes: &TensorBytes| bytes.as_ptr();
        let (mut large, small) = (pool.take(1000), pool.take(100));
        large.as_mut_slice().fill(7);
        let (large_at, small_at) = (address(&large), address(&small));
        drop((large, small));
        let again = pool.take(90);
        assert_eq!((address(&again), again.len()), (small_at, 90));
        let other = pool.take(90);
        assert!(address(&other) != large_at, "1000 bytes are not for 90");
        let large = pool.take(600);
        assert_eq!((address(&large), large.len()), (large_at, 600));
        drop(pool);
        // There is nothing that they could come back to.
        drop((again, other, large));
    }

    #[test]
    fn buffers_beyond_the_limit_are_given_up() {
        let pool = Arc::new(BufferPool::default());
        pool.put(vec![0; MOST_WAITING_BYTES]);
        pool.put(vec![0; 1]);
        assert_eq!(pool.waiting.lock().unwrap().len(), 1);
    }
}

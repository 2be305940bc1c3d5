//! Memory that is read in long runs, in huge pages: weights.
//!
//! Decoding reads every weight once per step, in address order. With pages of 4 KiB a hardware prefetcher stops at each
//! page's end and the TLB misses as often; with pages of 2 MiB one thread was measured to read 1.5 times as fast. So
//! weights are cut from large mappings for which the system is asked to use such pages, where it has them.

use std::ptr::NonNull;
use std::sync::Arc;

/// Alignment and size of a huge page; a multiple of all others.
const HUGE_PAGE: usize = 2 << 20;
/// Bytes of a mapping that weights share.
const CHUNK: usize = 64 << 20;
/// Weights start on cache lines.
const LINE: usize = 64;

/// Zeroed memory, given back when dropped.
struct Mapping {
    base: NonNull<u8>,
    /// Bytes mapped at `base`.
    mapped: usize,
    /// Where the first huge page starts.
    start: NonNull<u8>,
    /// Bytes from `start`.
    len: usize,
}

// SAFETY: the mapping is plain memory that this value owns.
unsafe impl Send for Mapping {}
// SAFETY: as above; it is only written through `AlignedBytes`, which borrow disjoint parts.
unsafe impl Sync for Mapping {}

#[cfg(unix)]
impl Mapping {
    /// `len` zeros; pages that are never written take no memory. `None` if the system refuses.
    fn new(len: usize) -> Option<Self> {
        use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
        let len = len.next_multiple_of(HUGE_PAGE);
        let mapped = len + HUGE_PAGE;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new private mapping wherever the system has room for it.
        let base = unsafe { mmap_anonymous(std::ptr::null_mut(), mapped, protection, MapFlags::PRIVATE) };
        let base = NonNull::new(base.ok()?.cast::<u8>())?;
        let skip = base.align_offset(HUGE_PAGE);
        // SAFETY: inside the mapping, which is one huge page longer than `len`.
        let start = unsafe { base.add(skip) };
        #[cfg(target_os = "linux")]
        {
            use rustix::mm::{Advice, madvise};
            // SAFETY: the advised range is this mapping's, and the advice changes no content. Without huge pages it is
            // refused, and all works the same.
            let _ = unsafe { madvise(start.as_ptr().cast(), len, Advice::LinuxHugepage) };
        }
        Some(Self { base, mapped, start, len })
    }
}

#[cfg(unix)]
impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nothing refers to it any more. It cannot fail for a whole mapping.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.mapped) };
    }
}

#[cfg(not(unix))]
impl Mapping {
    fn layout(len: usize) -> Option<std::alloc::Layout> {
        std::alloc::Layout::from_size_align(len, LINE).ok()
    }

    fn new(len: usize) -> Option<Self> {
        let len = len.next_multiple_of(LINE).max(LINE);
        // SAFETY: the layout has a size.
        let base = NonNull::new(unsafe { std::alloc::alloc_zeroed(Self::layout(len)?) })?;
        Some(Self { base, mapped: len, start: base, len })
    }
}

#[cfg(not(unix))]
impl Drop for Mapping {
    fn drop(&mut self) {
        if let Some(layout) = Self::layout(self.mapped) {
            // SAFETY: allocated by `new` with this layout.
            unsafe { std::alloc::dealloc(self.base.as_ptr(), layout) };
        }
    }
}

/// Hands out memory for weights.
#[derive(Default)]
pub(crate) struct Arena {
    /// The shared mapping in use, and how much of it is taken.
    chunk: Option<(Arc<Mapping>, usize)>,
}

impl Arena {
    /// `len` zeros that start on a cache line; `None` if the system refuses.
    pub(crate) fn zeroed(&mut self, len: usize) -> Option<AlignedBytes> {
        if len > CHUNK / 4 {
            return AlignedBytes::zeroed(len);
        }
        let taken = match &self.chunk {
            Some((mapping, taken)) if taken + len <= mapping.len => *taken,
            _ => {
                self.chunk = Some((Arc::new(Mapping::new(CHUNK)?), 0));
                0
            }
        };
        let (mapping, end) = self.chunk.as_mut()?;
        *end = (taken + len).next_multiple_of(LINE);
        // SAFETY: inside the mapping, as looked at above.
        let start = unsafe { mapping.start.add(taken) };
        Some(AlignedBytes { start, len, _mapping: Arc::clone(mapping) })
    }
}

/// Bytes that start on a cache line.
pub(crate) struct AlignedBytes {
    start: NonNull<u8>,
    len: usize,
    _mapping: Arc<Mapping>,
}

// SAFETY: the bytes are this value's alone, in a mapping that it keeps alive.
unsafe impl Send for AlignedBytes {}
// SAFETY: as above.
unsafe impl Sync for AlignedBytes {}

impl AlignedBytes {
    /// `len` zeros in a mapping of their own; `None` if the system refuses.
    pub(crate) fn zeroed(len: usize) -> Option<Self> {
        let mapping = Arc::new(Mapping::new(len)?);
        Some(Self { start: mapping.start, len, _mapping: mapping })
    }

    pub(crate) fn as_ptr(&self) -> *const u8 {
        self.start.as_ptr()
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: `len` initialized bytes of the mapping.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.len) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and no other value refers to them.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl std::fmt::Debug for AlignedBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AlignedBytes").field("len", &self.len).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_zeroed_aligned_and_disjoint() {
        let mut arena = Arena::default();
        // More than one chunk of small ones, and large ones between them.
        let sizes =
            [1, 64, 65, CHUNK / 4, CHUNK / 4, 0, CHUNK / 4, CHUNK / 4, CHUNK, 3, 2 * HUGE_PAGE + 1, 100];
        let mut all: Vec<_> = sizes.iter().map(|&size| arena.zeroed(size).unwrap()).collect();
        for (i, bytes) in all.iter_mut().enumerate() {
            assert_eq!(bytes.as_slice().len(), sizes[i]);
            assert_eq!(bytes.as_ptr().addr() % LINE, 0);
            assert!(bytes.as_slice().iter().all(|&b| b == 0), "{i}");
            bytes.as_mut_slice().fill(i as u8 + 1);
        }
        // What remains lives on without its neighbours and the arena.
        drop(arena);
        let kept: Vec<_> = all.into_iter().enumerate().filter(|(i, _)| i % 2 == 1).collect();
        assert!(kept.iter().all(|(i, bytes)| bytes.as_slice().iter().all(|&b| usize::from(b) == i + 1)));
    }
}

//! Host memory: zeroed without being touched, aligned, reused.

use std::alloc::{Layout, alloc_zeroed};
use std::sync::Arc;

pub(crate) use super::arena::AlignedBytes;
use crate::buffer::{Charge, Component, MemoryAccount};

/// Plain data whose zero is all bits zero.
///
/// # Safety
/// All bits zero are a value.
pub(crate) unsafe trait Zeroable: Copy {}
// SAFETY: zero is a number.
unsafe impl Zeroable for f32 {}
// SAFETY: as above.
unsafe impl Zeroable for u16 {}
// SAFETY: as above.
unsafe impl Zeroable for u32 {}
// SAFETY: as above.
unsafe impl Zeroable for i32 {}
// SAFETY: as above.
unsafe impl Zeroable for i8 {}

/// `len` zeros, or `None` if the system refuses. Pages that are never written take no memory: a KV cache costs what
/// is in use.
pub(crate) fn zeros<T: Zeroable>(len: usize) -> Option<Vec<T>> {
    let layout = Layout::array::<T>(len).ok()?;
    if layout.size() == 0 {
        return Some(Vec::new());
    }
    // SAFETY: the layout has a size; what comes back is `len` zeroed values in an allocation of that layout, as `Vec`
    // makes and frees it.
    unsafe {
        let start = alloc_zeroed(layout).cast::<T>();
        (!start.is_null()).then(|| Vec::from_raw_parts(start, len, len))
    }
}

/// 64 bytes, as the caches hold them.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line([u8; 64]);

impl Default for Line {
    fn default() -> Self {
        Self([0; 64])
    }
}

/// Reusable memory that grows to what the largest call needed, and is accounted for.
pub(crate) struct Scratch<T = f32> {
    values: Vec<T>,
    memory: Arc<MemoryAccount>,
    charge: Option<Charge>,
}

impl<T: Copy + Default> Scratch<T> {
    /// Empty scratch whose size is charged to `memory`.
    pub(crate) fn new(memory: &Arc<MemoryAccount>) -> Self {
        Self { values: Vec::new(), memory: Arc::clone(memory), charge: None }
    }

    /// `len` values of unspecified content. Grows by powers of two, so that a growing context seldom allocates.
    pub(crate) fn take(&mut self, len: usize) -> &mut [T] {
        if self.values.len() < len {
            self.values = vec![T::default(); len.next_power_of_two()];
            self.charge = Some(self.memory.charge(Component::Workspace, size_of_val(self.values.as_slice())));
        }
        &mut self.values[..len]
    }
}

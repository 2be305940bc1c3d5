//! Scratch memory that grows to what the largest call needed, and is accounted for.

use std::sync::Arc;

use crate::buffer::{Charge, Component, MemoryAccount};

/// Reusable memory.
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

    /// `len` values of unspecified content.
    pub(crate) fn take(&mut self, len: usize) -> &mut [T] {
        if self.values.len() < len {
            self.values = vec![T::default(); len];
            self.charge = Some(self.memory.charge(Component::Workspace, size_of_val(self.values.as_slice())));
        }
        &mut self.values[..len]
    }
}

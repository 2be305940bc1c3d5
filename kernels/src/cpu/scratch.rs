//! Scratch memory that grows to what the largest call needed, and is accounted for.

use std::sync::Arc;

use crate::buffer::{Charge, Component, MemoryAccount};

/// Reusable floats.
pub(crate) struct Scratch {
    floats: Vec<f32>,
    memory: Arc<MemoryAccount>,
    charge: Option<Charge>,
}

impl Scratch {
    /// Empty scratch whose size is charged to `memory`.
    pub(crate) fn new(memory: &Arc<MemoryAccount>) -> Self {
        Self { floats: Vec::new(), memory: Arc::clone(memory), charge: None }
    }

    /// `len` floats of unspecified content.
    pub(crate) fn take(&mut self, len: usize) -> &mut [f32] {
        if self.floats.len() < len {
            self.floats = vec![0.0; len];
            self.charge = Some(self.memory.charge(Component::Workspace, size_of_val(self.floats.as_slice())));
        }
        &mut self.floats[..len]
    }
}

//! Opaque device memory, and the account of what it is used for.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::cpu::AlignedBytes;
use crate::input_form::InputForm;

/// Element type of a [`Buffer`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// 32-bit float.
    F32,
    /// bfloat16.
    Bf16,
    /// Unsigned 32-bit integer: token ids, positions, block numbers.
    U32,
    /// Bytes whose meaning an operator knows: the KV cache, packed codes and scales.
    U8,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn size_bytes(self) -> usize {
        match self {
            Self::F32 | Self::U32 => 4,
            Self::Bf16 => 2,
            Self::U8 => 1,
        }
    }
}

/// What device memory is used for; the label of `mx_memory_bytes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Component {
    /// Codes of MX weights.
    Weights,
    /// Shared scales of MX weights.
    Scales,
    /// Every other parameter: embeddings, norms, biases, unquantized linears.
    Unquantized,
    /// The paged KV cache.
    KvCache,
    /// Activations, step inputs and scratch.
    Workspace,
    /// Recorded steps, on a device that [records](crate::Backend::captures).
    Graphs,
}

impl Component {
    /// Every component.
    pub const ALL: [Self; 6] =
        [Self::Weights, Self::Scales, Self::Unquantized, Self::KvCache, Self::Workspace, Self::Graphs];

    /// The metric label: `kv_cache`.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::Scales => "scales",
            Self::Unquantized => "unquantized",
            Self::KvCache => "kv_cache",
            Self::Workspace => "workspace",
            Self::Graphs => "graphs",
        }
    }
}

/// Bytes held now, per component: filled by real allocations, emptied when they are dropped.
#[derive(Debug, Default)]
pub struct MemoryAccount {
    bytes: [AtomicUsize; Component::ALL.len()],
}

impl MemoryAccount {
    /// Bytes held for `component`.
    pub fn bytes(&self, component: Component) -> usize {
        self.bytes[component as usize].load(Ordering::Relaxed)
    }

    /// Records an allocation for as long as the returned guard lives.
    pub(crate) fn charge(self: &Arc<Self>, component: Component, bytes: usize) -> Charge {
        self.bytes[component as usize].fetch_add(bytes, Ordering::Relaxed);
        Charge { account: Arc::clone(self), component, bytes }
    }
}

/// An entry in a [`MemoryAccount`], removed on drop.
#[derive(Debug)]
pub(crate) struct Charge {
    account: Arc<MemoryAccount>,
    component: Component,
    bytes: usize,
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.account.bytes[self.component as usize].fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Memory of one device, made by [`Backend::alloc`](crate::Backend::alloc): `len` elements of one dtype, zeroed.
/// Shapes are the operators' business.
#[derive(Debug)]
pub struct Buffer {
    pub(crate) storage: Storage,
    form: InputForm,
    _charge: Charge,
}

#[derive(Debug)]
pub(crate) enum Storage {
    HostF32(Vec<f32>),
    HostBf16(Vec<u16>),
    HostU32(Vec<u32>),
    HostU8(AlignedBytes),
    #[cfg(feature = "cuda")]
    Cuda {
        memory: crate::cuda::DeviceBuffer,
        dtype: Dtype,
        len: usize,
    },
}

impl Buffer {
    pub(crate) fn new(storage: Storage, charge: Charge) -> Self {
        Self { storage, form: InputForm::Plain, _charge: charge }
    }

    /// What its elements are: what the last operator that wrote here left. All but products read plain elements alone.
    pub fn form(&self) -> InputForm {
        self.form
    }

    /// Says what an operator leaves here.
    #[cfg(feature = "cuda")]
    pub(crate) fn set_form(&mut self, form: InputForm) {
        self.form = form;
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        match &self.storage {
            Storage::HostF32(_) => Dtype::F32,
            Storage::HostBf16(_) => Dtype::Bf16,
            Storage::HostU32(_) => Dtype::U32,
            Storage::HostU8(_) => Dtype::U8,
            #[cfg(feature = "cuda")]
            Storage::Cuda { dtype, .. } => *dtype,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match &self.storage {
            Storage::HostF32(v) => v.len(),
            Storage::HostBf16(v) => v.len(),
            Storage::HostU32(v) => v.len(),
            Storage::HostU8(v) => v.as_slice().len(),
            #[cfg(feature = "cuda")]
            Storage::Cuda { len, .. } => *len,
        }
    }

    /// Whether the buffer has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

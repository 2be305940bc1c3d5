//! [`Backend`] on an NVIDIA GPU: BF16 activations, weights in tiles, everything in order on one stream.

use std::cell::RefCell;
use std::sync::Arc;

use half::bf16;

use super::context::Context;
use super::graph::Graph;
use super::memory::{DeviceBuffer, DevicePtr, PinnedBuffer};
use super::staging::Staging;
use super::weight::{TiledWeight, Uploader};
use crate::backend::{
    AttentionInputs, Backend, DeviceMemory, HeadNorm, Heads, InputWrite, KV_BLOCK_TOKENS, LinearKernel,
    PagedKv, SampleParams, TokenLogprobs, WeightSource,
};
use crate::buffer::{Buffer, Component, Dtype, MemoryAccount, Storage};
use crate::error::{Error, Result};
use crate::graph::GraphKind;
use crate::kv_cache_dtype::KvCacheDtype;
use crate::mx::Scheme;
use crate::tile::{RowOrder, TileFormat, TileLayout};
use crate::weight::{Weight, WeightData};

/// Bytes of results that come back through pinned memory.
const READBACK_BYTES: usize = 16 * 1024;

/// An NVIDIA GPU.
pub(crate) struct CudaBackend {
    context: Arc<Context>,
    memory: Arc<MemoryAccount>,
    state: RefCell<State>,
}

/// Host memory that calls share.
struct State {
    uploader: Uploader,
    staging: Staging,
    /// Where small results arrive.
    readback: PinnedBuffer,
}

impl CudaBackend {
    /// Opens device `ordinal`.
    pub(crate) fn open(ordinal: usize) -> Result<Self> {
        let context = Arc::new(Context::open(ordinal)?);
        let state = State {
            uploader: Uploader::new(&context)?,
            staging: Staging::new(&context)?,
            readback: PinnedBuffer::new(&context, READBACK_BYTES)?,
        };
        Ok(Self { context, memory: Arc::default(), state: RefCell::new(state) })
    }

    fn device(&self) -> String {
        let properties = self.context.properties();
        format!("cuda:{} ({})", properties.ordinal, properties.name)
    }

    fn unsupported(&self, what: String) -> Error {
        Error::Unsupported { what, device: self.device() }
    }

    /// Copies `offset` bytes from the start of `buffer` on to `target`, after everything launched before.
    fn read(&self, buffer: &Buffer, offset: usize, target: &mut [u8]) {
        let memory = device_memory(buffer);
        let readback = &mut self.state.borrow_mut().readback;
        if target.len() <= readback.bytes() {
            memory.read(offset, &mut readback.as_mut_slice()[..target.len()]);
            target.copy_from_slice(&readback.as_slice()[..target.len()]);
        } else {
            memory.read(offset, target);
        }
    }
}

fn device_memory(buffer: &Buffer) -> &DeviceBuffer {
    match &buffer.storage {
        Storage::Cuda { memory, .. } => memory,
        _ => panic!("a buffer of another device"),
    }
}

fn tiled(weight: &Weight) -> &TiledWeight {
    match &weight.data {
        WeightData::Cuda(weight) => weight,
        WeightData::Cpu(_) => panic!("a weight of another device"),
    }
}

/// The address of a buffer of `dtype`.
///
/// # Panics
/// It has another element type, or fewer than `len` elements.
fn address(buffer: &Buffer, dtype: Dtype, len: usize) -> DevicePtr {
    assert!(buffer.dtype() == dtype, "{dtype:?} is expected, this buffer is {:?}", buffer.dtype());
    assert!(buffer.len() >= len, "{len} elements are expected, this buffer has {}", buffer.len());
    device_memory(buffer).ptr()
}

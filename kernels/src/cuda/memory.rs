//! Device memory and pinned host memory.

use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUresult};

use super::context::{Context, check, message};
use crate::buffer::{Charge, Component, MemoryAccount};
use crate::error::{Error, Result};

/// An address on the device.
pub(crate) type DevicePtr = sys::CUdeviceptr;

/// Numbers without padding, any bits of which are a value.
///
/// # Safety
/// As it says.
pub(crate) unsafe trait Number: Copy {}
// SAFETY: as the trait asks.
unsafe impl Number for f32 {}
// SAFETY: as above.
unsafe impl Number for u32 {}
// SAFETY: as above.
unsafe impl Number for u16 {}

/// The bytes of `values`, as the device reads them.
pub(crate) fn bytes_of<T: Number>(values: &[T]) -> &[u8] {
    // SAFETY: numbers have no padding.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// The bytes of `values`, to be written by the device.
pub(crate) fn bytes_of_mut<T: Number>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: numbers have no padding, and any bits are a number.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

/// Device memory, freed on drop.
#[derive(Debug)]
pub(crate) struct DeviceBuffer {
    ptr: DevicePtr,
    bytes: usize,
    context: Arc<Context>,
}

impl DeviceBuffer {
    /// `bytes` zeros for `what` (said when memory is short).
    pub(crate) fn zeroed(context: &Arc<Context>, bytes: usize, what: &str) -> Result<Self> {
        let this = Self::uninitialized(context, bytes, what)?;
        if bytes > 0 {
            // SAFETY: the memory has this many bytes; the stream orders the write before every use.
            check(unsafe { sys::cuMemsetD8Async(this.ptr, 0, bytes, context.stream()) }, "clear memory");
        }
        Ok(this)
    }

    /// `bytes` bytes of unspecified content for `what`.
    pub(crate) fn uninitialized(context: &Arc<Context>, bytes: usize, what: &str) -> Result<Self> {
        let mut ptr = 0;
        if bytes > 0 {
            // SAFETY: `ptr` is local; `drop` frees the memory.
            let result = unsafe { sys::cuMemAlloc_v2(&raw mut ptr, bytes) };
            if result == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                let (free, total) = context.memory_info();
                let properties = context.properties();
                return Err(Error::OutOfMemory {
                    what: what.to_owned(),
                    bytes,
                    device: format!(
                        "cuda:{} ({}), which has {free} of {total} bytes free",
                        properties.ordinal, properties.name
                    ),
                });
            }
            check(result, "allocate memory");
        }
        Ok(Self { ptr, bytes, context: Arc::clone(context) })
    }

    /// The address of the first byte; 0 if there is none.
    pub(crate) fn ptr(&self) -> DevicePtr {
        self.ptr
    }

    /// Size in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies `source` to `offset` bytes from the start. The bytes are taken before this returns; the stream orders
    /// the copy before every later use. Pageable memory: for loading and small inputs.
    pub(crate) fn write(&mut self, offset: usize, source: &[u8]) {
        assert!(offset + source.len() <= self.bytes, "{} bytes do not fit in the buffer", source.len());
        let stream = self.context.stream();
        // SAFETY: the range is inside the buffer; from pageable memory the driver has taken the bytes on return.
        let result = unsafe {
            sys::cuMemcpyHtoDAsync_v2(self.ptr + offset as u64, source.as_ptr().cast(), source.len(), stream)
        };
        check(result, "copy to the device");
    }

    /// Copies `offset` bytes from the start and on to `target`, after everything launched before.
    pub(crate) fn read(&self, offset: usize, target: &mut [u8]) {
        assert!(offset + target.len() <= self.bytes, "{} bytes are not in the buffer", target.len());
        let stream = self.context.stream();
        // SAFETY: the range is inside the buffer; `synchronize` waits until `target` is written.
        let result = unsafe {
            sys::cuMemcpyDtoHAsync_v2(
                target.as_mut_ptr().cast(),
                self.ptr + offset as u64,
                target.len(),
                stream,
            )
        };
        check(result, "copy from the device");
        self.context.synchronize();
    }

    /// Copies the first `bytes` bytes of pinned memory here, without waiting.
    ///
    /// # Safety
    /// `source` is not written, nor freed, before the copy has run.
    pub(crate) unsafe fn write_pinned(&mut self, offset: usize, source: &PinnedBuffer, bytes: usize) {
        assert!(offset + bytes <= self.bytes && bytes <= source.bytes, "{bytes} bytes do not fit");
        let stream = self.context.stream();
        // SAFETY: both ranges are inside their buffers; the rest is the caller's promise.
        let result =
            unsafe { sys::cuMemcpyHtoDAsync_v2(self.ptr + offset as u64, source.ptr.cast(), bytes, stream) };
        check(result, "copy to the device");
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if self.ptr != 0 {
            self.context.free(self.ptr);
        }
    }
}

/// Host memory that the device copies from and to at full speed, while the host goes on.
#[derive(Debug)]
pub(crate) struct PinnedBuffer {
    ptr: *mut u8,
    bytes: usize,
    /// Keeps the context alive that the memory belongs to.
    _context: Arc<Context>,
}

impl PinnedBuffer {
    /// `bytes` zeros; at least 1.
    pub(crate) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        let mut ptr = null_mut();
        // SAFETY: `ptr` is local; `drop` frees the memory.
        let result = unsafe { sys::cuMemHostAlloc(&raw mut ptr, bytes, 0) };
        if result != CUresult::CUDA_SUCCESS {
            let what = "pinned memory".to_owned();
            return Err(Error::OutOfMemory {
                what,
                bytes,
                device: format!("the host ({})", message(result)),
            });
        }
        let ptr = ptr.cast::<u8>();
        // SAFETY: just allocated with this size.
        unsafe { ptr.write_bytes(0, bytes) };
        Ok(Self { ptr, bytes, _context: Arc::clone(context) })
    }

    /// Size in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where kernels find the bytes: addresses are the same on both sides.
    pub(crate) fn device_ptr(&self) -> DevicePtr {
        self.ptr as DevicePtr
    }

    /// The bytes.
    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: allocated with this size and initialized; copies from the device end before `read` returns.
        unsafe { std::slice::from_raw_parts(self.ptr, self.bytes) }
    }

    /// The bytes, to write them.
    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.bytes) }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`, not freed before.
        let result = unsafe { sys::cuMemFreeHost(self.ptr.cast()) };
        debug_assert!(result == CUresult::CUDA_SUCCESS, "free pinned memory: {}", message(result));
    }
}

/// Device memory that grows to what the largest call needed. What it was before stays: recorded graphs point to it.
#[derive(Debug)]
pub(crate) struct Scratch {
    context: Arc<Context>,
    account: Arc<MemoryAccount>,
    what: &'static str,
    buffers: Vec<(DeviceBuffer, Charge)>,
}

impl Scratch {
    /// None yet; `what` it is for is said when memory is short.
    pub(crate) fn new(context: &Arc<Context>, account: &Arc<MemoryAccount>, what: &'static str) -> Self {
        Self { context: Arc::clone(context), account: Arc::clone(account), what, buffers: Vec::new() }
    }

    /// At least `bytes` bytes of unspecified content.
    ///
    /// # Panics
    /// Out of memory. Before the KV cache takes the rest, the largest step has run.
    pub(crate) fn reserve(&mut self, bytes: usize) -> DevicePtr {
        if let Some((buffer, _)) = self.buffers.last().filter(|(buffer, _)| buffer.bytes() >= bytes) {
            return buffer.ptr();
        }
        let buffer = match DeviceBuffer::uninitialized(&self.context, bytes, self.what) {
            Ok(buffer) => buffer,
            Err(error) => panic!("{error}"),
        };
        let ptr = buffer.ptr();
        self.buffers.push((buffer, self.account.charge(Component::Workspace, bytes)));
        ptr
    }
}

//! What the host tells the device before and during a step, through pinned memory that kernels read directly: no
//! copy engine, no waiting, one launch.

use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys;

use super::context::{Context, Function, check};
use super::launch::{Argument, Launch};
use super::memory::{DevicePtr, PinnedBuffer};
use crate::backend::InputWrite;
use crate::buffer::Storage;
use crate::error::Result;

/// Parts of one transfer; the size of the kernel's table.
const MAX_SEGMENTS: usize = 8;

/// Bytes of a slot before anything was asked for.
const INITIAL_BYTES: usize = 64 * 1024;

/// Slots that the host fills while kernels read the others.
const SLOTS: usize = 3;

/// Pinned memory in a few slots, used in turn.
#[derive(Debug)]
pub(crate) struct Staging {
    context: Arc<Context>,
    slots: [Slot; SLOTS],
    next: usize,
    write_inputs: Function,
}

#[derive(Debug)]
struct Slot {
    memory: PinnedBuffer,
    /// Recorded after the last kernel that reads the slot.
    read: sys::CUevent,
}

/// `Segment` of `inputs.cu`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Segment {
    target: DevicePtr,
    first: u32,
    words: u32,
    width: u32,
    stride: u32,
}

// SAFETY: the layout of `Segments` in `inputs.cu`: an address and four words each.
unsafe impl Argument for [Segment; MAX_SEGMENTS] {}

impl Staging {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self> {
        let slot = || {
            let mut read = null_mut();
            let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
            // SAFETY: writes to a local variable.
            check(unsafe { sys::cuEventCreate(&raw mut read, flags) }, "create an event");
            Ok(Slot { memory: PinnedBuffer::new(context, INITIAL_BYTES)?, read })
        };
        Ok(Self {
            context: Arc::clone(context),
            slots: [slot()?, slot()?, slot()?],
            next: 0,
            write_inputs: context.function("write_inputs"),
        })
    }

    /// Fills `bytes` bytes of pinned memory by `fill`, then gives their address on the device to `launch`, which
    /// launches the kernels that read them.
    pub(crate) fn submit(
        &mut self,
        bytes: usize,
        fill: impl FnOnce(&mut [u8]),
        launch: impl FnOnce(&Context, DevicePtr),
    ) -> Result<()> {
        let slot = &mut self.slots[self.next];
        self.next = (self.next + 1) % SLOTS;
        // SAFETY: the event is the slot's own; one that was never recorded has happened.
        check(unsafe { sys::cuEventSynchronize(slot.read) }, "wait for an event");
        if slot.memory.bytes() < bytes {
            slot.memory = PinnedBuffer::new(&self.context, bytes.next_power_of_two())?;
        }
        fill(&mut slot.memory.as_mut_slice()[..bytes]);
        launch(&self.context, slot.memory.device_ptr());
        // SAFETY: both are of this context.
        check(unsafe { sys::cuEventRecord(slot.read, self.context.stream()) }, "record an event");
        Ok(())
    }

    /// Makes all `writes` by one kernel.
    ///
    /// # Panics
    /// More than eight writes, or one that exceeds its buffer.
    pub(crate) fn write_inputs(&mut self, writes: &mut [InputWrite<'_>]) -> Result<()> {
        assert!(writes.len() <= MAX_SEGMENTS, "{} writes at a time, not {}", MAX_SEGMENTS, writes.len());
        let mut segments = [Segment::default(); MAX_SEGMENTS];
        let (mut words, mut longest) = (0, 0);
        for (segment, InputWrite { buffer, values, width, stride }) in segments.iter_mut().zip(&mut *writes) {
            let rows = values.len() / *width;
            assert!(
                rows * *width == values.len() && rows.saturating_sub(1) * *stride + *width <= buffer.len(),
                "{rows} rows of {width} in {} elements",
                buffer.len()
            );
            let Storage::Cuda { memory, dtype: crate::Dtype::U32, .. } = &mut buffer.storage else {
                panic!("step inputs are U32 on the device, this buffer is {:?}", buffer.dtype());
            };
            *segment = Segment {
                target: memory.ptr(),
                first: words as u32,
                words: values.len() as u32,
                width: *width as u32,
                stride: *stride as u32,
            };
            words += values.len();
            longest = longest.max(values.len());
        }
        let fill = |bytes: &mut [u8]| {
            let mut rest = bytes;
            for write in &*writes {
                for &value in write.values {
                    let (word, after) = rest.split_at_mut(4);
                    word.copy_from_slice(&value.to_ne_bytes());
                    rest = after;
                }
            }
        };
        let (function, count) = (self.write_inputs.clone(), writes.len() as u32);
        let launch = Launch::new(1, 256).grid([longest.div_ceil(256).clamp(1, 64) as u32, count, 1]);
        self.submit(words * 4, fill, |context, source| {
            // SAFETY: the targets are buffers of the sizes checked above, borrowed mutably; the source stays as it is
            // until the slot's event.
            unsafe { context.launch(&function, &launch, &[&source, &segments]) };
        })
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        self.context.synchronize();
        for slot in &self.slots {
            // SAFETY: created in `new`, and nothing waits for it any more.
            check(unsafe { sys::cuEventDestroy_v2(slot.read) }, "destroy an event");
        }
    }
}

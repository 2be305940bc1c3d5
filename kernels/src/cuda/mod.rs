//! NVIDIA GPUs of compute capability 9.0 (H100, H200): the driver is opened at run time.

mod context;
mod launch;
mod memory;

pub(crate) use self::context::{Context, Function, Properties};
pub(crate) use self::launch::{Argument, Launch};
pub(crate) use self::memory::{DeviceBuffer, DevicePtr, PinnedBuffer};

//! NVIDIA GPUs of compute capability 9.0 (H100, H200): the driver is opened at run time.

mod context;
mod graph;
mod launch;
mod memory;
mod ops;
mod staging;
mod weight;

pub(crate) use self::context::{Context, Function, Properties};
pub(crate) use self::graph::Graph;
pub(crate) use self::launch::{Argument, Launch};
pub(crate) use self::memory::{DeviceBuffer, DevicePtr, PinnedBuffer};
pub(crate) use self::staging::Staging;
pub(crate) use self::weight::{TiledWeight, Uploader};

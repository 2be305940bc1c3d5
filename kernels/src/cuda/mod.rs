//! NVIDIA GPUs of compute capability 9.0 (H100, H200): the driver is opened at run time.

mod backend;
mod context;
mod gemm;
mod graph;
mod launch;
mod linear;
mod memory;
mod ops;
mod pack;
mod staging;
mod upload;
mod weight;

pub(crate) use self::backend::CudaBackend;
pub(crate) use self::context::{Context, Function};
pub(crate) use self::graph::Graph;
pub(crate) use self::launch::{Argument, Launch};
pub(crate) use self::memory::{DeviceBuffer, DevicePtr};
pub(crate) use self::weight::TiledWeight;

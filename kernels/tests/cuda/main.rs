//! The CUDA backend, held to the CPU's and to the plain loops of `kernels::reference`. Without a GPU every test says that
//! it is skipped.

#![allow(clippy::print_stdout, reason = "a test that is skipped says so, and errors are worth reading")]

mod common;
mod decode;
mod executor;
mod forms;
mod gated;
mod ops;
mod prefill;
mod rotation;

use kernels::{Backend, Device};

/// The GPU's backend; `None`, and a word about it, where there is no GPU.
fn gpu() -> Option<Box<dyn Backend>> {
    let gpu = Device::Cuda { ordinal: 0, strict: false };
    match gpu.check() {
        Ok(()) => Some(kernels::open(gpu).unwrap_or_else(|error| panic!("{error}"))),
        Err(error) => {
            println!("SKIPPED: {error}");
            None
        }
    }
}

//! Numbers and operators: the MX formats, the [`Backend`] seam, and the devices behind it.
//!
//! Nothing here knows HTTP, checkpoints or requests.

mod backend;
mod buffer;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod error;
mod graph;
mod input_form;
mod isa;
mod kv_cache_dtype;
pub mod mx;
pub mod reference;
pub mod tile;
mod weight;

pub use backend::{
    AttentionInputs, Backend, DenseDtype, Device, DeviceMemory, HeadNorm, Heads, HostSpans, InputWrite,
    KV_BLOCK_TOKENS, LinearKernel, PagedKv, SampleParams, TokenLogprobs, WeightSource, open,
};
pub use buffer::{Buffer, Component, Dtype, MemoryAccount};
pub use cpu::PlainRead;
pub use error::{Error, Result};
pub use graph::Graph;
pub use input_form::{InputForm, Preparation};
pub use kv_cache_dtype::KvCacheDtype;
pub use weight::Weight;

//! Launchers of every operator but `linear`; a file per family, named as its device code in `cuda/ops`.

mod attention;
mod embed;
mod kv;
mod norm;
mod rope;
mod rows;
mod sampling;

pub(crate) use self::attention::AttentionOperator;
pub(crate) use self::embed::{EmbedOperator, Table};
pub(crate) use self::kv::{kv_block_bytes, kv_buffer_dtype};
pub(crate) use self::norm::NormOperator;
pub(crate) use self::rope::RopeOperator;
pub(crate) use self::rows::RowOperator;
pub(crate) use self::sampling::{LogprobsOperator, SampleOperator};

use super::DevicePtr;
use crate::buffer::{Buffer, Dtype, Storage};

/// Threads of a warp.
const WARP: usize = 32;

/// The address of a buffer that holds at least `len` elements of `dtype`.
///
/// # Panics
/// It has another element type, fewer elements, or is of another device.
#[track_caller]
pub(super) fn address(buffer: &Buffer, dtype: Dtype, len: usize) -> DevicePtr {
    assert!(buffer.len() >= len, "a buffer of {} elements where {len} are used", buffer.len());
    match &buffer.storage {
        Storage::Cuda { memory, dtype: actual, .. } if *actual == dtype => memory.ptr(),
        Storage::Cuda { dtype: actual, .. } => panic!("a buffer of {actual:?} where {dtype:?} is expected"),
        _ => panic!("a buffer of another device"),
    }
}

/// A dimension as kernels take it.
#[track_caller]
fn int(value: usize) -> i32 {
    i32::try_from(value).expect("dimensions fit 31 bits")
}

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
use crate::input_form::InputForm;

/// Threads of a warp.
const WARP: usize = 32;

/// The address of a buffer that holds at least `len` elements of `dtype`, as they were computed.
///
/// # Panics
/// It has another element type, fewer elements, is of another device, or was left in a form for products.
#[track_caller]
pub(super) fn address(buffer: &Buffer, dtype: Dtype, len: usize) -> DevicePtr {
    assert!(buffer.form() == InputForm::Plain, "{:?} is for products alone", buffer.form());
    element_address(buffer, dtype, len)
}

/// As [`address`], to write elements as they are computed.
#[track_caller]
pub(super) fn output_address(buffer: &mut Buffer, dtype: Dtype, len: usize) -> DevicePtr {
    buffer.set_form(InputForm::Plain);
    element_address(buffer, dtype, len)
}

/// As [`address`], of BF16 for a product, in whatever form.
#[track_caller]
pub(super) fn input_address(buffer: &Buffer, len: usize) -> DevicePtr {
    element_address(buffer, Dtype::Bf16, len)
}

#[track_caller]
fn element_address(buffer: &Buffer, dtype: Dtype, len: usize) -> DevicePtr {
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

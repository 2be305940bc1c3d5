//! Describing matrices to the copy engine.

use std::ffi::c_void;

use cudarc::driver::sys;

use crate::cuda::DevicePtr;
use crate::cuda::context::check;

/// Bytes of a row of a matrix in one box: the width of the swizzle.
const BOX_ROW_BYTES: u32 = 128;

/// Describes `x`, `[rows, cols]` of elements of `element_bytes`, in boxes of 128 bytes by `box_rows` rows. Encoding is
/// arithmetic on the host: less than what a launch takes.
pub(super) fn tensor_map(
    x: DevicePtr,
    element_bytes: usize,
    [rows, cols]: [usize; 2],
    box_rows: u32,
) -> sys::CUtensorMap {
    let data_type = match element_bytes {
        2 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        _ => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
    };
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    let (sizes, strides) = ([cols as u64, rows as u64], [(cols * element_bytes) as u64]);
    let (box_sizes, element_strides) = ([BOX_ROW_BYTES / element_bytes as u32, box_rows], [1, 1]);
    // SAFETY: the arrays have one entry per dimension, strides one less; the address is not followed.
    let result = unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut map,
            data_type,
            sizes.len() as u32,
            x as *mut c_void,
            sizes.as_ptr(),
            strides.as_ptr(),
            box_sizes.as_ptr(),
            element_strides.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    check(result, "describe a tensor");
    map
}

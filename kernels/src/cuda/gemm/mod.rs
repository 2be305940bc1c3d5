//! Products with tiled weights: launchers of `cuda/gemm`.

mod decode;
mod plan;
mod prefill;
mod quantize;
mod tensor_map;

pub(crate) use self::decode::DecodeGemm;
pub(crate) use self::prefill::Prefill;
pub(crate) use self::quantize::{FormArgument, MxGrid, PreparationArgument};

use super::DevicePtr;
use crate::buffer::Dtype;
use crate::input_form::{InputForm, Preparation};

/// `out[m, column + n] = sum_k x[m, k] * weight[n, k] + bias[n]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Product {
    /// `[rows, K]`.
    pub(crate) x: DevicePtr,
    /// What is at `x`: BF16, or as a producer left it.
    pub(crate) form: InputForm,
    /// M.
    pub(crate) rows: usize,
    /// `[rows, out_width]`.
    pub(crate) out: DevicePtr,
    /// BF16 or F32.
    pub(crate) out_dtype: Dtype,
    /// Elements from one row of `out` to the next.
    pub(crate) out_width: usize,
    /// Column of the first result.
    pub(crate) column: usize,
    /// Whether the weight is pairs of gate and up, and the result `silu(gate) * up`: N / 2 columns of BF16.
    pub(crate) is_gated: bool,
    /// What is done to results that are gated, by the kernel for many rows alone: N / 2 is a multiple of 32 then.
    pub(crate) result_preparation: Option<Preparation>,
}

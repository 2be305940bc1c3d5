//! The OCP Microscaling (MX) formats v1.0: elements, shared scales, packing, quantization.

mod block;
mod element;
mod format;
mod grid;
mod isa;
mod load;
mod pack;
mod quantize;
mod random;
mod rotation;
mod scale;
mod tensor;
#[cfg(test)]
mod tests;

pub use format::{Block, Cast, ElementSpec, ElementType, MxFormat, Scheme, Specials, UnknownName};
pub use pack::{pack, unpack};
pub use quantize::{
    ElementRounding, Energy, NonFinite, Values, quantize_block, quantize_dequantize, quantize_rows,
};
pub use rotation::Rotation;
pub(crate) use scale::SharedExponent;
pub use scale::{E8m0, ScaleRounding};
pub use tensor::{MxTensor, MxTensorError};

//! Which kernel multiplies.

use std::sync::Arc;

use super::context::Context;
use super::gemm::{DecodeGemm, MxGrid, Prefill, Preparation, Product};
use super::ops::address;
use super::weight::TiledWeight;
use crate::backend::LinearKernel;
use crate::buffer::{Buffer, Dtype, MemoryAccount};
use crate::error::Result;
use crate::mx::{Block, Scheme};

/// Most rows that one pass over the weights serves: beyond, a second pass takes longer than blocks of 64 rows do.
const DECODE_ROWS: usize = 16;

/// BF16 elements in 16 bytes: where rows of x do not start at such, only the kernels for few rows can read them.
const COPIED_ELEMENTS: usize = 8;

/// Products with weights.
#[derive(Debug)]
pub(crate) struct LinearOperator {
    decode: DecodeGemm,
    prefill: Prefill,
}

impl LinearOperator {
    /// `strict` keeps quantized activations in BF16 where E4M3 would be faster.
    ///
    /// # Errors
    /// Out of memory.
    pub(crate) fn new(context: &Arc<Context>, memory: &Arc<MemoryAccount>, strict: bool) -> Result<Self> {
        Ok(Self { decode: DecodeGemm::new(context), prefill: Prefill::new(context, memory, strict)? })
    }

    /// What executes weights of `scheme`.
    pub(crate) fn kernel(&self, scheme: Option<Scheme>) -> LinearKernel {
        let weight = scheme.map_or("bf16", |scheme| scheme.weight.format.element.spec().name);
        let activation = scheme.and_then(|scheme| scheme.activation);
        let activation = activation.map_or("bf16", |cast| cast.format.element.spec().name);
        LinearKernel { name: format!("cuda_sm90_{weight}_{activation}"), executed: scheme }
    }

    /// See [`Backend::rounded_tokens`](crate::Backend::rounded_tokens).
    pub(crate) fn rounded_tokens(&self) -> u32 {
        self.prefill.inexact_tokens()
    }

    /// Whether inputs of `cols` columns can be prepared so.
    pub(crate) fn supports_input(preparation: Preparation, cols: usize) -> bool {
        cols.is_multiple_of(Block::OCP.size())
            && preparation.activation.is_none_or(|cast| MxGrid::new(cast).is_some())
    }

    /// `out[m, column + n] = sum_k act(x[m])[k] * weight[n, k] + bias[n]`; see [`Backend`](crate::Backend::linear).
    #[allow(clippy::too_many_arguments, reason = "what a product takes")]
    pub(crate) fn linear(
        &self,
        x: &Buffer,
        rows: usize,
        weight: &TiledWeight,
        preparation: Option<Preparation>,
        out: &mut Buffer,
        out_width: usize,
        column: usize,
    ) {
        let [n, k] = weight.layout().shape;
        assert!(column + n <= out_width, "{n} columns from {column} on in rows of {out_width}");
        let x = address(x, Dtype::Bf16, rows * k);
        let (out_dtype, out) = (out.dtype(), address(out, out.dtype(), rows * out_width));
        let product = Product { x, rows, out, out_dtype, out_width, column, is_gated: false };
        // SAFETY: the buffers have the elements, as was checked; allocations are aligned to 256 bytes.
        unsafe { self.multiply(weight, preparation, &product) };
    }

    /// `out[m, i] = silu(gate[m, i]) * up[m, i]` of a weight whose rows are pairs of gate and up; see
    /// [`Backend`](crate::Backend::gated_linear).
    pub(crate) fn gated(
        &self,
        x: &Buffer,
        rows: usize,
        weight: &TiledWeight,
        preparation: Option<Preparation>,
        out: &mut Buffer,
    ) {
        let [n, k] = weight.layout().shape;
        let (out_dtype, out_width) = (Dtype::Bf16, n / 2);
        let x = address(x, Dtype::Bf16, rows * k);
        let out = address(out, out_dtype, rows * out_width);
        let product = Product { x, rows, out, out_dtype, out_width, column: 0, is_gated: true };
        // SAFETY: as above.
        unsafe { self.multiply(weight, preparation, &product) };
    }

    /// # Safety
    /// The addresses have the elements that `product` says, 16-byte aligned.
    unsafe fn multiply(&self, weight: &TiledWeight, preparation: Option<Preparation>, product: &Product) {
        let Product { x, rows, .. } = *product;
        let k = weight.layout().shape[1];
        if rows == 0 {
            return;
        }
        // SAFETY: the caller's promise.
        unsafe {
            if rows > DECODE_ROWS && k.is_multiple_of(COPIED_ELEMENTS) {
                self.prefill.linear(weight, preparation, product);
            } else {
                let x = preparation.map_or(x, |preparation| self.prefill.prepare(preparation, x, [rows, k]));
                self.decode.linear(weight, &Product { x, ..*product });
            }
        }
    }
}

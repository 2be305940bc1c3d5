//! Which kernel multiplies.

use std::sync::Arc;

use super::DevicePtr;
use super::context::Context;
use super::gemm::{DecodeGemm, MxGrid, Prefill, Product};
use super::ops::{input_address, output_address};
use super::weight::TiledWeight;
use crate::backend::LinearKernel;
use crate::buffer::{Buffer, Dtype, MemoryAccount};
use crate::error::Result;
use crate::input_form::{InputForm, Preparation};
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

    /// See [`Backend::input_form`](crate::Backend::input_form); weights and what they declare.
    pub(crate) fn input_form<'a>(
        &self,
        weights: impl IntoIterator<Item = (&'a TiledWeight, Option<Preparation>)>,
        rows: usize,
    ) -> InputForm {
        let mut forms = weights.into_iter().map(|(weight, preparation)| match preparation {
            Some(preparation) if !takes_many_rows(rows, weight) => InputForm::Prepared(preparation),
            _ => self.prefill.input_form(weight, preparation, rows),
        });
        let first = forms.next().unwrap_or_default();
        if forms.all(|form| form == first) { first } else { InputForm::Plain }
    }

    /// The U32 that counts rows which E4M3 had to round, as long as this lives.
    pub(crate) fn inexact(&self) -> DevicePtr {
        self.prefill.inexact()
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
        let out_dtype = out.dtype();
        let out = output_address(out, out_dtype, rows * out_width);
        let (x, form) = (input_address(x, rows * k), x.form());
        let product = Product {
            x,
            form,
            rows,
            out,
            out_dtype,
            out_width,
            column,
            is_gated: false,
            result_preparation: None,
        };
        // SAFETY: the buffers have the elements, as was checked; allocations are aligned to 256 bytes.
        unsafe { self.multiply(weight, preparation, &product) };
    }

    /// `out[m, i] = silu(gate[m, i]) * up[m, i]` of a weight whose rows are pairs of gate and up, in `form` if the kernel
    /// for as many rows can do that; see [`Backend`](crate::Backend::gated_linear).
    pub(crate) fn gated(
        &self,
        x: &Buffer,
        rows: usize,
        weight: &TiledWeight,
        preparation: Option<Preparation>,
        form: InputForm,
        out: &mut Buffer,
    ) {
        let [n, k] = weight.layout().shape;
        let (out_dtype, out_width) = (Dtype::Bf16, n / 2);
        // A block of the kernels for few rows has eight results of a row at a time, and one for many rows not all of them,
        // on which a row's factor in E4M3 depends.
        let left = match form {
            InputForm::Prepared(_) if takes_many_rows(rows, weight) => form,
            _ => InputForm::Plain,
        };
        let result_preparation = match left {
            InputForm::Prepared(preparation) => Some(preparation),
            InputForm::Plain | InputForm::E4m3(_) => None,
        };
        assert!(
            result_preparation.is_none() || out_width.is_multiple_of(Block::OCP.size()),
            "whole blocks in a row of {out_width} results"
        );
        let product = Product {
            x: input_address(x, rows * k),
            form: x.form(),
            rows,
            out: output_address(out, out_dtype, rows * out_width),
            out_dtype,
            out_width,
            column: 0,
            is_gated: true,
            result_preparation,
        };
        // SAFETY: as above.
        unsafe { self.multiply(weight, preparation, &product) };
        out.set_form(left);
    }

    /// # Safety
    /// The addresses have the elements that `product` says, 16-byte aligned.
    unsafe fn multiply(&self, weight: &TiledWeight, preparation: Option<Preparation>, product: &Product) {
        let Product { x, form, rows, .. } = *product;
        let k = weight.layout().shape[1];
        if rows == 0 {
            return;
        }
        // SAFETY: the caller's promise.
        unsafe {
            if takes_many_rows(rows, weight) {
                return self.prefill.linear(weight, preparation, product);
            }
            let x = match (form, preparation) {
                (InputForm::Plain, None) => x,
                (InputForm::Plain, Some(preparation)) => self.prefill.prepare(preparation, x, [rows, k]),
                (InputForm::Prepared(done), Some(preparation)) if done == preparation => x,
                _ => panic!("an input left as {form:?} for a product of {preparation:?}"),
            };
            self.decode.linear(weight, &Product { x, ..*product });
        }
    }
}

/// Whether the kernels for many rows multiply.
fn takes_many_rows(rows: usize, weight: &TiledWeight) -> bool {
    rows > DECODE_ROWS && weight.layout().shape[1].is_multiple_of(COPIED_ELEMENTS)
}

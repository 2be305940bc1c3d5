//! Launcher of `rows.cu`.

use std::sync::Arc;

use super::{address, int, output_address};
use crate::buffer::{Buffer, Dtype};
use crate::cuda::{Context, Function, Launch};

/// Threads of a block, and the elements each handles in `silu_mul`.
const THREADS: usize = 256;
const VECTOR: usize = 8;

/// Most blocks along a grid's second dimension.
const MAX_GRID_Y: usize = 65_535;

/// Gathering rows, SwiGLU.
#[derive(Debug)]
pub(crate) struct RowOperator {
    context: Arc<Context>,
    gather_rows: Function,
    silu_mul: Function,
}

impl RowOperator {
    pub(crate) fn new(context: &Arc<Context>) -> Self {
        Self {
            gather_rows: context.function("ops_gather_rows"),
            silu_mul: context.function("ops_silu_mul"),
            context: Arc::clone(context),
        }
    }

    /// `out[m] = x[indices[m]]`, rows of `width` elements of one type.
    pub(crate) fn gather_rows(
        &self,
        x: &Buffer,
        indices: &Buffer,
        rows: usize,
        width: usize,
        out: &mut Buffer,
    ) {
        if rows == 0 {
            return;
        }
        let dtype = x.dtype();
        let (x, indices) = (address(x, dtype, width), address(indices, Dtype::U32, rows));
        let out = output_address(out, dtype, rows * width);
        let row_bytes = int(width * dtype.size_bytes());
        // SAFETY: indices and results have the sizes checked above; the indices are of rows of `x`, as every caller of
        // this operator promises.
        unsafe {
            let launch = Launch::new(rows as u32, THREADS as u32);
            self.context.launch(&self.gather_rows, &launch, &[&x, &indices, &out, &row_bytes]);
        }
    }

    /// `out[m, i] = silu(gate_up[m, i]) * gate_up[m, width + i]`, all BF16.
    pub(crate) fn silu_mul(&self, gate_up: &Buffer, rows: usize, width: usize, out: &mut Buffer) {
        if rows == 0 || width == 0 {
            return;
        }
        assert!(rows <= MAX_GRID_Y, "{rows} rows in a step; the kernel takes {MAX_GRID_Y}");
        let gate_up = address(gate_up, Dtype::Bf16, rows * 2 * width);
        let out = output_address(out, Dtype::Bf16, rows * width);
        let grid = [width.div_ceil(THREADS * VECTOR) as u32, rows as u32, 1];
        // SAFETY: both buffers have the elements that `rows` rows take, as checked above.
        unsafe {
            let launch = Launch::new(1, THREADS as u32).grid(grid);
            self.context.launch(&self.silu_mul, &launch, &[&gate_up, &out, &int(width)]);
        }
    }
}

//! Launcher of `norm.cu`.

use std::sync::Arc;

use super::{WARP, address, int, output_address};
use crate::buffer::{Buffer, Dtype};
use crate::cuda::linear::LinearOperator;
use crate::cuda::{Argument, Context, Function, Launch};
use crate::input::InputForm;

/// Elements that a thread handles at a time.
const VECTOR: usize = 8;

/// Most threads of a block.
const MAX_THREADS: usize = 512;

/// Vectors that a thread of the kernels for long rows holds.
const MAX_PIECES: usize = 4;

/// RMS norms.
#[derive(Debug)]
pub(crate) struct NormOperator {
    context: Arc<Context>,
    /// [F32, BF16] x [one vector per thread, four].
    norm: [[Function; 2]; 2],
    add_norm: [[Function; 2]; 2],
}

impl NormOperator {
    pub(crate) fn new(context: &Arc<Context>) -> Self {
        let resolve =
            |names: [[&'static str; 2]; 2]| names.map(|pair| pair.map(|name| context.function(name)));
        Self {
            norm: resolve([
                ["ops_rms_norm_f32_1", "ops_rms_norm_f32_4"],
                ["ops_rms_norm_bf16_1", "ops_rms_norm_bf16_4"],
            ]),
            add_norm: resolve([
                ["ops_add_rms_norm_f32_1", "ops_add_rms_norm_f32_4"],
                ["ops_add_rms_norm_bf16_1", "ops_add_rms_norm_bf16_4"],
            ]),
            context: Arc::clone(context),
        }
    }

    /// `out[m] = x[m] / sqrt(mean(x[m]^2) + eps) * weight`; `x` F32 or BF16, `weight` F32 `[width]`, `out` BF16, left in
    /// `form`, which `linear` knows.
    #[allow(clippy::too_many_arguments, reason = "one fused kernel")]
    pub(crate) fn rms_norm(
        &self,
        x: &Buffer,
        weight: &Buffer,
        eps: f32,
        rows: usize,
        form: InputForm,
        linear: &LinearOperator,
        out: &mut Buffer,
    ) {
        let width = weight.len();
        let Some((kernel, launch)) = pick(&self.norm, x.dtype(), rows, width) else { return };
        let x = address(x, x.dtype(), rows * width);
        let weight = address(weight, Dtype::F32, width);
        let to = output_address(out, Dtype::Bf16, rows * width);
        let argument = linear.form_argument(form, to, rows * width);
        // SAFETY: every buffer has the elements that `rows` rows of `width` take, as checked above.
        unsafe { self.context.launch(kernel, &launch, &[&x, &weight, &to, &int(width), &eps, &argument]) };
        out.set_form(form);
    }

    /// `residual[m] += delta[m]`, then the norm of the residual into `out`; `residual` F32 or BF16, `delta` BF16.
    #[allow(clippy::too_many_arguments, reason = "one fused kernel")]
    pub(crate) fn add_rms_norm(
        &self,
        delta: &Buffer,
        residual: &mut Buffer,
        weight: &Buffer,
        eps: f32,
        rows: usize,
        form: InputForm,
        linear: &LinearOperator,
        out: &mut Buffer,
    ) {
        let width = weight.len();
        let Some((kernel, launch)) = pick(&self.add_norm, residual.dtype(), rows, width) else { return };
        let delta = address(delta, Dtype::Bf16, rows * width);
        let residual = address(residual, residual.dtype(), rows * width);
        let weight = address(weight, Dtype::F32, width);
        let to = output_address(out, Dtype::Bf16, rows * width);
        let argument = linear.form_argument(form, to, rows * width);
        // SAFETY: as above.
        unsafe {
            let arguments: [&dyn Argument; 7] =
                [&delta, &residual, &weight, &to, &int(width), &eps, &argument];
            self.context.launch(kernel, &launch, &arguments);
        }
        out.set_form(form);
    }
}

/// The kernel for rows of `width`, and its launch: both depend on `width` alone, as the order of the sums does. `None`
/// if there is nothing to do.
fn pick(
    kernels: &[[Function; 2]; 2],
    dtype: Dtype,
    rows: usize,
    width: usize,
) -> Option<(&Function, Launch)> {
    let vectors = width.div_ceil(VECTOR);
    let many = vectors > MAX_THREADS;
    let pieces = if many { MAX_PIECES } else { 1 };
    assert!(
        vectors <= MAX_THREADS * pieces,
        "norms are of at most {} elements",
        MAX_THREADS * pieces * VECTOR
    );
    let threads = vectors.div_ceil(pieces).next_multiple_of(WARP);
    let kernel = &kernels[usize::from(dtype == Dtype::Bf16)][usize::from(many)];
    (rows > 0 && width > 0).then(|| (kernel, Launch::new(rows as u32, threads as u32)))
}

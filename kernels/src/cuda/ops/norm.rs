//! Launcher of `norm.cu`.

use std::sync::Arc;

use super::{WARP, address, int, output_address};
use crate::buffer::{Buffer, Dtype};
use crate::cuda::gemm::FormArgument;
use crate::cuda::{Argument, Context, DevicePtr, Function, Launch};
use crate::input_form::InputForm;

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
    /// U32: rows that E4M3 had to round.
    inexact: DevicePtr,
}

impl NormOperator {
    /// `inexact` counts rows that E4M3 had to round, as long as this lives.
    pub(crate) fn new(context: &Arc<Context>, inexact: DevicePtr) -> Self {
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
            inexact,
        }
    }

    /// `out[m] = x[m] / sqrt(mean(x[m]^2) + eps) * weight`; `x` F32 or BF16, `weight` F32 `[width]`, `out` BF16, left in
    /// `form`.
    pub(crate) fn rms_norm(
        &self,
        x: &Buffer,
        weight: &Buffer,
        eps: f32,
        rows: usize,
        form: InputForm,
        out: &mut Buffer,
    ) {
        // SAFETY: these are the kernels without `delta`.
        unsafe { self.launch(&self.norm, None, x, weight, eps, rows, form, out) };
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
        out: &mut Buffer,
    ) {
        // SAFETY: these are the kernels with `delta`; nobody else has the residual.
        unsafe { self.launch(&self.add_norm, Some(delta), residual, weight, eps, rows, form, out) };
    }

    /// Launches the one of `kernels` that is for rows as long.
    ///
    /// # Safety
    /// They take `delta`, and add it to `x`, if there is one.
    #[allow(clippy::too_many_arguments, reason = "one fused kernel")]
    unsafe fn launch(
        &self,
        kernels: &[[Function; 2]; 2],
        delta: Option<&Buffer>,
        x: &Buffer,
        weight: &Buffer,
        eps: f32,
        rows: usize,
        form: InputForm,
        out: &mut Buffer,
    ) {
        let width = weight.len();
        let Some((kernel, launch)) = pick(kernels, x.dtype(), rows, width) else { return };
        let delta = delta.map(|delta| address(delta, Dtype::Bf16, rows * width));
        let x = address(x, x.dtype(), rows * width);
        let weight = address(weight, Dtype::F32, width);
        let to = output_address(out, Dtype::Bf16, rows * width);
        let argument = FormArgument::new(form, to, rows * width, self.inexact);
        let arguments: [&dyn Argument; 7] =
            [&delta.unwrap_or_default(), &x, &weight, &to, &int(width), &eps, &argument];
        let arguments = if delta.is_some() { &arguments[..] } else { &arguments[1..] };
        // SAFETY: every buffer has the elements that `rows` rows of `width` take, as checked above; the rest is the caller's
        // promise.
        unsafe { self.context.launch(kernel, &launch, arguments) };
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

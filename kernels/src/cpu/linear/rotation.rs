//! Rotation of a product's input, before it is quantized.

use super::SERIAL_ELEMENTS;
use crate::cpu::memory::Scratch;
use crate::cpu::pool::{DisjointSlices, Pool};
use crate::mx::Scheme;

/// `x` `[tokens, cols]`, rotated as `scheme` says.
pub(crate) fn rotate<'s>(
    pool: &mut Pool,
    scratch: &'s mut Scratch,
    scheme: Scheme,
    x: &[f32],
    tokens: usize,
    cols: usize,
) -> &'s [f32] {
    let rotated = scratch.take(tokens * cols);
    if tokens * cols < SERIAL_ELEMENTS {
        rotated.copy_from_slice(&x[..tokens * cols]);
        scheme.rotate(rotated);
    } else {
        let pieces = DisjointSlices::new(rotated, cols);
        pool.run(tokens, &|m, _| {
            // SAFETY: each row is taken once.
            let row = unsafe { pieces.slice(m) };
            row.copy_from_slice(&x[m * cols..][..cols]);
            scheme.rotate(row);
        });
    }
    rotated
}

//! Error diffusion: greedy path following (GPFQ: Lybrand and Saab, arXiv 2010.15979; Zhang, Zhou and Saab, arXiv
//! 2201.11113), in terms of the Gram matrix, columns in storage order.

use super::diffusion::Diffusion;
use super::{Problem, Quantized};

/// Rounds each element to where the sum of all errors so far, seen through the calibration inputs, is least:
/// `q_t = Q(w_t + sum_{s<t} (w_s - q_s) H[t, s] / H[t, t])`. Needs no inverse and no damping.
pub fn error_diffusion(problem: &Problem<'_>) -> Quantized {
    let cols = problem.cols;
    let mut shares = vec![0.0; cols * cols];
    for t in 0..cols {
        let own = problem.importance(t);
        // An input that is always zero neither gives nor takes.
        if own > 0.0 {
            let row = &problem.hessian[t * cols..][..t];
            shares[t * cols..].iter_mut().zip(row).for_each(|(share, h)| *share = h / own);
        }
    }
    Diffusion { order: (0..cols as u32).collect(), shares }.quantize(problem)
}

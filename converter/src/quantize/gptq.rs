//! GPTQ (Frantar et al., arXiv 2210.17323) with the block scales of MX: chosen before the first column is rounded, so
//! that the columns can be visited by importance while they stay in place.
//!
//! Written as LDLQ (Chee et al., arXiv 2307.13304, theorem 6, which shows both to be the same): with `H = M M'`, M upper
//! triangular in the order of the visits, `q_t = Q(w_t + sum_{s<t} (w_s - q_s) M[s, t] / M[t, t])`. That needs one
//! factorization, and no inverse.

use super::cholesky::UpperFactor;
use super::descent::descend;
use super::diffusion::Diffusion;
use super::{Problem, Quantized};

/// Which column is rounded first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ColumnOrder {
    /// As they are stored.
    Storage,
    /// Those of the largest inputs first: later columns make up for the errors of earlier ones.
    Importance,
}

/// Share of the mean of the Hessian's diagonal that is added to it.
pub(super) const DAMPING: f64 = 0.01;

/// Rounds `problem.weight`, column by column, and then lowers the error in `sweeps` passes of coordinate descent.
pub fn gptq(problem: &Problem<'_>, order: ColumnOrder, sweeps: usize) -> Quantized {
    let cols = problem.cols;
    let mut columns: Vec<u32> = (0..cols as u32).collect();
    if order == ColumnOrder::Importance {
        let importance = |column: &u32| problem.importance(*column as usize);
        columns.sort_by(|a, b| importance(b).total_cmp(&importance(a)));
    }
    let factor = UpperFactor::new(problem.hessian, &columns, DAMPING);
    let mut quantized = Diffusion { shares: factor.shares(), order: columns }.quantize(problem);
    descend(problem, DAMPING, sweeps, &mut quantized);
    quantized
}

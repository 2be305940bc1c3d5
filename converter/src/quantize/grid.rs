//! One element at a time onto the grid of a block, and the choice of a block's scale when errors have weights.

use kernels::mx::{Block, Cast, E8m0, ElementType, ScaleRounding, quantize_block};

/// The shared scale of one block `x` by the rule of `cast`. [`ScaleRounding::Mse`] weighs each element's squared error
/// by `importance`: the best of `even` - 1, `even`, `even` + 1; of equals `even`'s own, then the lower.
pub(super) fn block_scale(cast: Cast, x: &[f32], importance: &[f32]) -> E8m0 {
    let mut codes = [0; Block::MAX];
    if cast.scale_rounding != ScaleRounding::Mse {
        return quantize_block(cast, x, &mut codes[..x.len()]);
    }
    let even = Cast { scale_rounding: ScaleRounding::Even, ..cast };
    let start = quantize_block(even, x, &mut codes[..x.len()]);
    let error = |scale: E8m0| -> f64 {
        let grid = Grid::new(cast.format.element, scale);
        let squares = x.iter().zip(importance).map(|(&x, &weight)| {
            let error = f64::from(x) - f64::from(grid.value(grid.encode(x)));
            error * error * f64::from(weight)
        });
        squares.sum()
    };
    let mut best = (error(start), start);
    for candidate in neighbours(start) {
        let error = error(candidate);
        if error < best.0 {
            best = (error, candidate);
        }
    }
    best.1
}

/// The scales one binade below and above, within E8M0.
pub(super) fn neighbours(scale: E8m0) -> [E8m0; 2] {
    [E8m0(scale.0.saturating_sub(1)), E8m0((scale.0 + 1).min(254))]
}

/// The values that an element can have under one scale.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    element: ElementType,
    scale: f32,
    reciprocal: f64,
}

impl Grid {
    /// `scale` is not NaN.
    pub(super) fn new(element: ElementType, scale: E8m0) -> Self {
        let value = scale.to_f32();
        // F64 holds the reciprocals of all powers of two.
        Self { element, scale: value, reciprocal: f64::from(value).recip() }
    }

    /// The code of the nearest value.
    pub(super) fn encode(self, x: f32) -> u8 {
        self.element.encode(f64::from(x) * self.reciprocal)
    }

    /// The value of a code.
    pub(super) fn value(self, code: u8) -> f32 {
        self.element.values()[usize::from(code)] * self.scale
    }
}

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
    values: &'static [f32; 256],
    /// See [`thresholds`]; none for elements that have no such table.
    thresholds: &'static [f32],
    sign_bit: u8,
    scale: f32,
    reciprocal: f64,
}

impl Grid {
    /// `scale` is not NaN.
    pub(super) fn new(element: ElementType, scale: E8m0) -> Self {
        let (value, bits) = (scale.to_f32(), element.spec().bits);
        Self {
            element,
            values: element.values(),
            thresholds: thresholds(element),
            sign_bit: 1 << (bits - 1),
            scale: value,
            // F64 holds the reciprocals of all powers of two.
            reciprocal: f64::from(value).recip(),
        }
    }

    /// The code of the value nearest to a finite x, as [`ElementType::encode`] defines it.
    #[inline]
    pub(super) fn encode(self, x: f32) -> u8 {
        let scaled = f64::from(x) * self.reciprocal;
        if self.thresholds.is_empty() {
            return self.element.encode(scaled);
        }
        // To F32: only what is far below the least threshold is rounded, or above the greatest.
        let magnitude = scaled.abs() as f32;
        let code: u8 = self.thresholds.iter().map(|threshold| u8::from(magnitude >= *threshold)).sum();
        if x.is_sign_negative() { code | self.sign_bit } else { code }
    }

    /// The value of a code.
    #[inline]
    pub(super) fn value(self, code: u8) -> f32 {
        self.values[usize::from(code)] * self.scale
    }
}

/// Most magnitudes above zero of an element that has [`thresholds`].
const MAGNITUDES: usize = 31;

/// The least magnitudes that are rounded to code 1, 2, … of floats of up to six bits, whose codes count their
/// magnitudes; nothing for others.
fn thresholds(element: ElementType) -> &'static [f32] {
    const fn table(element: ElementType) -> [f32; MAGNITUDES] {
        let values = element.values();
        let mut table = [f32::INFINITY; MAGNITUDES];
        let mut code = 0;
        while code < MAGNITUDES {
            let middle = (values[code] + values[code + 1]) / 2.0;
            // Ties are for the even code.
            table[code] = if code % 2 == 1 { middle } else { middle.next_up() };
            code += 1;
        }
        table
    }
    static E2M1: [f32; MAGNITUDES] = table(ElementType::E2m1);
    static E3M0: [f32; MAGNITUDES] = table(ElementType::E3m0);
    static E2M3: [f32; MAGNITUDES] = table(ElementType::E2m3);
    static E3M2: [f32; MAGNITUDES] = table(ElementType::E3m2);
    match element {
        ElementType::E2m1 => &E2M1[..7],
        ElementType::E3m0 => &E3M0[..7],
        ElementType::E2m3 => &E2M3,
        ElementType::E3m2 => &E3M2,
        ElementType::Int8 | ElementType::Int4 | ElementType::E4m3 | ElementType::E5m2 => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On every value, between each two of them, just beside both, and far outside.
    #[test]
    fn codes_are_those_of_the_definition() {
        for element in ElementType::ALL {
            for scale in [E8m0(0), E8m0(1), E8m0(100), E8m0::ONE, E8m0(150)] {
                let grid = Grid::new(element, scale);
                let mut values: Vec<f32> = element
                    .values()
                    .iter()
                    .map(|value| value * scale.to_f32())
                    .filter(|v| v.is_finite())
                    .collect();
                values.sort_by(f32::total_cmp);
                let middles: Vec<f32> = values.windows(2).map(|pair| pair[0] / 2.0 + pair[1] / 2.0).collect();
                let beside = values.iter().chain(&middles).flat_map(|x| [x.next_down(), *x, x.next_up()]);
                for x in beside.chain([f32::MAX, -f32::MAX, f32::MIN_POSITIVE, -0.0, 0.0]) {
                    let expected = element.encode(f64::from(x) / f64::from(scale.to_f32()));
                    assert_eq!(grid.encode(x), expected, "{element:?} {scale:?} {x:e}");
                    assert_eq!(
                        grid.value(expected),
                        element.values()[usize::from(expected)] * scale.to_f32()
                    );
                }
            }
        }
    }
}

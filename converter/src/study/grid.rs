//! Rounding onto an element's values in plain floating-point arithmetic, for blocks of any size. What it is held to is
//! [`ElementType::encode`](kernels::mx::ElementType::encode).

use kernels::mx::ElementSpec;

/// The values of an element type.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    /// F32 mantissa bits below the element's.
    shift: u32,
    max: f32,
    /// Below this, values are multiples of `step`; integers are so everywhere.
    min_normal: f32,
    step: f32,
    /// 2^-mantissa bits: from a binade to the distance of its values.
    ulp: f32,
}

impl Grid {
    pub(super) fn new(spec: &ElementSpec) -> Self {
        let ulp = (-(spec.mantissa_bits as f32)).exp2();
        let (min_normal, step) = if spec.is_integer() {
            (f32::INFINITY, ulp)
        } else {
            let min_normal = (spec.emin() as f32).exp2();
            (min_normal, min_normal * ulp)
        };
        Self { shift: 23 - spec.mantissa_bits, max: spec.max, min_normal, step, ulp }
    }

    /// The nearest value of finite `y`, ties to the even code, saturating.
    #[inline]
    pub(super) fn nearest(self, y: f32) -> f32 {
        let magnitude = y.abs().min(self.max);
        // The last kept bit has the parity of the code, also where it is an exponent bit (E3M0): biases are odd.
        let bits = magnitude.to_bits();
        let half_less_one = (1 << (self.shift - 1)) - 1;
        let normal =
            f32::from_bits(((bits + half_less_one + (bits >> self.shift & 1)) >> self.shift) << self.shift);
        // The sum's last mantissa bit is worth `step`.
        let magic = self.step * 8_388_608.0;
        let subnormal = (magnitude + magic) - magic;
        let rounded = if magnitude < self.min_normal { subnormal } else { normal };
        rounded.copysign(y)
    }

    /// One of the two values around finite `y`, away from zero with probability by distance: `uniform` is in [0, 1).
    #[inline]
    pub(super) fn stochastic(self, y: f32, uniform: f32) -> f32 {
        let magnitude = y.abs().min(self.max);
        let binade = f32::from_bits(magnitude.to_bits() & 0x7f80_0000);
        let step = if magnitude < self.min_normal { self.step } else { binade * self.ulp };
        ((magnitude / step + uniform).floor() * step).min(self.max).copysign(y)
    }
}

#[cfg(test)]
mod tests {
    use kernels::mx::ElementType;

    use super::*;

    #[test]
    fn rounding_is_that_of_the_formats() {
        for element in ElementType::ALL {
            let grid = Grid::new(element.spec());
            let mut rng = fastrand::Rng::with_seed(7);
            let finite = element.values().iter().copied().filter(|value| value.is_finite());
            let mut values: Vec<f32> = finite.collect();
            values.sort_by(f32::total_cmp);
            // Every value, every tie between neighbours, what lies beyond, and anything.
            let ties = values.windows(2).map(|pair| f32::midpoint(pair[0], pair[1]));
            let max = element.spec().max;
            let mut inputs: Vec<f32> = ties.chain(values.iter().copied()).collect();
            inputs.extend([3.0 * max, -3.0 * max]);
            inputs.extend((0..20_000).map(|_| (rng.f32() - 0.5) * 2.2 * max * (-12.0 * rng.f32()).exp2()));
            for y in inputs {
                let expected = element.decode(element.encode(y));
                assert_eq!(grid.nearest(y), expected, "{element:?} {y}");
            }
        }
    }

    #[test]
    fn stochastic_rounding_is_unbiased_and_takes_neighbours_only() {
        for element in ElementType::ALL {
            let grid = Grid::new(element.spec());
            let mut rng = fastrand::Rng::with_seed(11);
            for _ in 0..40 {
                let y = (rng.f32() - 0.5) * 1.9 * element.spec().max;
                let draws: Vec<f32> = (0..4000).map(|_| grid.stochastic(y, rng.f32())).collect();
                let mut kinds = draws.clone();
                kinds.sort_by(f32::total_cmp);
                kinds.dedup();
                assert!(kinds.len() <= 2, "{element:?} {y}: {kinds:?}");
                assert!(kinds.iter().all(|&value| element.decode(element.encode(value)) == value));
                let gap = grid.stochastic(y, 0.999_999_9) - grid.stochastic(y, 0.0);
                let mean = draws.iter().map(|&x| f64::from(x)).sum::<f64>() / draws.len() as f64;
                // Five standard errors of a coin.
                let tolerance = f64::from(gap.abs()) * 0.5 * 5.0 / (draws.len() as f64).sqrt()
                    + 1e-5 * f64::from(y.abs());
                assert!((mean - f64::from(y)).abs() <= tolerance, "{element:?} {y}: {mean}");
            }
        }
    }
}

//! What a list of measurements comes to.

/// Mean, spread and order of some measurements.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Summary {
    /// Arithmetic mean.
    pub(super) mean: f64,
    /// Sample standard deviation; 0 for a single measurement.
    pub(super) std: f64,
    /// Half are below.
    pub(super) median: f64,
}

impl Summary {
    /// Of at least one value; of none, zeros.
    pub(super) fn of(values: &[f64]) -> Self {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n.max(1.0);
        let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
        Self { mean, std: (squares / (n - 1.0).max(1.0)).sqrt(), median: quantile(values, 0.5) }
    }
}

/// The value that a share `q` of `values` does not exceed, between neighbours in proportion; 0 of none.
pub(super) fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let place = q * last as f64;
    let (below, above) = (place.floor() as usize, place.ceil() as usize);
    sorted[below] + (sorted[above] - sorted[below]) * place.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries() {
        let summary = Summary::of(&[4.0, 1.0, 2.0, 5.0]);
        assert_eq!((summary.mean, summary.median), (3.0, 3.0));
        assert!((summary.std - (10.0_f64 / 3.0).sqrt()).abs() < 1e-12);
        assert_eq!(Summary::of(&[7.0]), Summary { mean: 7.0, std: 0.0, median: 7.0 });
        assert_eq!(Summary::of(&[]), Summary { mean: 0.0, std: 0.0, median: 0.0 });
    }

    #[test]
    fn quantiles_are_between_neighbours() {
        let values = [3.0, 1.0, 2.0];
        assert_eq!([0.0, 0.5, 0.75, 1.0].map(|q| quantile(&values, q)), [1.0, 2.0, 2.5, 3.0]);
    }
}

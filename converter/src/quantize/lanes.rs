//! Rows side by side: the loops of the calibrated methods run over columns one after the other, and over rows in
//! vectors of [`LANES`].

/// Rows that are worked on together.
pub(super) const LANES: usize = 16;

/// One value of each row.
pub(super) type Lane = [f32; LANES];

/// Up to [`LANES`] rows `[_, cols]`, column by column; lanes without a row are zero.
pub(super) fn transpose(rows: &[f32], cols: usize) -> Vec<Lane> {
    let mut lanes = vec![[0.0; LANES]; cols];
    for (i, row) in rows.chunks_exact(cols).enumerate() {
        for (lane, &value) in lanes.iter_mut().zip(row) {
            lane[i] = value;
        }
    }
    lanes
}

/// `sum_s coefficients[s] * values[s]`, lane by lane.
// Inlined into a loop over columns, its sums are not kept in vector registers: ten times slower.
#[inline(never)]
pub(super) fn weighted_sum(coefficients: &[f32], values: &[Lane]) -> Lane {
    // Four chains of additions: one would wait for itself.
    let mut sums = [[0.0; LANES]; 4];
    let (fours, rest) = coefficients.as_chunks::<4>();
    let (value_fours, value_rest) = values[..coefficients.len()].as_chunks::<4>();
    for (c, v) in fours.iter().zip(value_fours) {
        for ((sum, c), v) in sums.iter_mut().zip(c).zip(v) {
            add_scaled(sum, *c, v);
        }
    }
    for (c, v) in rest.iter().zip(value_rest) {
        add_scaled(&mut sums[0], *c, v);
    }
    let [a, b, c, d] = sums;
    std::array::from_fn(|i| (a[i] + b[i]) + (c[i] + d[i]))
}

/// `sum += factor * values`.
#[inline]
pub(super) fn add_scaled(sum: &mut Lane, factor: f32, values: &Lane) {
    for (sum, value) in sum.iter_mut().zip(values) {
        *sum += factor * value;
    }
}

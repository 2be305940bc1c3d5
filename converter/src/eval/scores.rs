//! What rows of logits say about the tokens that followed. Logits are F32, sums F64.

use std::num::NonZeroUsize;

use super::runner::Chunk;

/// What one row of logits says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct RowScore {
    /// Negative log-likelihood of the token that followed, in nats.
    pub(super) nll: f64,
    /// Distance to the row of another model.
    pub(super) distance: Option<RowDistance>,
}

/// How far a row is from the baseline's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct RowDistance {
    /// Kullback-Leibler divergence from the baseline's distribution to this one, in nats.
    pub(super) kl: f64,
    /// Both have the same most likely token (of equals, the lowest id).
    pub(super) same_top: bool,
}

/// Scores every row of `chunk` on `threads` threads; `baseline` holds another model's logits of the same rows.
pub(super) fn score(chunk: &Chunk<'_>, baseline: Option<&[f32]>, threads: NonZeroUsize) -> Vec<RowScore> {
    let count = chunk.scored.len();
    let width = chunk.logits.len() / count.max(1);
    let one = |index: usize| {
        let row = |logits: &[f32]| -> std::ops::Range<usize> {
            debug_assert_eq!(logits.len(), count * width);
            index * width..(index + 1) * width
        };
        let logits = &chunk.logits[row(chunk.logits)];
        let target = chunk.scored[index].token;
        match baseline {
            None => RowScore { nll: nll(logits, target), distance: None },
            Some(all) => against(logits, &all[row(all)], target),
        }
    };
    let mut scores = vec![RowScore { nll: 0.0, distance: None }; count];
    let part = count.div_ceil(threads.get()).max(1);
    std::thread::scope(|scope| {
        for (index, part_scores) in scores.chunks_mut(part).enumerate() {
            let one = &one;
            scope.spawn(move || {
                for (offset, score) in part_scores.iter_mut().enumerate() {
                    *score = one(index * part + offset);
                }
            });
        }
    });
    scores
}

/// Negative log-likelihood of `target`, in nats, by the logits `row`.
pub(crate) fn nll(row: &[f32], target: u32) -> f64 {
    log_sum_exp(row) - f64::from(row[target as usize])
}

/// ln of the sum of e^x.
fn log_sum_exp(row: &[f32]) -> f64 {
    let max = max(row);
    let sum: f64 = row.iter().map(|&x| f64::from((x - max).exp())).sum();
    f64::from(max) + sum.ln()
}

fn max(row: &[f32]) -> f32 {
    row.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

fn against(row: &[f32], baseline: &[f32], target: u32) -> RowScore {
    let pair = Pair::new(row, baseline);
    let top = |row: &[f32], max: f32| row.iter().position(|&x| x == max);
    let same_top = top(row, pair.row_max) == top(baseline, pair.baseline_max);
    RowScore {
        nll: pair.row_lse - f64::from(row[target as usize]),
        distance: Some(RowDistance { kl: pair.kl, same_top }),
    }
}

/// Kullback-Leibler divergence, in nats, from the distribution of the logits `baseline` to that of `row`.
pub(crate) fn kl_divergence(row: &[f32], baseline: &[f32]) -> f64 {
    Pair::new(row, baseline).kl
}

/// Two rows of logits over one vocabulary.
#[derive(Debug, Clone, Copy)]
struct Pair {
    row_max: f32,
    baseline_max: f32,
    row_lse: f64,
    kl: f64,
}

impl Pair {
    fn new(row: &[f32], baseline: &[f32]) -> Self {
        let (row_max, baseline_max) = (max(row), max(baseline));
        let (mut row_sum, mut baseline_sum, mut weighted) = (0.0, 0.0, 0.0);
        for (&x, &b) in row.iter().zip(baseline) {
            let p = f64::from((b - baseline_max).exp());
            row_sum += f64::from((x - row_max).exp());
            baseline_sum += p;
            weighted += p * f64::from(b - x);
        }
        let row_lse = f64::from(row_max) + row_sum.ln();
        let baseline_lse = f64::from(baseline_max) + baseline_sum.ln();
        // Sum of p (ln p - ln q); rounding can leave a trace below zero where the rows are equal. Not `max`, which
        // would hide that a logit is no number.
        let kl = weighted / baseline_sum - (baseline_lse - row_lse);
        Self { row_max, baseline_max, row_lse, kl: if kl < 0.0 { 0.0 } else { kl } }
    }
}

#[cfg(test)]
mod tests {
    use super::super::runner::Scored;
    use super::*;

    fn scored(tokens: &[u32]) -> Vec<Scored> {
        tokens.iter().map(|&token| Scored { sequence: 0, position: 1, token }).collect()
    }

    #[test]
    fn scores_are_those_of_the_definitions() {
        // Row 0 has probabilities 1/2, 1/4, 1/4; row 1 8/10, 1/10, 1/10.
        let ln = |p: f32| p.ln();
        let logits = [ln(2.0), ln(1.0), ln(1.0), ln(8.0) + 50.0, 50.0, 50.0];
        let baseline = [0.0, 0.0, ln(2.0), ln(8.0) - 7.0, -7.0, -7.0];
        let targets = scored(&[1, 0]);
        let chunk = Chunk { first: 0, scored: &targets, logits: &logits };
        for threads in [1, 2, 5] {
            let scores = score(&chunk, Some(&baseline), NonZeroUsize::new(threads).unwrap());
            let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-6, "{a} {b}");
            near(scores[0].nll, 4.0_f64.ln());
            near(scores[1].nll, -(0.8_f64.ln()));
            let distances: Vec<_> = scores.iter().map(|s| s.distance.unwrap()).collect();
            // 1/4 ln(1/2) + 1/4 ln(1) + 1/2 ln(2).
            near(distances[0].kl, 0.25 * 2.0_f64.ln());
            near(distances[1].kl, 0.0);
            assert_eq!([distances[0].same_top, distances[1].same_top], [false, true]);
            let alone = score(&chunk, None, NonZeroUsize::MIN);
            near(alone[0].nll, scores[0].nll);
            assert_eq!(alone[1].distance, None);
        }
    }

    #[test]
    fn a_logit_that_is_no_number_shows() {
        let targets = scored(&[0]);
        let chunk = Chunk { first: 0, scored: &targets, logits: &[f32::NAN, 1.0] };
        assert!(score(&chunk, None, NonZeroUsize::MIN)[0].nll.is_nan());
    }
}

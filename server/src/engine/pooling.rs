//! A prompt's hidden states as one vector.

use super::request::Pooling;

/// What was seen of a prompt so far.
#[derive(Debug)]
pub(super) struct PoolingState {
    pooling: Pooling,
    /// The sum of the rows, or the last of them. Added up one by one in twice the precision, so that the result does not
    /// depend on how the prompt was cut into chunks.
    sum: Vec<f64>,
    rows: usize,
}

impl PoolingState {
    pub(super) fn new(pooling: Pooling) -> Self {
        Self { pooling, sum: Vec::new(), rows: 0 }
    }

    /// How.
    pub(super) fn pooling(&self) -> Pooling {
        self.pooling
    }

    /// Adds hidden states, `[_, width]`, of the tokens that follow.
    pub(super) fn add(&mut self, hidden: &[f32], width: usize) {
        self.sum.resize(width, 0.0);
        for row in hidden.chunks_exact(width) {
            for (sum, &x) in self.sum.iter_mut().zip(row) {
                *sum = match self.pooling {
                    Pooling::Mean => *sum + f64::from(x),
                    Pooling::Last => f64::from(x),
                };
            }
            self.rows += 1;
        }
    }

    /// Forgets all: the prompt is computed again.
    pub(super) fn restart(&mut self) {
        *self = Self::new(self.pooling);
    }

    /// The vector, `[width]`.
    pub(super) fn finish(self) -> Vec<f32> {
        let divisor = match self.pooling {
            Pooling::Mean => self.rows.max(1) as f64,
            Pooling::Last => 1.0,
        };
        self.sum.into_iter().map(|sum| (sum / divisor) as f32).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_and_last_rows() {
        for (pooling, expected) in [(Pooling::Mean, [2.0, 3.0]), (Pooling::Last, [3.0, 4.0])] {
            let mut state = PoolingState::new(pooling);
            state.add(&[9.0, 9.0], 2);
            state.restart();
            state.add(&[1.0, 2.0], 2);
            state.add(&[2.0, 3.0, 3.0, 4.0], 2);
            assert_eq!(state.finish(), expected);
        }
    }
}

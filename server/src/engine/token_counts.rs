//! The tokens of a sequence, counted.

use std::collections::BTreeMap;

/// How often each token occurs, for the penalties. Ordered, so that nothing depends on a hasher's seed.
#[derive(Debug, Default)]
pub(super) struct TokenCounts(BTreeMap<u32, usize>);

impl TokenCounts {
    /// Of a sequence that has its prompt alone.
    pub(super) fn of_prompt(prompt: &[u32]) -> Self {
        Self(prompt.iter().map(|&token| (token, 0)).collect())
    }

    /// The token was generated.
    pub(super) fn generated(&mut self, token: u32) {
        *self.0.entry(token).or_default() += 1;
    }

    /// Every token of the prompt or the output, and how often it was generated.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, usize)> {
        self.0.iter().map(|(&token, &generated)| (token, generated))
    }
}

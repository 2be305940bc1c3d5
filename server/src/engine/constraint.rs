//! What a sequence may say: a grammar, a sequence's place in it, and the tokens that it allows there.
//!
//! The engine knows neither grammars' languages nor text: it asks for masks, and tells what was drawn.

use std::fmt;
use std::sync::Arc;

/// A grammar, compiled once for any number of sequences.
pub trait Grammar: Send + Sync {
    /// The place of a sequence that has no token yet.
    fn begin(&self) -> Box<dyn Constraint>;
}

/// A sequence's place in its grammar.
pub trait Constraint: Send {
    /// The tokens that may come next, end-of-sequence tokens among them where the text may end. Takes its time, on a
    /// thread of its own.
    ///
    /// # Errors
    /// The grammar is too complex to be followed.
    fn allowed(&mut self) -> Result<TokenMask, ConstraintError>;

    /// Moves on by a token that was allowed, quickly.
    ///
    /// # Errors
    /// The token was not allowed.
    fn accept(&mut self, token: u32) -> Result<Progress, ConstraintError>;

    /// What makes [`allowed`](Self::allowed) give up, from another thread; `None` if nothing does.
    fn canceller(&self) -> Option<Canceller> {
        None
    }
}

/// Makes a computation give up.
pub type Canceller = Box<dyn Fn() + Send>;

/// Whether anything may follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// More may follow.
    Open,
    /// The text is complete, and nothing may follow.
    Complete,
}

/// Why a grammar cannot be followed any further.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConstraintError(pub String);

/// The grammar of a request; clones are the same grammar.
#[derive(Clone)]
pub struct SharedGrammar(pub Arc<dyn Grammar>);

impl fmt::Debug for SharedGrammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedGrammar")
    }
}

impl PartialEq for SharedGrammar {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// A set of token ids.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenMask {
    /// Bit `id % 32` of word `id / 32`; ids beyond are not in the set.
    words: Vec<u32>,
}

impl TokenMask {
    /// The set with these bits: bit `id % 32` of word `id / 32`.
    pub fn from_words(words: Vec<u32>) -> Self {
        Self { words }
    }

    /// All ids below `len`.
    pub fn all(len: usize) -> Self {
        let mut words = vec![u32::MAX; len / 32];
        let rest = len % 32;
        if rest > 0 {
            words.push((1 << rest) - 1);
        }
        Self { words }
    }

    /// Whether the id is in the set.
    pub fn contains(&self, id: u32) -> bool {
        self.words.get(id as usize / 32).is_some_and(|word| word >> (id % 32) & 1 == 1)
    }

    /// Adds an id.
    pub fn insert(&mut self, id: u32) {
        let word = id as usize / 32;
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= 1 << (id % 32);
    }

    /// Takes an id out.
    pub fn remove(&mut self, id: u32) {
        if let Some(word) = self.words.get_mut(id as usize / 32) {
            *word &= !(1 << (id % 32));
        }
    }

    /// Makes the logits of all ids outside the set minus infinity.
    pub(super) fn apply(&self, logits: &mut [f32]) {
        let mut words = self.words.iter();
        for chunk in logits.chunks_mut(32) {
            let word = words.next().copied().unwrap_or(0);
            if word == u32::MAX {
                continue;
            }
            for (bit, logit) in chunk.iter_mut().enumerate() {
                if word >> bit & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_of_tokens() {
        let mut mask = TokenMask::from_words(vec![0b101]);
        mask.insert(40);
        mask.insert(41);
        mask.remove(41);
        mask.remove(99);
        let members: Vec<u32> = (0..100).filter(|&id| mask.contains(id)).collect();
        assert_eq!(members, [0, 2, 40]);
        let mut logits = vec![1.0; 70];
        mask.apply(&mut logits);
        let kept: Vec<usize> = (0..70).filter(|&id| logits[id] == 1.0).collect();
        assert_eq!(kept, [0, 2, 40]);
        for len in [0, 31, 32, 33, 64] {
            let all = TokenMask::all(len);
            assert_eq!((0..100).filter(|&id| all.contains(id)).count(), len);
        }
    }
}

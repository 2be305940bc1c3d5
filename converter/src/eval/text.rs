//! Texts as windows of tokens.

use std::path::Path;

use super::EvalError;
use crate::text_tokenizer::TextTokenizer;

/// Windows of equal length, side by side from the beginning of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    tokens: Vec<u32>,
    length: usize,
}

impl Windows {
    /// The first `windows` windows of `length` tokens of a text file, tokenized as a whole.
    ///
    /// # Errors
    /// The file cannot be read or tokenized, or has fewer tokens.
    ///
    /// # Panics
    /// `windows` is 0, or `length` less than 2.
    pub fn read(
        tokenizer: &TextTokenizer,
        path: &Path,
        windows: usize,
        length: usize,
    ) -> Result<Self, EvalError> {
        let text = std::fs::read_to_string(path).map_err(EvalError::io(path))?;
        let tokens = tokenizer.encode(&text)?;
        let short = EvalError::ShortText { path: path.to_owned(), actual: tokens.len(), windows, length };
        Self::new(tokens, windows, length).ok_or(short)
    }

    /// The first `windows` windows of `length` of `tokens`; `None` if these are fewer.
    ///
    /// # Panics
    /// `windows` is 0, or `length` less than 2: no token would be scored.
    pub fn new(mut tokens: Vec<u32>, windows: usize, length: usize) -> Option<Self> {
        assert!(windows > 0 && length > 1, "{windows} windows of {length} tokens score nothing");
        let count = windows.checked_mul(length).filter(|&count| count <= tokens.len())?;
        tokens.truncate(count);
        Some(Self { tokens, length })
    }

    /// The windows.
    pub fn iter(&self) -> std::slice::ChunksExact<'_, u32> {
        self.tokens.chunks_exact(self.length)
    }

    /// Number of windows.
    pub fn count(&self) -> usize {
        self.tokens.len() / self.length
    }

    /// Tokens of each.
    pub fn length(&self) -> usize {
        self.length
    }
}

impl<'a> IntoIterator for &'a Windows {
    type Item = &'a [u32];
    type IntoIter = std::slice::ChunksExact<'a, u32>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_lie_side_by_side_and_need_their_tokens() {
        let windows = Windows::new((0..11).collect(), 2, 5).unwrap();
        assert_eq!(windows.iter().collect::<Vec<_>>(), [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]);
        assert_eq!((windows.count(), windows.length()), (2, 5));
        assert_eq!(Windows::new((0..9).collect(), 2, 5), None);
        assert_eq!(Windows::new(vec![1; 9], usize::MAX, 5), None);
    }
}

//! The calibration text, as windows of tokens.

use std::io::Read;
use std::path::Path;

use models::ModelConfig;

use super::CalibrationError;
use crate::source::{Origin, Source};
use crate::text_tokenizer::TextTokenizer;

/// Text is read up to here: far more than windows are made of, and tokenized in seconds.
const MAX_BYTES: u64 = 16 << 20;

/// CalibrationWindows of tokens: those to calibrate on, and those that stand for texts that have not been seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CalibrationWindows {
    /// All of them, `[tokens]` each.
    pub(crate) tokens: Vec<Vec<u32>>,
    /// The last ones are held out.
    pub(crate) held_out: usize,
}

impl CalibrationWindows {
    /// Up to `count` windows of `length` tokens of `text` for the model in `source`: see [`read`](Self::read).
    pub(crate) fn of(
        source: &Source,
        config: &ModelConfig,
        text: &Path,
        count: usize,
        length: usize,
    ) -> Result<Self, CalibrationError> {
        if !(2..=config.max_model_len).contains(&length) {
            return Err(CalibrationError::Window { window: length, max: config.max_model_len });
        }
        let Origin::Folder { checkpoint, .. } = source.origin() else {
            return Err(CalibrationError::NoFolder { path: source.path_of(None) });
        };
        let tokenizer = TextTokenizer::open(checkpoint.dir())?;
        Self::read(&tokenizer, text, count, length, config.vocab_size)
    }

    /// Up to `count` windows of `length` tokens, spread evenly over the text (its first 16 MiB), in the order of the text
    /// but for those held out, every sixteenth (at least one). No token is added to the text's own.
    pub(crate) fn read(
        tokenizer: &TextTokenizer,
        text: &Path,
        count: usize,
        length: usize,
        vocab: usize,
    ) -> Result<Self, CalibrationError> {
        let mut bytes = Vec::new();
        let file = std::fs::File::open(text).map_err(CalibrationError::io(text))?;
        file.take(MAX_BYTES).read_to_end(&mut bytes).map_err(CalibrationError::io(text))?;
        let ids = tokenizer.encode(&String::from_utf8_lossy(&bytes))?;
        if let Some(&token) = ids.iter().find(|id| **id as usize >= vocab) {
            return Err(CalibrationError::Vocabulary { path: tokenizer.path().to_owned(), token, vocab });
        }
        Self::spread(&ids, count, length).ok_or_else(|| CalibrationError::TooShort {
            path: text.to_owned(),
            tokens: ids.len(),
            window: length,
        })
    }

    /// `None` for less than two windows.
    fn spread(ids: &[u32], count: usize, length: usize) -> Option<Self> {
        const HELD_OUT_OF: usize = 16;
        let available = ids.len() / length;
        let count = count.max(2).min(available);
        if count < 2 {
            return None;
        }
        let (mut seen, mut held_out) = (Vec::new(), Vec::new());
        for i in 0..count {
            let first = i * available / count * length;
            let window = ids[first..first + length].to_vec();
            let group = i % HELD_OUT_OF;
            let last_of_all = i + 1 == count && held_out.is_empty();
            if group == HELD_OUT_OF - 1 || last_of_all { held_out.push(window) } else { seen.push(window) }
        }
        let held_out_count = held_out.len();
        seen.append(&mut held_out);
        Some(Self { tokens: seen, held_out: held_out_count })
    }

    /// CalibrationWindows to calibrate on.
    pub(crate) fn seen(&self) -> usize {
        self.tokens.len() - self.held_out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_spread_over_the_text_and_do_not_overlap() {
        let ids: Vec<u32> = (0..1000).collect();
        let windows = CalibrationWindows::spread(&ids, 32, 10).unwrap();
        assert_eq!((windows.tokens.len(), windows.held_out, windows.seen()), (32, 2, 30));
        let mut firsts: Vec<u32> = windows.tokens.iter().map(|window| window[0]).collect();
        firsts.sort_unstable();
        assert!(firsts.windows(2).all(|pair| pair[1] - pair[0] >= 10));
        assert!(*firsts.last().unwrap() >= 900);
        assert!(windows.tokens.iter().all(|window| window.len() == 10));
    }

    #[test]
    fn short_texts_give_fewer_windows_down_to_two() {
        let ids: Vec<u32> = (0..35).collect();
        let windows = CalibrationWindows::spread(&ids, 128, 10).unwrap();
        assert_eq!((windows.tokens.len(), windows.held_out), (3, 1));
        assert_eq!(CalibrationWindows::spread(&ids, 128, 20), None);
    }
}

//! Text of tokens that arrive one at a time.

use super::Tokenizer;

/// What stands for bytes that are no character.
const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;

/// Longest run of tokens that may be waited for to complete a character. One character has at most four bytes; a
/// longer run of tokens without a whole character is not going to become one.
const MAX_HELD_TOKENS: usize = 8;

/// Turns a growing list of tokens into text, in pieces of whole characters whose concatenation is the text of the
/// whole list.
///
/// A token's text depends on its neighbours (the bytes of one character may be spread over several tokens, and
/// decoders treat the first token differently), so each step decodes a short window: the tokens of the last finished
/// piece, as context, and those after it.
#[derive(Debug)]
pub struct Detokenizer {
    skip_special_tokens: bool,
    /// The window.
    ids: Vec<u32>,
    /// Tokens at the front of the window that are context.
    context: usize,
    /// Bytes of the window's text that were handed out.
    sent: usize,
}

impl Detokenizer {
    /// A detokenizer at the start of a text.
    pub fn new(skip_special_tokens: bool) -> Self {
        Self { skip_special_tokens, ids: Vec::new(), context: 0, sent: 0 }
    }

    /// A detokenizer for what follows `prompt`, which has been shown already.
    pub fn after(prompt: &[u32], tokenizer: &Tokenizer, skip_special_tokens: bool) -> Self {
        // Enough for the context of a first token; more would only be decoded again.
        let mut new = Self::new(skip_special_tokens);
        for &id in &prompt[prompt.len().saturating_sub(MAX_HELD_TOKENS)..] {
            new.push(tokenizer, id);
        }
        // A prompt that ends inside a character: its answer continues it, and what is shown begins after it.
        new
    }

    /// Adds a token; returns the text that is certain now and was not before, possibly none.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        self.ids.push(id);
        let text = tokenizer.decode(&self.ids, self.skip_special_tokens);
        // Where tokens are bytes, all but the last character is certain: nothing is held for long.
        let overdue = !tokenizer.is_byte_level() && self.ids.len() - self.context >= MAX_HELD_TOKENS;
        let certain = certain_len(tokenizer, &text, overdue);
        let piece = self.take(&text[..certain]);
        if certain == text.len() || overdue {
            self.advance(tokenizer, overdue);
        }
        piece
    }

    /// The rest of the text, when no more tokens follow: bytes of an unfinished character become `�`.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> String {
        let text = tokenizer.decode(&self.ids, self.skip_special_tokens);
        self.take(&text)
    }

    /// What of the window's text was not handed out yet.
    fn take(&mut self, text: &str) -> String {
        // A byte that fits nothing can make a decoder take back the characters before it. Then `sent` is no position
        // in the text, and there is nothing to add until it is one again.
        let Some(piece) = text.get(self.sent..) else { return String::new() };
        self.sent = text.len();
        piece.to_owned()
    }

    /// Makes the tokens after the context the new context.
    fn advance(&mut self, tokenizer: &Tokenizer, overdue: bool) {
        self.ids.drain(..self.context);
        self.context = self.ids.len();
        let text = tokenizer.decode(&self.ids, self.skip_special_tokens);
        self.sent = certain_len(tokenizer, &text, overdue);
    }
}

/// Bytes of `text` that further tokens do not change, as far as its end tells.
fn certain_len(tokenizer: &Tokenizer, text: &str, overdue: bool) -> usize {
    if tokenizer.is_byte_level() {
        // However many bytes of a character are there, they are one `�`; those before it are there to stay.
        text.strip_suffix(REPLACEMENT).unwrap_or(text).len()
    } else if overdue {
        text.len()
    } else {
        // Each byte is a `�` of its own until the last one is there.
        text.trim_end_matches(REPLACEMENT).len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests::{rustdoc, sentencepiece};
    use super::*;

    fn pieces(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
        let mut detokenizer = Detokenizer::new(true);
        let mut pieces: Vec<String> = ids.iter().map(|&id| detokenizer.push(tokenizer, id)).collect();
        pieces.push(detokenizer.finish(tokenizer));
        pieces
    }

    #[test]
    fn pieces_are_whole_characters_and_add_up() {
        let text = "Grüße 🦀🦀, 日本語 — “naïve” <b>\u{1F468}\u{200D}\u{1F469}\u{200D}\u{1F467}</b>\n  fn";
        for tokenizer in [rustdoc(), sentencepiece()] {
            let ids = tokenizer.encode(text, true).unwrap().ids;
            let pieces = pieces(&tokenizer, &ids);
            assert!(pieces.iter().all(|piece| !piece.contains(REPLACEMENT)), "{pieces:?}");
            assert_eq!(pieces.concat(), text);
        }
    }

    #[test]
    fn a_replacement_character_is_a_character_too() {
        let text = "\u{FFFD}\u{FFFD}\u{D81}\u{FFFD}";
        let tokenizer = rustdoc();
        let ids = tokenizer.encode(text, false).unwrap().ids;
        assert_eq!(pieces(&tokenizer, &ids).concat(), text);
    }

    #[test]
    fn an_unfinished_character_is_shown_at_the_end_only() {
        let tokenizer = rustdoc();
        let ids = tokenizer.encode("🦀", false).unwrap().ids;
        assert!(ids.len() > 1, "the crab must be several tokens");
        let pieces = pieces(&tokenizer, &ids[..ids.len() - 1]);
        let (last, before) = pieces.split_last().unwrap();
        assert_eq!(before.concat(), "");
        assert_eq!(last.trim_matches(REPLACEMENT), "");
        assert!(!last.is_empty());
    }

    #[test]
    fn bytes_that_never_make_a_character_are_not_held_for_ever() {
        for tokenizer in [rustdoc(), sentencepiece()] {
            let lead =
                (0..tokenizer.vocab_size() as u32).find(|&id| tokenizer.token_bytes(id) == [0xF0]).unwrap();
            let mut detokenizer = Detokenizer::new(true);
            let shown: String = (0..64).map(|_| detokenizer.push(&tokenizer, lead)).collect();
            assert!(shown.chars().count() >= 64 - 2 * MAX_HELD_TOKENS, "{shown}");
        }
    }

    #[test]
    fn special_tokens_are_skipped_or_shown() {
        let tokenizer = rustdoc();
        let mut skipping = Detokenizer::new(true);
        assert_eq!(skipping.push(&tokenizer, 0), "");
        let mut showing = Detokenizer::new(false);
        assert_eq!(showing.push(&tokenizer, 0), "<|endoftext|>");
    }

    #[test]
    fn an_answer_continues_its_prompt() {
        let tokenizer = sentencepiece();
        let hi = tokenizer.token_id("▁hi").unwrap();
        let mut detokenizer = Detokenizer::after(&[1, hi], &tokenizer, true);
        assert_eq!(
            detokenizer.push(&tokenizer, hi),
            " hi",
            "the space of a first token would have been dropped"
        );
    }

    proptest! {
        #[test]
        fn any_text_survives(text in "\\PC{0,40}") {
            let tokenizer = rustdoc();
            let ids = tokenizer.encode(&text, false).unwrap().ids;
            prop_assert_eq!(pieces(&tokenizer, &ids).concat(), text);
        }

        #[test]
        fn any_tokens_are_decoded(ids in prop::collection::vec(0u32..260, 0..60)) {
            pieces(&sentencepiece(), &ids);
            let tokenizer = rustdoc();
            prop_assert_eq!(pieces(&tokenizer, &ids).concat(), tokenizer.decode(&ids, true));
        }
    }
}

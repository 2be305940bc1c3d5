//! The model's tokens as llguidance wants them.

use std::sync::Arc;

use llguidance::toktrie::{INVALID_TOKEN, TokRxInfo, TokTrie, TokenId, TokenizerEnv};

use crate::tokenizer::Tokenizer;

/// The bytes of every token, and how text is tokenized.
pub(super) struct TokenEnv {
    tokenizer: Arc<Tokenizer>,
    trie: TokTrie,
    /// Whether a text's tokens do not depend on what stands before it, so that forced text can be forced token by token.
    is_canonical: bool,
}

impl TokenEnv {
    /// The tokens of a model: ids up to `vocab_size`, whether the tokenizer knows them or not.
    pub(super) fn new(tokenizer: Arc<Tokenizer>, vocab_size: usize, eos_token_ids: &[u32]) -> Self {
        let words: Vec<Vec<u8>> = (0..vocab_size as u32)
            .map(|id| {
                if eos_token_ids.contains(&id) || tokenizer.is_special(id) {
                    let name = tokenizer.token(id).unwrap_or_else(|| format!("<[{id}]>"));
                    return [&[TokTrie::SPECIAL_TOKEN_MARKER], name.as_bytes()].concat();
                }
                let bytes =
                    if tokenizer.token(id).is_some() { tokenizer.token_bytes(id) } else { Vec::new() };
                // No text has this byte, and here it would mean a special token.
                if bytes.first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER) { Vec::new() } else { bytes }
            })
            .collect();
        let first_eos = eos_token_ids.first().copied().unwrap_or(INVALID_TOKEN);
        let trie = TokTrie::from(&TokRxInfo::new(vocab_size as u32, first_eos), &words);
        let in_vocabulary: Vec<u32> =
            eos_token_ids.iter().copied().filter(|&id| (id as usize) < vocab_size).collect();
        let trie = if in_vocabulary.is_empty() { trie } else { trie.with_eos_tokens(&in_vocabulary) };
        let is_canonical = tokenizer.is_byte_level() && keeps_text(&tokenizer);
        Self { tokenizer, trie, is_canonical }
    }
}

/// Whether tokens spell exactly the text that they were made of: no space before it, nothing normalized.
fn keeps_text(tokenizer: &Tokenizer) -> bool {
    ["a", "{\"a\": [1]}", " a"].iter().all(|text| {
        tokenizer.encode(text, false).is_ok_and(|encoded| {
            let bytes: Vec<u8> = encoded.ids.iter().flat_map(|&id| tokenizer.token_bytes(id)).collect();
            bytes == text.as_bytes()
        })
    })
}

impl TokenizerEnv for TokenEnv {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, s: &[u8]) -> Vec<TokenId> {
        self.trie.tokenize_with_greedy_fallback(s, |text| match self.tokenizer.encode(text, false) {
            Ok(encoded) => encoded.ids,
            Err(_) => self.trie.greedy_tokenize(text.as_bytes()),
        })
    }

    fn tokenize_is_canonical(&self) -> bool {
        self.is_canonical
    }
}

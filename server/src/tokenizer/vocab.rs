//! How a vocabulary spells bytes.

use std::collections::HashMap;

use serde_json::Value;

/// The spelling of a vocabulary's tokens.
pub(super) enum Alphabet {
    /// GPT-2's: each byte is one printable character.
    ByteLevel(HashMap<char, u8>),
    /// SentencePiece's: `▁` is a space, `<0xE2>` is a byte, all else is itself.
    SentencePiece,
    /// Anything else: the decoder must be asked.
    Other,
}

impl Alphabet {
    /// Reads the alphabet off the tokenizer's decoder.
    pub(super) fn of(tokenizer: &tokenizers::Tokenizer) -> Self {
        let decoder = tokenizer.get_decoder().and_then(|d| serde_json::to_value(d).ok()).unwrap_or_default();
        let types = decoder_types(&decoder);
        if types.contains(&"ByteLevel") {
            Self::ByteLevel(byte_level_characters().collect())
        } else if types.contains(&"ByteFallback") {
            Self::SentencePiece
        } else {
            Self::Other
        }
    }

    /// The bytes that `token` stands for; `None` when its spelling does not say.
    pub(super) fn bytes(&self, token: &str) -> Option<Vec<u8>> {
        match self {
            Self::ByteLevel(bytes) => token.chars().map(|c| bytes.get(&c).copied()).collect(),
            Self::SentencePiece => Some(match fallback_byte(token) {
                Some(byte) => vec![byte],
                None => token.replace('▁', " ").into_bytes(),
            }),
            Self::Other => None,
        }
    }
}

/// `<0xE2>` is 0xE2.
fn fallback_byte(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_hex = hex.len() == 2 && hex.bytes().all(|digit| digit.is_ascii_hexdigit());
    is_hex.then(|| u8::from_str_radix(hex, 16).ok())?
}

/// Types of the decoder, or of the parts of a sequence of decoders.
fn decoder_types(decoder: &Value) -> Vec<&str> {
    let parts = decoder.get("decoders").and_then(Value::as_array);
    parts
        .map_or(std::slice::from_ref(decoder), Vec::as_slice)
        .iter()
        .filter_map(|d| d["type"].as_str())
        .collect()
}

/// GPT-2's `bytes_to_unicode`: printable Latin-1 characters are themselves, the other bytes follow from U+0100.
fn byte_level_characters() -> impl Iterator<Item = (char, u8)> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let themselves = (0..=255u8).filter(move |&b| printable(b)).map(|b| (char::from(b), b));
    let moved = (0..=255u8).filter(move |&b| !printable(b)).zip('\u{100}'..).map(|(b, c)| (c, b));
    themselves.chain(moved)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_level_alphabet_spells_every_byte_once() {
        let alphabet: HashMap<char, u8> = byte_level_characters().collect();
        assert_eq!(alphabet.len(), 256);
        assert_eq!(alphabet[&'Ġ'], b' ');
        assert_eq!(alphabet[&'Ċ'], b'\n');
        assert_eq!(alphabet[&'a'], b'a');
    }

    #[test]
    fn fallback_bytes() {
        assert_eq!(fallback_byte("<0x0A>"), Some(10));
        for token in ["<0x0>", "0x0A", "<0xZZ>", "<0x0A", "<0x+A>"] {
            assert_eq!(fallback_byte(token), None, "{token}");
        }
    }
}

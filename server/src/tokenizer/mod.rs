//! Between text and token ids: encoding, incremental decoding, stop strings, the chat template.

mod chat_template;
mod detokenizer;
mod jinja;
mod python_json;
mod stop;
mod vocab;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

pub use chat_template::{ChatTemplate, RenderOptions, TemplateError};
pub use detokenizer::Detokenizer;
pub use stop::{StopHit, StopMatcher};
use vocab::Alphabet;

/// Why a model's tokenizer could not be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file is there but cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not what its name says.
    #[error("{}: {message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// The parser's words.
        message: String,
    },
}

/// A text as token ids.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// For each id, whether the tokenizer put it there (a beginning-of-sequence token) and no text stands behind it.
    pub added: Vec<bool>,
}

/// A model's tokenizer: `tokenizer.json` and what `tokenizer_config.json` says beside it.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    config: Map<String, Value>,
    alphabet: Alphabet,
    longest_token_bytes: usize,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads a model folder's tokenizer; `None` when it has no `tokenizer.json`.
    ///
    /// # Errors
    /// A file that is there but unusable.
    pub fn load(folder: &Path) -> Result<Option<Self>, TokenizerError> {
        let path = folder.join("tokenizer.json");
        let Some(bytes) = read_if_there(&path)? else { return Ok(None) };
        let parse = |message: String| TokenizerError::Parse { path: path.clone(), message };
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|e| parse(e.to_string()))?;
        // Requests say how long a prompt may be; a training-time setting in the file must not cut or fill it.
        inner.with_truncation(None).map_err(|e| parse(e.to_string()))?;
        inner.with_padding(None);
        let alphabet = Alphabet::of(&inner);
        let config = read_json_object(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
        // A spelling is at least as long as what it stands for. Where text without a token becomes an unknown token,
        // that one stands for text of any length.
        let spelled = |id| inner.id_to_token(id).map(|token| token.len());
        let longest_token_bytes = match alphabet {
            Alphabet::Other => usize::MAX,
            _ => (0..inner.get_vocab_size(true) as u32).filter_map(spelled).max().unwrap_or(0),
        };
        Ok(Some(Self { inner, config, alphabet, longest_token_bytes }))
    }

    /// `tokenizer_config.json`; empty when the model has none.
    pub fn config(&self) -> &Map<String, Value> {
        &self.config
    }

    /// The text of a special token that the config names: `bos_token`, `eos_token`, …
    pub fn special_token(&self, key: &str) -> Option<&str> {
        token_text(self.config.get(key)?)
    }

    /// Every special token that the config names, by key; `None` for those that it names as absent.
    pub fn special_tokens(&self) -> impl Iterator<Item = (&str, Option<&str>)> {
        self.config
            .iter()
            .filter(|(key, value)| {
                key.ends_with("_token") && (value.is_null() || token_text(value).is_some())
            })
            .map(|(key, value)| (key.as_str(), token_text(value)))
    }

    /// No token stands for more bytes of text.
    pub fn longest_token_bytes(&self) -> usize {
        self.longest_token_bytes
    }

    /// Number of tokens that have a text, special ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Token ids of `text`; with `add_special_tokens`, also what the tokenizer puts around a text.
    ///
    /// # Errors
    /// The tokenizer's own words: a vocabulary without an entry for some text and without an unknown token.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Encoded, tokenizers::Error> {
        let encoding = self.inner.encode(text, add_special_tokens)?;
        Ok(Encoded {
            ids: encoding.get_ids().to_vec(),
            added: encoding.get_special_tokens_mask().iter().map(|&added| added == 1).collect(),
        })
    }

    /// Text of `ids`; special tokens are left out with `skip_special_tokens`, ids without a text always.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        // The decoder fails for no list of ids that this server makes or accepts; a failure must not end a stream.
        self.inner.decode(ids, skip_special_tokens).unwrap_or_default()
    }

    /// Text that the token adds inside a longer text; `�` stands for bytes that are no whole character.
    pub fn token_text(&self, id: u32) -> String {
        // A decoder may treat the first token differently (SentencePiece drops its space): look at the second.
        let once = self.decode(&[id], false);
        let twice = self.decode(&[id, id], false);
        twice.strip_prefix(once.as_str()).map(str::to_owned).unwrap_or(once)
    }

    /// The bytes that the token stands for, whole characters or not.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let special = self.inner.get_added_vocabulary().get_added_tokens_decoder().contains_key(&id);
        let bytes = match self.inner.id_to_token(id) {
            Some(token) if !special => self.alphabet.bytes(&token),
            _ => None,
        };
        bytes.unwrap_or_else(|| self.token_text(id).into_bytes())
    }

    /// Whether the token is one of the tokenizer's special ones, which no text stands for.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner
            .get_added_vocabulary()
            .get_added_tokens_decoder()
            .get(&id)
            .is_some_and(|token| token.special)
    }

    /// Whether tokens are any bytes, as in GPT-2, so that decoding is their concatenation.
    pub(crate) fn is_byte_level(&self) -> bool {
        matches!(self.alphabet, Alphabet::ByteLevel(_))
    }

    /// The token as the vocabulary spells it: `Ġhello`.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token as the vocabulary spells it.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }
}

/// A special token's entry is its text, or an object with the text and how it is matched.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, TokenizerError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TokenizerError::Read { path: path.to_owned(), source }),
    }
}

/// Reads a JSON object; `None` when the file is not there.
///
/// # Errors
/// The file is there but unreadable or no JSON object.
pub fn read_json_object(path: &Path) -> Result<Option<Map<String, Value>>, TokenizerError> {
    let Some(bytes) = read_if_there(path)? else { return Ok(None) };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|e| TokenizerError::Parse { path: path.to_owned(), message: e.to_string() })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn rustdoc() -> Tokenizer {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/models/rustdoc-6m");
        Tokenizer::load(Path::new(folder)).unwrap().unwrap()
    }

    /// A SentencePiece-style tokenizer: `▁` for spaces, bytes as tokens of their own, a BOS token added in front.
    pub(crate) fn sentencepiece() -> Tokenizer {
        let mut vocab = Map::new();
        for token in ["<unk>", "<s>", "</s>"] {
            vocab.insert(token.into(), vocab.len().into());
        }
        for byte in 0..=255u8 {
            vocab.insert(format!("<0x{byte:02X}>"), vocab.len().into());
        }
        for token in ["▁", "h", "i", "▁hi", "!", "hi"] {
            vocab.insert(token.into(), vocab.len().into());
        }
        let added = |id: u32, content: &str| {
            serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        };
        let tokenizer = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>")],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "pre_tokenizer": null,
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                "vocab": vocab, "merges": ["h i", "▁ hi"]}
        });
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        std::fs::write(folder.path().join("tokenizer_config.json"), r#"{"bos_token": {"content": "<s>"}}"#)
            .unwrap();
        Tokenizer::load(folder.path()).unwrap().unwrap()
    }

    #[test]
    fn encodes_and_says_what_was_added() {
        let tokenizer = sentencepiece();
        let encoded = tokenizer.encode("hi hi", true).unwrap();
        let hi = tokenizer.token_id("▁hi").unwrap();
        assert_eq!(encoded, Encoded { ids: vec![1, hi, hi], added: vec![true, false, false] });
        assert_eq!(tokenizer.encode("hi hi", false).unwrap().ids, [hi, hi]);
        assert_eq!(tokenizer.decode(&encoded.ids, true), "hi hi");
        assert_eq!(tokenizer.special_token("bos_token"), Some("<s>"));
    }

    #[test]
    fn a_token_keeps_its_space() {
        let tokenizer = sentencepiece();
        assert_eq!(tokenizer.token_text(tokenizer.token_id("▁hi").unwrap()), " hi");
        assert_eq!(tokenizer.token_text(tokenizer.token_id("hi").unwrap()), "hi");
        assert_eq!(tokenizer.token_text(1), "<s>");
        let rustdoc = rustdoc();
        let [id] = rustdoc.encode(" the", false).unwrap().ids[..] else { panic!("one token") };
        assert_eq!(rustdoc.token_text(id), " the");
    }

    #[test]
    fn tokens_have_their_bytes() {
        let rustdoc = rustdoc();
        for text in ["é", "→", "a\u{00ad}b", "日本 \n\t"] {
            let ids = rustdoc.encode(text, false).unwrap().ids;
            let bytes: Vec<u8> = ids.iter().flat_map(|&id| rustdoc.token_bytes(id)).collect();
            assert_eq!(bytes, text.as_bytes());
        }
        let sentencepiece = sentencepiece();
        assert_eq!(sentencepiece.token_bytes(sentencepiece.token_id("<0xE2>").unwrap()), [0xE2]);
        assert_eq!(sentencepiece.token_bytes(sentencepiece.token_id("▁hi").unwrap()), b" hi");
        assert_eq!(rustdoc.token_bytes(0), b"<|endoftext|>");
    }

    #[test]
    fn a_folder_without_a_tokenizer_has_none_and_a_broken_one_is_named() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Tokenizer::load(folder.path()).unwrap().is_none());
        std::fs::write(folder.path().join("tokenizer.json"), "{").unwrap();
        let error = Tokenizer::load(folder.path()).unwrap_err();
        assert!(error.to_string().contains("tokenizer.json"), "{error}");
    }
}

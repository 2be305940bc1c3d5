//! Texts as tokens, by the tokenizer of a checkpoint.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tokenizers::Tokenizer;

/// A tokenizer that is missing or wrong, or has no token for some of a text. Messages name the file.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// It cannot be read.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// It is no tokenizer, or cannot encode.
    #[error("{}: {reason}", path.display())]
    Wrong {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl TokenizerError {
    fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |error| Self::Io { path: path.to_owned(), error }
    }

    fn wrong(path: &Path, error: &tokenizers::Error) -> Self {
        Self::Wrong { path: path.to_owned(), reason: error.to_string() }
    }
}

/// File of a checkpoint folder that says how text becomes tokens.
const TOKENIZER_FILE: &str = "tokenizer.json";

/// A model's tokenizer. It adds no special tokens: what a model is measured or calibrated on is the text.
pub struct TextTokenizer {
    path: PathBuf,
    tokenizer: Tokenizer,
}

impl std::fmt::Debug for TextTokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TextTokenizer").field("path", &self.path).finish_non_exhaustive()
    }
}

impl TextTokenizer {
    /// Reads `tokenizer.json` of a checkpoint folder.
    ///
    /// # Errors
    /// It is missing, or no tokenizer.
    pub fn open(folder: &Path) -> Result<Self, TokenizerError> {
        let path = folder.join(TOKENIZER_FILE);
        let bytes = std::fs::read(&path).map_err(TokenizerError::io(&path))?;
        let wrong = |error: tokenizers::Error| TokenizerError::wrong(&path, &error);
        let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(wrong)?;
        // Settings of training would cut or fill what is measured.
        tokenizer.with_truncation(None).map_err(wrong)?;
        tokenizer.with_padding(None);
        Ok(Self { path, tokenizer })
    }

    /// `tokenizer.json` of the folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// SHA-256 of `tokenizer.json` of a checkpoint folder: equal files make equal tokens.
    ///
    /// # Errors
    /// It is missing.
    pub fn digest(folder: &Path) -> Result<[u8; 32], TokenizerError> {
        let path = folder.join(TOKENIZER_FILE);
        Ok(Sha256::digest(std::fs::read(&path).map_err(TokenizerError::io(&path))?).into())
    }

    /// Token ids of `text`.
    ///
    /// # Errors
    /// The vocabulary has nothing for some of it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.tokenizer.encode_fast(text, false);
        Ok(encoding.map_err(|error| TokenizerError::wrong(&self.path, &error))?.get_ids().to_vec())
    }
}

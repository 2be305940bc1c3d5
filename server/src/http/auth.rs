//! API keys, checked on `/v1` alone: probes and scrapers have none.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::Response;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use super::App;
use super::error::ApiError;

/// Why the file of API keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// It cannot be read, or is not UTF-8.
    #[error("--api-key-file: {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It has no key: a server that was to be closed would be open.
    #[error("--api-key-file: {}: no key in it", .0.display())]
    Empty(PathBuf),
    /// A key that no HTTP header can carry.
    #[error("--api-key-file: {}: line {line}: a key is one word of printable ASCII", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
    },
}

/// The keys that open `/v1`; without any it is open to all.
#[derive(Debug)]
pub struct ApiKeys {
    /// Given as `--api-key`.
    fixed: Vec<KeyDigest>,
    file: Option<PathBuf>,
    /// Of the file.
    of_file: RwLock<Arc<[KeyDigest]>>,
}

/// Digests have one length, so that comparing tells nothing about a key's own, and memory holds no key.
type KeyDigest = [u8; 32];

fn digest(key: &[u8]) -> KeyDigest {
    Sha256::digest(key).into()
}

impl ApiKeys {
    /// The keys of `--api-key`, and those of the file.
    ///
    /// # Errors
    /// See [`KeyFileError`].
    pub fn load(fixed: &[String], file: Option<&Path>) -> Result<Self, KeyFileError> {
        let of_file = file.map(read).transpose()?.unwrap_or_default();
        Ok(Self {
            fixed: fixed.iter().map(|key| digest(key.as_bytes())).collect(),
            file: file.map(Path::to_owned),
            of_file: RwLock::new(of_file.into()),
        })
    }

    /// Reads the file again.
    ///
    /// # Errors
    /// As [`load`](Self::load); the old keys stay.
    pub fn reload(&self) -> Result<(), KeyFileError> {
        if let Some(file) = &self.file {
            let keys = read(file)?.into();
            *self.of_file.write().unwrap_or_else(PoisonError::into_inner) = keys;
        }
        Ok(())
    }

    /// Whether a request with these headers may pass.
    fn allow(&self, headers: &HeaderMap) -> bool {
        let of_file = Arc::clone(&self.of_file.read().unwrap_or_else(PoisonError::into_inner));
        if self.fixed.is_empty() && of_file.is_empty() {
            return true;
        }
        let Some(given) = bearer(headers).map(digest) else { return false };
        // Every key is compared, in full: the time taken does not tell which one came close.
        let found = self
            .fixed
            .iter()
            .chain(of_file.iter())
            .fold(Choice::from(0), |found, key| found | key.ct_eq(&given));
        found.into()
    }
}

/// The token of `Authorization: Bearer TOKEN`.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.as_bytes().split_at_checked("bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"bearer ").then_some(token)
}

/// One key per line; blank lines and those that begin with `#` are skipped.
fn read(path: &Path) -> Result<Vec<KeyDigest>, KeyFileError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| KeyFileError::Read { path: path.to_owned(), source })?;
    let lines = text.lines().map(str::trim).enumerate();
    let keys = lines.filter(|(_, key)| !key.is_empty() && !key.starts_with('#')).map(|(index, key)| {
        if key.bytes().all(|byte| byte.is_ascii_graphic()) {
            Ok(digest(key.as_bytes()))
        } else {
            Err(KeyFileError::Unusable { path: path.to_owned(), line: index + 1 })
        }
    });
    let keys = keys.collect::<Result<Vec<_>, _>>()?;
    if keys.is_empty() { Err(KeyFileError::Empty(path.to_owned())) } else { Ok(keys) }
}

/// Lets a request pass if it needs no key or has one.
pub(super) async fn authorize(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let guarded = request.uri().path() == "/v1" || request.uri().path().starts_with("/v1/");
    if guarded && !app.keys().allow(request.headers()) {
        return Err(ApiError::Unauthorized);
    }
    Ok(next.run(request).await)
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn with(authorization: Option<&'static str>) -> HeaderMap {
        let value = authorization.map(|value| (header::AUTHORIZATION, HeaderValue::from_static(value)));
        value.into_iter().collect()
    }

    #[test]
    fn keys() {
        let keys = ApiKeys::load(&["one".to_owned(), "two".to_owned()], None).unwrap();
        let cases = [
            (Some("Bearer one"), true),
            (Some("bearer two"), true),
            (Some("Bearer three"), false),
            (Some("Bearer on"), false),
            (Some("Bearer "), false),
            (Some("Basic one"), false),
            (Some("one"), false),
            (None, false),
        ];
        for (value, expected) in cases {
            assert_eq!(keys.allow(&with(value)), expected, "{value:?}");
        }
        assert!(ApiKeys::load(&[], None).unwrap().allow(&with(None)));
    }

    #[test]
    fn keys_of_a_file_are_replaced_by_good_ones_only() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("keys");
        let write = |text: &str| std::fs::write(&file, text).unwrap();
        write("# team a\nalpha\n\n  beta \r\n");
        let keys = ApiKeys::load(&["fixed".to_owned()], Some(&file)).unwrap();
        for key in ["Bearer alpha", "Bearer beta", "Bearer fixed"] {
            assert!(keys.allow(&with(Some(key))), "{key}");
        }
        assert!(!keys.allow(&with(Some("Bearer # team a"))));
        write("gamma\n");
        keys.reload().unwrap();
        assert!(keys.allow(&with(Some("Bearer gamma"))) && !keys.allow(&with(Some("Bearer alpha"))));
        for (text, word) in [("# nothing\n", "no key"), ("fine\nnot fine\n", "line 2"), ("clé\n", "line 1")]
        {
            write(text);
            let error = keys.reload().unwrap_err().to_string();
            assert!(error.contains(word) && !error.contains("fine"), "{error}");
            assert!(keys.allow(&with(Some("Bearer gamma"))), "the old keys stay");
        }
        std::fs::remove_file(&file).unwrap();
        assert!(matches!(keys.reload(), Err(KeyFileError::Read { .. })));
    }
}

//! HTTPS: a certificate and its key, which may be replaced while the server runs.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use config::TlsFiles;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{Error as PemError, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{Error as RustlsError, ServerConfig};

/// Why the certificate or its key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or is not PEM.
    #[error("{flag}: {}: {source}", path.display())]
    Read {
        /// The flag that names the file.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: PemError,
    },
    /// The file has no certificate.
    #[error("--ssl-certfile: {}: no certificate in it", .0.display())]
    NoCertificate(PathBuf),
    /// The key is not the certificate's, or of a kind that TLS does not use.
    #[error("--ssl-keyfile: {}: not a key for the certificate in {}: {source}", files.key.display(), files.certificates.display())]
    Unusable {
        /// The files.
        files: TlsFiles,
        /// Why.
        source: RustlsError,
    },
}

/// The server's side of TLS handshakes: TLS 1.2 and 1.3, no client certificates.
pub struct Tls {
    files: TlsFiles,
    acceptor: RwLock<TlsAcceptor>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("files", &self.files).finish_non_exhaustive()
    }
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// See [`TlsError`].
    pub fn load(files: TlsFiles) -> Result<Self, TlsError> {
        let acceptor = RwLock::new(read(&files)?);
        Ok(Self { files, acceptor })
    }

    /// Reads the files again, for connections to come.
    ///
    /// # Errors
    /// As [`load`](Self::load); the old certificate stays.
    pub(crate) fn reload(&self) -> Result<(), TlsError> {
        let acceptor = read(&self.files)?;
        *self.acceptor.write().unwrap_or_else(PoisonError::into_inner) = acceptor;
        Ok(())
    }

    /// For the next handshake.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        self.acceptor.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn read(files: &TlsFiles) -> Result<TlsAcceptor, TlsError> {
    let unreadable = |flag, path: &PathBuf| {
        let path = path.clone();
        move |source| TlsError::Read { flag, path, source }
    };
    let certificates: Vec<CertificateDer<'static>> = CertificateDer::pem_file_iter(&files.certificates)
        .and_then(Iterator::collect)
        .map_err(unreadable("--ssl-certfile", &files.certificates))?;
    if certificates.is_empty() {
        return Err(TlsError::NoCertificate(files.certificates.clone()));
    }
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(unreadable("--ssl-keyfile", &files.key))?;
    let unusable = |source| TlsError::Unusable { files: files.clone(), source };
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_no_client_auth()
        .with_single_cert(certificates, key)
        .map_err(unusable)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

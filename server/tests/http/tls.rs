//! HTTPS.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use config::{ServerConfig, Settings, TlsFiles};
use server::net::{Tls, TlsError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::support::TestServer;

/// Writes a new certificate for `localhost`, and its key.
fn write_certificate(folder: &Path) -> CertificateDer<'static> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    fs::write(folder.join("key.pem"), made.signing_key.serialize_pem()).unwrap();
    fs::write(folder.join("cert.pem"), made.cert.pem()).unwrap();
    made.cert.der().clone()
}

/// A server with HTTPS, the folder of its files, and the certificate.
async fn secured(client_timeout: u64) -> (TestServer, std::path::PathBuf, CertificateDer<'static>) {
    let mut made = None;
    let server = TestServer::with(|settings, folder| {
        made = Some((folder.to_owned(), write_certificate(folder)));
        settings.ssl_certfile = Some(folder.join("cert.pem"));
        settings.ssl_keyfile = Some(folder.join("key.pem"));
        settings.client_timeout = Some(client_timeout);
    })
    .await;
    let (folder, certificate) = made.unwrap();
    (server, folder, certificate)
}

/// `GET /health` by a client that trusts this certificate alone.
async fn health(server: &TestServer, trusted: &CertificateDer<'static>) -> std::io::Result<String> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.clone()).unwrap();
    let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let stream = TcpStream::connect(server.address()).await?;
    let name = ServerName::try_from("localhost").unwrap();
    let mut stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
    stream.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

#[tokio::test]
async fn requests_are_answered_and_a_new_certificate_is_taken() {
    let (server, folder, old) = secured(60).await;
    assert!(health(&server, &old).await.unwrap().starts_with("HTTP/1.1 200"));
    // Between the two files being written they do not fit together: the old ones stay.
    let new = write_certificate(&folder);
    let deadline = Instant::now() + Duration::from_secs(10);
    while health(&server, &new).await.is_err() {
        assert!(Instant::now() < deadline, "the new certificate is not taken");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(health(&server, &old).await.is_err());
}

#[tokio::test]
async fn what_is_no_handshake_harms_nobody() {
    let (server, _, certificate) = secured(1).await;
    for bytes in
        [&b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"[..], &[0xff; 4096], b"\x16\x03\x01\xff\xff", b""]
    {
        let mut stream = TcpStream::connect(server.address()).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        let mut answer = Vec::new();
        let reading = stream.read_to_end(&mut answer);
        // The last two would be waited for for ever, were there no limit.
        let _ = tokio::time::timeout(Duration::from_secs(5), reading).await.expect("the server closes");
        assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    }
    assert!(health(&server, &certificate).await.unwrap().starts_with("HTTP/1.1 200"));
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    write_certificate(folder.path());
    write_certificate(other.path());
    let empty = folder.path().join("empty.pem");
    fs::write(&empty, "nothing\n").unwrap();
    let (certificates, key) = (folder.path().join("cert.pem"), folder.path().join("key.pem"));
    let missing = folder.path().join("none.pem");
    let load = |certificates: &Path, key: &Path| {
        Tls::load(TlsFiles { certificates: certificates.to_owned(), key: key.to_owned() })
    };
    assert!(load(&certificates, &key).is_ok());
    for (certificates, key, words) in [
        (&missing, &key, ["--ssl-certfile", "none.pem"]),
        (&certificates, &missing, ["--ssl-keyfile", "none.pem"]),
        (&empty, &key, ["--ssl-certfile", "no certificate"]),
        (&key, &key, ["--ssl-certfile", "no certificate"]),
        (&certificates, &certificates, ["--ssl-keyfile", "cert.pem"]),
    ] {
        let error = load(certificates, key).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }
    let foreign = load(&certificates, &other.path().join("key.pem")).unwrap_err();
    assert!(matches!(foreign, TlsError::Unusable { .. }), "{foreign}");
}

#[test]
fn a_certificate_needs_its_key() {
    let settings = Settings { ssl_certfile: Some("cert.pem".into()), ..Settings::default() };
    let error = ServerConfig::resolve(Settings::default(), settings).unwrap_err().to_string();
    assert!(error.starts_with("ssl_keyfile: "), "{error}");
}

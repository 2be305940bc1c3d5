//! One connection: a TLS handshake if there is TLS, then HTTP/1.1 until either side closes.

use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::Watcher;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use super::write_timeout::WriteTimeout;
use super::{Limits, Tls};

/// Request line and headers together; more is answered with 431, as are more than 100 headers.
const MAX_HEADER_BYTES: usize = 64 << 10;

/// Serves a connection until it ends.
pub(super) async fn serve(
    stream: TcpStream,
    routes: Router,
    tls: Option<&Tls>,
    limits: Limits,
    watcher: Watcher,
) {
    let stream = WriteTimeout::new(stream, limits.client_timeout);
    let Some(tls) = tls else { return http(stream, routes, limits.client_timeout, watcher).await };
    match tokio::time::timeout(limits.client_timeout, tls.acceptor().accept(stream)).await {
        Ok(Ok(stream)) => http(stream, routes, limits.client_timeout, watcher).await,
        // Scanners and clients that speak plain HTTP: no news for an operator.
        Ok(Err(error)) => tracing::debug!("TLS handshake: {error}"),
        Err(_) => tracing::debug!("TLS handshake: timed out"),
    }
}

/// A client that closes its sending side counts as gone, whatever it might still read: nothing else tells a client that
/// has left from one that waits, and its sequences are to be cancelled.
async fn http<S>(stream: S, routes: Router, client_timeout: Duration, watcher: Watcher)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(client_timeout).max_header_size(MAX_HEADER_BYTES);
    let connection = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes));
    if let Err(error) = watcher.watch(connection).await {
        tracing::debug!("connection: {error}");
    }
}

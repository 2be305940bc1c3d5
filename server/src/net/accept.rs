//! The loop that takes connections.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{Limits, Tls, connection};

/// How long to wait when the process has no file descriptor left.
const PAUSE: Duration = Duration::from_secs(1);

/// How often it is said that there are too many connections.
const WARN_EVERY: Duration = Duration::from_secs(60);

/// Serves connections until `closing` resolves; then takes no more, lets each finish its current answer, and returns
/// when all have ended.
pub(crate) async fn serve(
    listener: TcpListener,
    routes: Router,
    tls: Option<Arc<Tls>>,
    limits: Limits,
    closing: impl Future<Output = ()> + Send,
) {
    let graceful = GracefulShutdown::new();
    let mut places = Places::new(limits.max_connections);
    let mut closing = std::pin::pin!(closing);
    loop {
        let (stream, place) = tokio::select! {
            next = next(&listener, &mut places) => next,
            () = &mut closing => break,
        };
        let (routes, tls, watcher) = (routes.clone(), tls.clone(), graceful.watcher());
        tokio::spawn(async move {
            connection::serve(stream, routes, tls.as_deref(), limits, watcher).await;
            drop(place);
        });
    }
    drop(listener);
    graceful.shutdown().await;
}

/// The next connection, once there is a place for it.
async fn next(listener: &TcpListener, places: &mut Places) -> (TcpStream, OwnedSemaphorePermit) {
    let place = places.take().await;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // Tokens are sent when they are there, not when a packet is full.
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!("TCP_NODELAY: {error}");
                }
                return (stream, place);
            }
            Err(error) if is_of_one_client(&error) => tracing::debug!("a connection was not taken: {error}"),
            Err(error) => {
                tracing::error!("connections cannot be taken: {error}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Whether the client went away before it was taken; anything else is the machine's state.
fn is_of_one_client(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionRefused | ConnectionAborted | ConnectionReset)
}

/// Places for connections.
struct Places {
    free: Arc<Semaphore>,
    warned: Option<Instant>,
}

impl Places {
    fn new(count: usize) -> Self {
        Self { free: Arc::new(Semaphore::new(count.min(Semaphore::MAX_PERMITS))), warned: None }
    }

    async fn take(&mut self) -> OwnedSemaphorePermit {
        if self.free.available_permits() == 0 && self.warned.is_none_or(|at| at.elapsed() > WARN_EVERY) {
            tracing::warn!("max_connections are open: more wait until one closes");
            self.warned = Some(Instant::now());
        }
        match Arc::clone(&self.free).acquire_owned().await {
            Ok(place) => place,
            // Nobody closes this semaphore.
            Err(_) => std::future::pending().await,
        }
    }
}

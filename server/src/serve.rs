//! The life of the server: bind, load, serve, drain, stop.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use config::ServerConfig;
use opentelemetry_otlp::ExporterBuildError;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use crate::engine::EngineHandle;
use crate::http::{App, KeyFileError, router};
use crate::model::{LoadError, ServedModel, served_names};
use crate::net::{self, Limits, TlsError};
use crate::secrets::Secrets;
use crate::startup;
use crate::telemetry::{Telemetry, Traces};

/// How long connections may take at least to end after the last answer.
const CLOSING_TIME: Duration = Duration::from_secs(5);

/// Why the server did not serve, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// No model was named.
    #[error("which model? mxserve MODEL, or `model` in the --config file; `mxserve demo` needs none")]
    NoModel,
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why: another process has the port.
        source: std::io::Error,
    },
    /// The certificate or its key cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The file of API keys cannot be used.
    #[error(transparent)]
    Keys(#[from] KeyFileError),
    /// Traces cannot be sent.
    #[error("--otlp-traces-endpoint: {0}")]
    Traces(#[from] ExporterBuildError),
    /// The model cannot be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The network failed.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// Metrics cannot be made.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// A task of the server panicked.
    #[error("a task of the server failed: {0}")]
    Task(#[from] tokio::task::JoinError),
    /// The engine's thread ended by itself.
    #[error("the engine has died")]
    EngineDied,
}

/// Serves `config.model` until `stop` resolves; then takes no more requests, lets the running ones finish for as long
/// as `shutdown_timeout` allows, and returns. `ready` is called with the address once requests are taken.
///
/// The port is bound first, so that a probe sees a server that is loading (`/health` is 503) rather than none.
///
/// # Errors
/// See [`ServeError`].
pub async fn serve(
    config: ServerConfig,
    stop: impl Future<Output = ()> + Send,
    ready: impl FnOnce(SocketAddr, &ServedModel) + Send,
) -> Result<(), ServeError> {
    let folder = config.model.clone().ok_or(ServeError::NoModel)?;
    let address = SocketAddr::new(config.host, config.port);
    let bind = |source| ServeError::Bind { address, source };
    let mut secrets = Secrets::load(&config)?;
    let reloading = secrets.watch()?;
    let listener = TcpListener::bind(address).await.map_err(bind)?;
    let address = listener.local_addr()?;

    let name = served_names(&config, &folder).swap_remove(0);
    let telemetry = Arc::new(Telemetry::new(&name)?);
    let traces = config.otlp_traces_endpoint.as_deref().map(Traces::start).transpose()?.map(Arc::new);
    let shutdown_timeout = config.shutdown_timeout;
    let limits = Limits { max_connections: config.max_connections, client_timeout: config.client_timeout };
    net::allow_files(limits);
    let app = Arc::new(App::new(config, secrets.keys, telemetry).traced(traces.clone()));
    let (close, closed) = oneshot::channel::<()>();
    let routes = router(Arc::clone(&app));
    let closing = async move {
        // An error is the other end dropped: closing as well.
        let _ = closed.await;
    };
    let mut server = tokio::spawn(async move {
        tokio::select! {
            () = net::serve(listener, routes, secrets.tls, limits, closing) => {}
            () = reloading => {}
        }
    });
    let mut stop = std::pin::pin!(stop);

    let loading = {
        let app = Arc::clone(&app);
        tokio::task::spawn_blocking(move || ServedModel::load(app.config(), &folder, app.telemetry()))
    };
    let model = tokio::select! {
        model = loading => Arc::new(model??),
        () = &mut stop => return Ok(()),
        ended = &mut server => return ended.map_err(ServeError::Task),
    };
    app.serve(Arc::clone(&model));
    ready(address, &model);

    let died = tokio::select! {
        () = &mut stop => false,
        () = death(&model.engine) => true,
        ended = &mut server => return ended.map_err(ServeError::Task),
    };
    if died {
        return Err(ServeError::EngineDied);
    }
    let deadline = Instant::now() + shutdown_timeout;
    drain(&model.engine, shutdown_timeout).await?;
    drop(close);
    // What is answered has still to be taken: a client that reads slowly has the rest of the time.
    let left = deadline.saturating_duration_since(Instant::now()).max(CLOSING_TIME);
    let ended = tokio::time::timeout(left, server).await;
    if let Some(traces) = traces {
        tokio::task::spawn_blocking(move || traces.shutdown()).await?;
    }
    match ended {
        Ok(ended) => Ok(ended?),
        Err(_) => Ok(()),
    }
}

/// Lets running requests finish, then stops the engine.
async fn drain(engine: &EngineHandle, at_most: Duration) -> Result<(), ServeError> {
    engine.drain();
    let stats = engine.stats();
    let left = stats.running + stats.waiting;
    tracing::info!(requests = left, timeout_secs = at_most.as_secs(), "shutting down");
    if tokio::time::timeout(at_most, engine.idle()).await.is_err() {
        let stats = engine.stats();
        tracing::warn!(requests = stats.running + stats.waiting, "the time is over: aborting");
    }
    let engine = engine.clone();
    tokio::task::spawn_blocking(move || engine.shutdown()).await?;
    Ok(())
}

/// Resolves when the engine's thread has ended by itself. It does so only by a bug, so looking now and then will do.
async fn death(engine: &EngineHandle) {
    while engine.is_alive() {
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Resolves at SIGINT or SIGTERM. A second signal ends the process at once: who presses Ctrl-C again does not want to
/// wait for running requests.
///
/// # Errors
/// Signals cannot be listened to.
pub fn stop_signal() -> std::io::Result<impl Future<Output = ()> + Send> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut next = async move || {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    };
    Ok(async move {
        next().await;
        tokio::spawn(async move {
            next().await;
            std::process::exit(130);
        });
    })
}

/// What is printed once the model serves: the table, the server's `url`, and `hint`.
///
/// # Errors
/// Standard output is closed.
pub fn announce(url: &str, model: &ServedModel, hint: &str) -> std::io::Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    write!(out, "{}", startup::table(model))?;
    writeln!(out, "serving  {url}/v1  (model '{}')", model.names[0])?;
    write!(out, "{hint}")?;
    out.flush()
}

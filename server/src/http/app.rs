//! What handlers share.

use std::num::NonZeroUsize;
use std::sync::{Arc, OnceLock};

use config::ServerConfig;
use tokio::sync::Semaphore;

use super::auth::ApiKeys;
use super::error::ApiError;
use super::responses::ResponseStore;
use crate::model::ServedModel;
use crate::telemetry::{Telemetry, Traces};

/// A body of this length is parsed, and its fields are read, in less time than it takes to hand it to another thread and
/// to be woken again.
const SMALL_BODY_BYTES: usize = 16 << 10;

/// The server's state: it answers from the start, and has a model once that is loaded.
#[derive(Debug)]
pub struct App {
    config: ServerConfig,
    keys: Arc<ApiKeys>,
    telemetry: Arc<Telemetry>,
    traces: Option<Arc<Traces>>,
    model: OnceLock<Arc<ServedModel>>,
    responses: ResponseStore,
    /// A permit per processor: more preparations at once would only hold more memory.
    preparations: Semaphore,
}

impl App {
    /// A server whose model is still to come.
    pub fn new(config: ServerConfig, keys: Arc<ApiKeys>, telemetry: Arc<Telemetry>) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        Self {
            config,
            keys,
            telemetry,
            traces: None,
            model: OnceLock::new(),
            responses: ResponseStore::default(),
            preparations: Semaphore::new(processors),
        }
    }

    /// The same, sending a trace of each request.
    #[must_use]
    pub(crate) fn traced(mut self, traces: Option<Arc<Traces>>) -> Self {
        self.traces = traces;
        self
    }

    /// The model is loaded: from now on requests are taken. Only the first call has an effect.
    pub fn serve(&self, model: Arc<ServedModel>) {
        let _ = self.model.set(model);
    }

    /// The configuration.
    pub fn config(&self) -> &ServerConfig {
        &self.config
    }

    /// The keys that open `/v1`.
    pub(super) fn keys(&self) -> &ApiKeys {
        &self.keys
    }

    /// Where traces go, if anywhere.
    pub(super) fn traces(&self) -> Option<&Arc<Traces>> {
        self.traces.as_ref()
    }

    /// The metrics.
    pub fn telemetry(&self) -> &Arc<Telemetry> {
        &self.telemetry
    }

    /// What `/v1/responses` keeps.
    pub(super) fn responses(&self) -> &ResponseStore {
        &self.responses
    }

    /// The model, if it is loaded.
    pub fn loaded(&self) -> Option<&Arc<ServedModel>> {
        self.model.get()
    }

    /// Runs work on a request's body of so many bytes: at once, or where that takes long, as
    /// [`off_the_reactor`](Self::off_the_reactor).
    ///
    /// # Errors
    /// The work's own, or it panicked.
    pub(super) async fn prepare<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        if bytes <= SMALL_BODY_BYTES { work() } else { self.off_the_reactor(work).await }
    }

    /// Runs work that takes the processor for long (a large body to parse, a long text to tokenize) where it holds up
    /// no other request, when it is its turn.
    ///
    /// # Errors
    /// The work's own, or it panicked.
    pub(super) async fn off_the_reactor<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let failed = |e: &dyn std::fmt::Display| {
            Err(ApiError::Internal(format!("a request's preparation failed: {e}")))
        };
        let _permit = match self.preparations.acquire().await {
            Ok(permit) => permit,
            Err(closed) => return failed(&closed),
        };
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| failed(&e))
    }

    /// The model.
    ///
    /// # Errors
    /// It is not loaded yet.
    pub(super) fn model(&self) -> Result<&Arc<ServedModel>, ApiError> {
        self.loaded().ok_or(ApiError::Loading)
    }
}

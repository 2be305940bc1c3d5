//! What handlers share.

use std::sync::{Arc, OnceLock};

use config::ServerConfig;

use super::error::ApiError;
use crate::model::ServedModel;
use crate::telemetry::Telemetry;

/// The server's state: it answers from the start, and has a model once that is loaded.
#[derive(Debug)]
pub struct App {
    config: ServerConfig,
    telemetry: Arc<Telemetry>,
    model: OnceLock<Arc<ServedModel>>,
}

impl App {
    /// A server whose model is still to come.
    pub fn new(config: ServerConfig, telemetry: Arc<Telemetry>) -> Self {
        Self { config, telemetry, model: OnceLock::new() }
    }

    /// The model is loaded: from now on requests are taken. Only the first call has an effect.
    pub fn serve(&self, model: Arc<ServedModel>) {
        let _ = self.model.set(model);
    }

    /// The configuration.
    pub fn config(&self) -> &ServerConfig {
        &self.config
    }

    /// The metrics.
    pub fn telemetry(&self) -> &Arc<Telemetry> {
        &self.telemetry
    }

    /// The model, if it is loaded.
    pub fn loaded(&self) -> Option<&Arc<ServedModel>> {
        self.model.get()
    }

    /// The model.
    ///
    /// # Errors
    /// It is not loaded yet.
    pub(super) fn model(&self) -> Result<&Arc<ServedModel>, ApiError> {
        self.loaded().ok_or(ApiError::Loading)
    }
}

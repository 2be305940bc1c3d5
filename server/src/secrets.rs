//! API keys and certificates: read at the start, and again when they change.

use std::sync::Arc;

use config::ServerConfig;

use crate::http::ApiKeys;
use crate::net::Tls;
use crate::reload::{self, Stamps, Watched};
use crate::serve::ServeError;

/// What the server knows of who may come in, and how.
#[derive(Debug)]
pub(crate) struct Secrets {
    /// Which keys open `/v1`.
    pub(crate) keys: Arc<ApiKeys>,
    /// For HTTPS.
    pub(crate) tls: Option<Arc<Tls>>,
    watched: Vec<Watched>,
}

impl Secrets {
    /// Reads the files that the configuration names.
    ///
    /// # Errors
    /// One of them cannot be used.
    pub(crate) fn load(config: &ServerConfig) -> Result<Self, ServeError> {
        let mut watched = Vec::new();
        let stamps = Stamps::of(config.api_key_file.iter().cloned().collect());
        let keys = Arc::new(ApiKeys::load(&config.api_key, config.api_key_file.as_deref())?);
        if config.api_key_file.is_some() {
            let keys = Arc::clone(&keys);
            let reload = move || keys.reload().map_err(|error| error.to_string());
            watched.push(Watched::new("API keys", stamps, reload));
        }
        let Some(files) = config.tls.clone() else { return Ok(Self { keys, tls: None, watched }) };
        let stamps = Stamps::of(vec![files.certificates.clone(), files.key.clone()]);
        let tls = Arc::new(Tls::load(files)?);
        let reload = {
            let tls = Arc::clone(&tls);
            move || tls.reload().map_err(|error| error.to_string())
        };
        watched.push(Watched::new("the certificate and its key", stamps, reload));
        Ok(Self { keys, tls: Some(tls), watched })
    }

    /// Reads the files again when they change, or at SIGHUP, for as long as the future is polled. SIGHUP keeps its
    /// meaning (the terminal is gone: end) where there is nothing to read.
    ///
    /// # Errors
    /// Signals cannot be listened to.
    pub(crate) fn watch(&mut self) -> std::io::Result<impl Future<Output = ()> + Send + use<>> {
        let watched = std::mem::take(&mut self.watched);
        let hangup = if watched.is_empty() { None } else { Some(reload::hangup()?) };
        Ok(async move {
            match hangup {
                Some(hangup) => reload::watch(watched, hangup).await,
                None => std::future::pending().await,
            }
        })
    }
}

//! Ranges of the knobs: each check takes what was said and names the key when that cannot be meant.

use std::path::PathBuf;
use std::time::Duration;

use crate::error::ConfigError;
use crate::server::TlsFiles;
use crate::settings::Settings;
use crate::values::SpeculativeConfig;

/// Knobs that would have no effect are refused, not ignored.
pub(crate) fn refuse(said: &Settings) -> Result<(), ConfigError> {
    if said.tensor_parallel_size.is_some_and(|n| n != 1) {
        return Err(invalid("tensor_parallel_size", "must be 1: a model runs on one device"));
    }
    Ok(())
}

fn invalid(key: &'static str, message: impl Into<String>) -> ConfigError {
    ConfigError::Invalid { key, message: message.into() }
}

pub(crate) fn at_least_one(key: &'static str, value: Option<usize>) -> Result<Option<usize>, ConfigError> {
    match value {
        Some(0) => Err(invalid(key, "must be at least 1")),
        other => Ok(other),
    }
}

/// The most connections at a time: more than a process may have files.
const MAX_CONNECTIONS: usize = 1 << 20;

pub(crate) fn connections(value: Option<usize>) -> Result<Option<usize>, ConfigError> {
    if value.is_some_and(|n| n > MAX_CONNECTIONS) {
        return Err(invalid("max_connections", format!("must be at most {MAX_CONNECTIONS}")));
    }
    at_least_one("max_connections", value)
}

/// The longest time that is set in seconds: a year. Clocks overflow somewhere beyond.
const MAX_SECS: u64 = 365 * 24 * 3600;

pub(crate) fn seconds(key: &'static str, value: Option<u64>) -> Result<Option<Duration>, ConfigError> {
    match value {
        Some(secs) if !(1..=MAX_SECS).contains(&secs) => {
            Err(invalid(key, format!("must be from 1 to {MAX_SECS} seconds")))
        }
        other => Ok(other.map(Duration::from_secs)),
    }
}

pub(crate) fn tls(
    certificates: Option<PathBuf>,
    key: Option<PathBuf>,
) -> Result<Option<TlsFiles>, ConfigError> {
    match (certificates, key) {
        (Some(certificates), Some(key)) => Ok(Some(TlsFiles { certificates, key })),
        (None, None) => Ok(None),
        (Some(_), None) => Err(invalid("ssl_keyfile", "must be given with ssl_certfile")),
        (None, Some(_)) => Err(invalid("ssl_certfile", "must be given with ssl_keyfile")),
    }
}

pub(crate) fn collector(value: Option<String>) -> Result<Option<String>, ConfigError> {
    match value {
        Some(url) if url.strip_prefix("http://").is_none_or(str::is_empty) => Err(invalid(
            "otlp_traces_endpoint",
            format!("'{url}' must be http://HOST:PORT; a collector beside the server takes it on over TLS"),
        )),
        other => Ok(other),
    }
}

pub(crate) fn context(value: Option<usize>) -> Result<Option<usize>, ConfigError> {
    match value {
        Some(1) => Err(invalid("max_model_len", "must be at least 2: a prompt token and a new one")),
        other => at_least_one("max_model_len", other),
    }
}

pub(crate) fn speculative(said: SpeculativeConfig) -> Result<SpeculativeConfig, ConfigError> {
    let (longest, shortest) = said.lookup_lengths();
    let message = match (said.num_speculative_tokens, longest, shortest) {
        (0, ..) => "num_speculative_tokens must be at least 1",
        (.., 0) => "prompt_lookup_min must be at least 1",
        _ if shortest > longest => "prompt_lookup_min must be at most prompt_lookup_max",
        _ => return Ok(said),
    };
    Err(invalid("speculative_config", message))
}

pub(crate) fn share(key: &'static str, value: Option<f64>) -> Result<Option<f64>, ConfigError> {
    match value {
        Some(share) if !(share > 0.0 && share <= 1.0) => Err(invalid(key, "must be above 0 and at most 1")),
        other => Ok(other),
    }
}

/// The most threads of the CPU backend: more than any machine has cores.
const MAX_THREADS: usize = 1024;

pub(crate) fn threads(value: Option<usize>) -> Result<Option<usize>, ConfigError> {
    if value.is_some_and(|n| n > MAX_THREADS) {
        return Err(invalid("threads", format!("must be at most {MAX_THREADS}")));
    }
    at_least_one("threads", value)
}

/// Origins as browsers send them: anything else would never match.
pub(crate) fn origins(value: Option<Vec<String>>) -> Result<Vec<String>, ConfigError> {
    let value = names("allowed_origins", value)?;
    match value.iter().find(|origin| *origin != "*" && !is_origin(origin)) {
        Some(origin) => {
            let message = format!("'{origin}' must be * or an origin: https://example.com, without a path");
            Err(invalid("allowed_origins", message))
        }
        None => Ok(value),
    }
}

/// `scheme://host`, with a port or without.
fn is_origin(text: &str) -> bool {
    text.split_once("://").is_some_and(|(scheme, host)| {
        !scheme.is_empty()
            && !host.is_empty()
            && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b))
            && host.bytes().all(|b| b.is_ascii_graphic() && !b"/?#@*,".contains(&b))
    })
}

pub(crate) fn names(key: &'static str, value: Option<Vec<String>>) -> Result<Vec<String>, ConfigError> {
    let value = value.unwrap_or_default();
    if value.iter().any(String::is_empty) {
        return Err(invalid(key, "must not be empty"));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_checked() {
        for (origin, fine) in [
            ("*", true),
            ("https://a.example", true),
            ("http://localhost:3000", true),
            ("a.example", false),
            ("https://a.example/", false),
            ("https://*.example", false),
            ("https://é.example", false),
        ] {
            assert_eq!(origins(Some(vec![origin.to_owned()])).is_ok(), fine, "{origin}");
        }
    }

    #[test]
    fn threads_are_bounded() {
        assert_eq!(threads(Some(1024)).unwrap(), Some(1024));
        assert!(threads(Some(1025)).is_err() && threads(Some(0)).is_err());
    }
}

//! Connections: taking them, TLS, and the limits that clients are held to. What is said on them is `http`'s matter.

mod accept;
mod connection;
mod tls;
mod write_timeout;

use std::time::Duration;

pub(crate) use accept::serve;
pub use tls::{Tls, TlsError};

/// What a client may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Connections at a time.
    pub(crate) max_connections: usize,
    /// For a TLS handshake, for the headers of a request, for taking what was written; also how long a connection may
    /// be idle.
    pub(crate) client_timeout: Duration,
}

/// File descriptors of a process beside its connections: the model's files, logs, the device.
const OTHER_FILES: u64 = 256;

/// Lets this process have as many files as `max_connections` needs, as far as the system allows.
pub(crate) fn allow_files(limits: Limits) {
    let needed = limits.max_connections as u64 + OTHER_FILES;
    match rlimit::Resource::NOFILE.get_soft() {
        Ok(allowed) if allowed >= needed => return,
        _ => {}
    }
    match rlimit::increase_nofile_limit(needed) {
        Ok(allowed) if allowed < needed => {
            tracing::warn!(allowed, needed, "max_connections needs more open files than the system allows");
        }
        Ok(_) => {}
        Err(error) => tracing::warn!("the limit of open files cannot be read: {error}"),
    }
}

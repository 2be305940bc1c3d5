//! Files that are read again when they change, or at SIGHUP: API keys, certificates.

use std::fmt;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use tokio::signal::unix::{Signal, SignalKind, signal};

/// How often files are looked at. Looking works where notifications do not: on network file systems, and where
/// Kubernetes swaps the folder that a link points to.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// What changes when a file does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    modified: Option<SystemTime>,
    len: u64,
    inode: u64,
}

impl From<Metadata> for Stamp {
    fn from(metadata: Metadata) -> Self {
        Self { modified: metadata.modified().ok(), len: metadata.len(), inode: metadata.ino() }
    }
}

/// Files at one moment. Taken before they are read, it misses no change.
#[derive(Debug)]
pub(crate) struct Stamps {
    files: Vec<PathBuf>,
    seen: Vec<Option<Stamp>>,
}

impl Stamps {
    /// Of these files as they are now.
    pub(crate) fn of(files: Vec<PathBuf>) -> Self {
        let mut stamps = Self { files, seen: Vec::new() };
        stamps.changed();
        stamps
    }

    /// Whether a file changed since the last call.
    fn changed(&mut self) -> bool {
        let stamp = |file: &PathBuf| file.metadata().ok().map(Stamp::from);
        let now: Vec<_> = self.files.iter().map(stamp).collect();
        let changed = now != self.seen;
        self.seen = now;
        changed
    }
}

/// Files and what to do when one of them changes.
pub(crate) struct Watched {
    /// For the log.
    what: &'static str,
    stamps: Stamps,
    reload: Box<dyn Fn() -> Result<(), String> + Send>,
}

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched")
            .field("what", &self.what)
            .field("stamps", &self.stamps)
            .finish_non_exhaustive()
    }
}

impl Watched {
    /// Calls `reload` when a file is no longer as it was.
    pub(crate) fn new(
        what: &'static str,
        stamps: Stamps,
        reload: impl Fn() -> Result<(), String> + Send + 'static,
    ) -> Self {
        Self { what, stamps, reload: Box::new(reload) }
    }

    fn reload(&self) {
        match (self.reload)() {
            Ok(()) => tracing::info!("{} read again", self.what),
            // Running on with what is known beats ending: the mistake may be noticed in the log and mended.
            Err(error) => tracing::error!("{} not read again: {error}; the old ones stay", self.what),
        }
    }
}

/// Listens to SIGHUP, which ends the process otherwise.
///
/// # Errors
/// Signals cannot be listened to.
pub(crate) fn hangup() -> std::io::Result<Signal> {
    signal(SignalKind::hangup())
}

/// Reloads for as long as it is polled.
pub(crate) async fn watch(mut watched: Vec<Watched>, mut hangup: Signal) {
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    loop {
        let asked = tokio::select! {
            _ = ticks.tick() => false,
            _ = hangup.recv() => true,
        };
        for watched in &mut watched {
            // Looked at in any case: what is read now must not count as a change later.
            if watched.stamps.changed() || asked {
                watched.reload();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_seen_once() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("keys");
        let mut watched = Stamps::of(vec![file.clone()]);
        assert!(!watched.changed());
        std::fs::write(&file, "a").unwrap();
        assert!(watched.changed() && !watched.changed());
        std::fs::write(&file, "ab").unwrap();
        assert!(watched.changed() && !watched.changed());
        // As Kubernetes does: another file under the same name.
        std::fs::write(folder.path().join("new"), "cd").unwrap();
        std::fs::rename(folder.path().join("new"), &file).unwrap();
        assert!(watched.changed() && !watched.changed());
        std::fs::remove_file(&file).unwrap();
        assert!(watched.changed());
    }
}

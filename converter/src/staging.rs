//! A folder that appears complete or not at all: written under another name, renamed at the end.
//!
//! `.OUT.partial-PID` lies beside OUT and holds a locked file, so that a later run can tell a folder whose
//! run was killed (removed then) from one that is being written.

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::error::ConvertError;

const LOCK: &str = ".lock";

/// An output folder in the making; dropped before [`commit`](Self::commit), it is removed.
#[derive(Debug)]
pub(crate) struct Staging {
    output: PathBuf,
    partial: PathBuf,
    lock: Option<File>,
}

impl Staging {
    /// Checks that `output` can be written, removes what killed runs left of it, and makes the folder.
    pub(crate) fn begin(output: &Path, source: &Path, force: bool) -> Result<Self, ConvertError> {
        let output = std::path::absolute(output).map_err(ConvertError::io(output))?;
        let refused = |reason| ConvertError::OutputRefused { path: output.clone(), reason };
        let (Some(parent), Some(name)) = (output.parent(), output.file_name()) else {
            return Err(refused("is no name for a folder"));
        };
        std::fs::create_dir_all(parent).map_err(ConvertError::io(parent))?;
        let prefix = format!(".{}.", name.to_string_lossy());
        remove_stale(parent, &prefix, &output);
        check_existing(&output, source, force)?;
        let partial = parent.join(format!("{prefix}partial-{}", std::process::id()));
        std::fs::create_dir(&partial).map_err(ConvertError::io(&partial))?;
        let mut staging = Self { output: output.clone(), partial, lock: None };
        let path = staging.partial.join(LOCK);
        let lock = File::create_new(&path).map_err(ConvertError::io(&path))?;
        lock.lock().map_err(ConvertError::io(&path))?;
        staging.lock = Some(lock);
        Ok(staging)
    }

    /// The folder to write into.
    pub(crate) fn dir(&self) -> &Path {
        &self.partial
    }

    /// Gives the folder its name. What had that name before is removed once it has been replaced.
    pub(crate) fn commit(mut self) -> Result<(), ConvertError> {
        sync_dir(&self.partial)?;
        let replaced = self.replaced();
        let aside = match std::fs::rename(&self.output, &replaced) {
            Ok(()) => true,
            Err(e) if e.kind() == ErrorKind::NotFound => false,
            Err(error) => return Err(ConvertError::Io { path: self.output.clone(), error }),
        };
        if let Err(error) = std::fs::rename(&self.partial, &self.output) {
            if aside {
                // Put the old checkpoint back; the error that matters is the first.
                let _ = std::fs::rename(&replaced, &self.output);
            }
            return Err(ConvertError::Io { path: self.output.clone(), error });
        }
        self.lock = None;
        // Only now: a folder without its lock would look abandoned.
        let lock = self.output.join(LOCK);
        std::fs::remove_file(&lock).map_err(ConvertError::io(&lock))?;
        if let Some(parent) = self.output.parent() {
            sync_dir(parent)?;
        }
        if aside {
            // The output is in place; what cannot be removed now, the next run removes.
            let _ = std::fs::remove_dir_all(&replaced);
        }
        Ok(())
    }

    /// Name of the old output while it is being replaced.
    fn replaced(&self) -> PathBuf {
        let name = self.partial.file_name().unwrap_or_default().to_string_lossy();
        self.partial.with_file_name(name.replace(".partial-", ".replaced-"))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.lock.is_some() {
            // The error that brought us here matters more; the next run tries again.
            let _ = std::fs::remove_dir_all(&self.partial);
        }
    }
}

/// An existing output is replaced when asked, and when it is a checkpoint or empty, but never the source itself.
pub(crate) fn check_existing(output: &Path, source: &Path, force: bool) -> Result<(), ConvertError> {
    let existing = match std::fs::symlink_metadata(output) {
        Ok(metadata) => metadata,
        Err(e) if matches!(e.kind(), ErrorKind::NotFound) => return Ok(()),
        Err(error) => return Err(ConvertError::Io { path: output.to_owned(), error }),
    };
    let refused = |reason| ConvertError::OutputRefused { path: output.to_owned(), reason };
    let canonical = |path: &Path| std::fs::canonicalize(path).map_err(ConvertError::io(path));
    if canonical(source)?.starts_with(canonical(output)?) {
        return Err(refused("holds the model that is to be converted"));
    }
    if !force {
        return Err(ConvertError::OutputExists { path: output.to_owned() });
    }
    if !existing.is_dir() {
        return Err(refused("is not a folder, and is not replaced"));
    }
    let mut entries = std::fs::read_dir(output).map_err(ConvertError::io(output))?;
    if !output.join("config.json").is_file() && entries.next().is_some() {
        return Err(refused("is not a checkpoint, and is not replaced"));
    }
    Ok(())
}

/// Refuses to begin what cannot fit: `dir`'s file system has less than `needed` bytes free.
pub(crate) fn check_space(dir: &Path, output: &Path, needed: u64) -> Result<(), ConvertError> {
    let stat = rustix::fs::statvfs(dir).map_err(|e| ConvertError::io(dir)(e.into()))?;
    let available = stat.f_bavail.saturating_mul(stat.f_frsize);
    if available < needed {
        return Err(ConvertError::DiskFull { path: output.to_owned(), needed, available: Some(available) });
    }
    Ok(())
}

/// Removes what runs that no longer live left beside the output; puts a checkpoint back that one was replacing.
/// Failures are left to the next run.
fn remove_stale(parent: &Path, prefix: &str, output: &Path) {
    let Ok(entries) = std::fs::read_dir(parent) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let Some(rest) = name.strip_prefix(prefix) else { continue };
        let is_number = |pid: &str| !pid.is_empty() && pid.bytes().all(|b| b.is_ascii_digit());
        if rest.strip_prefix("partial-").is_some_and(is_number) {
            let _ = match File::open(path.join(LOCK)) {
                Ok(lock) if lock.try_lock().is_ok() => std::fs::remove_dir_all(&path),
                Ok(_) => Ok(()),
                // Killed before it wrote anything.
                Err(_) => std::fs::remove_dir(&path),
            };
        } else if rest.strip_prefix("replaced-").is_some_and(is_number) {
            let _ =
                if output.exists() { std::fs::remove_dir_all(&path) } else { std::fs::rename(&path, output) };
        }
    }
}

fn sync_dir(path: &Path) -> Result<(), ConvertError> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(ConvertError::io(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, name: &str) {
        std::fs::create_dir_all(dir).unwrap();
        std::fs::write(dir.join(name), "{}").unwrap();
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn appears_on_commit_and_leaves_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let (source, output) = (root.path().join("model"), root.path().join("out"));
        write(&source, "config.json");
        let staging = Staging::begin(&output, &source, false).unwrap();
        write(staging.dir(), "config.json");
        assert!(!output.exists());
        staging.commit().unwrap();
        assert_eq!(names(root.path()), ["model", "out"]);
        assert_eq!(names(&output), ["config.json"]);

        drop(Staging::begin(&root.path().join("other"), &source, false).unwrap());
        assert_eq!(names(root.path()), ["model", "out"], "an abandoned folder is removed");
    }

    #[test]
    fn replaces_only_checkpoints_and_only_by_force() {
        let root = tempfile::tempdir().unwrap();
        let (source, output) = (root.path().join("model"), root.path().join("out"));
        write(&source, "config.json");
        write(&output, "config.json");
        write(&output, "old");
        assert!(matches!(Staging::begin(&output, &source, false), Err(ConvertError::OutputExists { .. })));
        let staging = Staging::begin(&output, &source, true).unwrap();
        write(staging.dir(), "new");
        staging.commit().unwrap();
        assert_eq!(names(&output), ["new"]);
        assert_eq!(names(root.path()), ["model", "out"]);

        // `out` is no checkpoint now: it has no config.json.
        let refused = |output: &Path| {
            matches!(Staging::begin(output, &source, true), Err(ConvertError::OutputRefused { .. }))
        };
        assert!(refused(&output));
        assert!(refused(&source), "the source");
        assert!(refused(root.path()), "the source's parent");
    }

    #[test]
    fn what_killed_runs_left_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let (source, output) = (root.path().join("model"), root.path().join("out"));
        write(&source, "config.json");
        write(&root.path().join(".out.partial-1"), LOCK);
        write(&root.path().join(".out.partial-2"), LOCK);
        write(&root.path().join(".out.partial-x"), "someone else's");
        write(&root.path().join(".out.replaced-3"), "config.json");
        let running = File::open(root.path().join(".out.partial-2").join(LOCK)).unwrap();
        running.lock().unwrap();
        let again = Staging::begin(&output, &source, false);
        assert!(
            matches!(again, Err(ConvertError::OutputExists { .. })),
            "put back, so not overwritten unasked"
        );
        let expected = [".out.partial-2", ".out.partial-x", "model", "out"];
        assert_eq!(names(root.path()), expected, "the running one stays, the replaced checkpoint is back");
    }
}

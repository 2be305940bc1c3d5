//! A folder that appears complete or not at all: written under another name, renamed at the end.
//!
//! `.OUT.partial-PID` lies beside OUT and holds a locked file, so that a later run can tell a folder whose
//! run was killed (removed then) from one that is being written.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use models::checkpoint::RECORD_FILE;
use rustix::fs::{AtFlags, CWD, RenameFlags, renameat_with, unlinkat};
use rustix::io::Errno;

use crate::error::ConvertError;
use crate::files::is_checkpoint_file;

const LOCK: &str = ".lock";

/// An output folder in the making; dropped before [`commit`](Self::commit), it is removed.
#[derive(Debug)]
pub(crate) struct Staging {
    output: PathBuf,
    source: PathBuf,
    force: bool,
    partial: PathBuf,
    lock: Option<File>,
}

impl Staging {
    /// Checks that `output` can be written, removes what killed runs left of it, and makes the folder.
    pub(crate) fn begin(output: &Path, source: &Path, force: bool) -> Result<Self, ConvertError> {
        let (output, parent, prefix) = output_names(output)?;
        std::fs::create_dir_all(&parent).map_err(ConvertError::io(&parent))?;
        remove_stale(&parent, &prefix);
        check_existing(&output, source, force)?;
        let partial = parent.join(format!("{prefix}partial-{}", std::process::id()));
        let lock = create_locked(&partial)?;
        Ok(Self { output, source: source.to_owned(), force, partial, lock: Some(lock) })
    }

    /// The folder to write into.
    pub(crate) fn dir(&self) -> &Path {
        &self.partial
    }

    /// Gives the folder its name. By force, what had that name is removed once it has been replaced; without, the
    /// name must still be free.
    ///
    /// # Errors
    /// The output's name is then as it was, unless the last step fails, the sync of the folder around it.
    pub(crate) fn commit(mut self) -> Result<(), ConvertError> {
        let dir = File::open(&self.partial).map_err(ConvertError::io(&self.partial))?;
        dir.sync_all().map_err(ConvertError::io(&self.partial))?;
        let replaced = self.publish()?;
        self.lock = None;
        // Only now: a folder without its lock would look abandoned. By descriptor: another run may have replaced the
        // output already. A lock that stays does no harm.
        let _ = unlinkat(&dir, LOCK, AtFlags::empty());
        if let Some(parent) = self.output.parent() {
            File::open(parent).and_then(|parent| parent.sync_all()).map_err(ConvertError::io(parent))?;
        }
        if let Some(replaced) = replaced {
            // The output is in place; what cannot be removed now, the next run removes.
            let _ = std::fs::remove_dir_all(replaced);
        }
        Ok(())
    }

    /// Renames the folder to the output; returns where the replaced one lies.
    fn publish(&mut self) -> Result<Option<PathBuf>, ConvertError> {
        loop {
            match renameat_with(CWD, &self.partial, CWD, &self.output, RenameFlags::NOREPLACE) {
                Ok(()) => return Ok(None),
                Err(Errno::EXIST) if !self.force => {
                    return Err(ConvertError::OutputExists { path: self.output.clone() });
                }
                Err(Errno::EXIST) => {}
                Err(e) if lacks_flags(e) => return self.publish_by_plain_renames(),
                Err(e) => return Err(ConvertError::io(&self.output)(e.into())),
            }
            check_existing(&self.output, &self.source, true)?;
            match self.exchange() {
                Ok(()) => break,
                // Removed meanwhile: the name is free.
                Err(Errno::NOENT) => {}
                Err(e) if lacks_flags(e) => return self.publish_by_plain_renames(),
                Err(e) => return Err(ConvertError::io(&self.output)(e.into())),
            }
        }
        // What was checked may have been replaced before the exchange: only now does it hold still.
        if let Err(reason) = check_contents(&self.partial) {
            return Err(match self.exchange() {
                Ok(()) => self.refused(reason),
                Err(_) => self.kept(&reason, &self.partial.clone()),
            });
        }
        Ok(Some(self.partial.clone()))
    }

    fn exchange(&self) -> Result<(), Errno> {
        renameat_with(CWD, &self.partial, CWD, &self.output, RenameFlags::EXCHANGE)
    }

    /// For file systems that cannot exchange names. A plain rename replaces nothing but an empty folder. A run that
    /// is killed between the two renames leaves the old checkpoint as `.OUT.replaced-PID`, which no run removes.
    fn publish_by_plain_renames(&mut self) -> Result<Option<PathBuf>, ConvertError> {
        check_existing(&self.output, &self.source, self.force)?;
        let name = self.partial.file_name().unwrap_or_default().to_string_lossy();
        let aside = self.partial.with_file_name(name.replace(".partial-", ".replaced-"));
        let moved = match self.force.then(|| std::fs::rename(&self.output, &aside)) {
            None => false,
            Some(Ok(())) => true,
            Some(Err(e)) if e.kind() == ErrorKind::NotFound => false,
            Some(Err(e)) => return Err(ConvertError::io(&self.output)(e)),
        };
        let published = if moved { check_contents(&aside) } else { Ok(()) }
            .map_err(|reason| self.refused(reason))
            .and_then(|()| {
                std::fs::rename(&self.partial, &self.output).map_err(ConvertError::io(&self.output))
            });
        match published {
            Ok(()) => Ok(moved.then_some(aside)),
            Err(error) if moved && std::fs::rename(&aside, &self.output).is_err() => {
                Err(self.kept(&error.to_string(), &aside))
            }
            Err(error) => Err(error),
        }
    }

    fn refused(&self, reason: String) -> ConvertError {
        ConvertError::OutputRefused { path: self.output.clone(), reason }
    }

    /// The error after which nothing is removed any more, since what lies at `at` is not ours.
    fn kept(&mut self, reason: &str, at: &Path) -> ConvertError {
        self.lock = None;
        self.refused(format!("{reason}; what was there is now {}", at.display()))
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

/// The output's absolute path, its parent, and what the names of folders in the making begin with.
fn output_names(output: &Path) -> Result<(PathBuf, PathBuf, String), ConvertError> {
    let output = std::path::absolute(output).map_err(ConvertError::io(output))?;
    match (output.parent(), output.file_name()) {
        (Some(parent), Some(name)) => {
            let (parent, prefix) = (parent.to_owned(), format!(".{}.", name.to_string_lossy()));
            Ok((output, parent, prefix))
        }
        _ => Err(ConvertError::OutputRefused { path: output, reason: "is no name for a folder".to_owned() }),
    }
}

/// Makes a folder that holds a locked file. Until the lock is held, another run may take the folder for abandoned
/// and remove it: then once more.
fn create_locked(dir: &Path) -> Result<File, ConvertError> {
    let path = dir.join(LOCK);
    let attempt = || -> std::io::Result<File> {
        let lock = File::create_new(&path)?;
        lock.lock()?;
        let (held, named) = (lock.metadata()?, std::fs::metadata(&path)?);
        if held.ino() == named.ino() { Ok(lock) } else { Err(ErrorKind::NotFound.into()) }
    };
    loop {
        std::fs::create_dir(dir).map_err(ConvertError::io(dir))?;
        match attempt() {
            Ok(lock) => return Ok(lock),
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(ConvertError::io(&path)(e)),
        }
    }
}

/// Whether a file system does not know `renameat2`'s flags.
fn lacks_flags(error: Errno) -> bool {
    [Errno::INVAL, Errno::NOSYS, Errno::OPNOTSUPP].contains(&error)
}

/// What [`Staging::begin`] checks, and that `needed` bytes are free, without writing anything.
pub(crate) fn check_only(output: &Path, source: &Path, force: bool, needed: u64) -> Result<(), ConvertError> {
    let (output, parent, _) = output_names(output)?;
    check_existing(&output, source, force)?;
    let existing = parent.ancestors().find(|dir| dir.exists()).unwrap_or(&parent);
    if !existing.is_dir() {
        return Err(ConvertError::io(existing)(ErrorKind::NotADirectory.into()));
    }
    check_space(existing, &output, needed)
}

/// An existing output is replaced when asked, and when it is a checkpoint or empty, but never the source itself.
fn check_existing(output: &Path, source: &Path, force: bool) -> Result<(), ConvertError> {
    let existing = match std::fs::symlink_metadata(output) {
        Ok(metadata) => metadata,
        Err(e) if matches!(e.kind(), ErrorKind::NotFound) => return Ok(()),
        Err(error) => return Err(ConvertError::Io { path: output.to_owned(), error }),
    };
    let refused = |reason: String| ConvertError::OutputRefused { path: output.to_owned(), reason };
    let canonical = |path: &Path| std::fs::canonicalize(path).map_err(ConvertError::io(path));
    if existing.is_dir() && canonical(source)?.starts_with(canonical(output)?) {
        return Err(refused("holds the model that is to be converted".to_owned()));
    }
    if !force {
        return Err(ConvertError::OutputExists { path: output.to_owned() });
    }
    check_contents(output).map_err(refused)
}

/// Whether a folder may be replaced: it is empty, or converted, or a checkpoint and nothing else; else why not.
fn check_contents(dir: &Path) -> Result<(), String> {
    if !std::fs::symlink_metadata(dir).is_ok_and(|metadata| metadata.is_dir()) {
        return Err("is not a folder, and is not replaced".to_owned());
    }
    let entries = std::fs::read_dir(dir).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let mut entries = entries.map_err(|e| format!("cannot be listed, and is not replaced: {e}"))?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    let is_file = |name: &str| dir.join(name).is_file();
    if entries.is_empty() || is_file(RECORD_FILE) {
        return Ok(());
    }
    let belongs = |entry: &std::fs::DirEntry| {
        // Not a link to a folder, either.
        let plain = !entry.path().is_dir();
        plain && entry.file_name().to_str().is_some_and(|name| name == LOCK || is_checkpoint_file(name))
    };
    if let Some(foreign) = entries.iter().find(|entry| !belongs(entry)) {
        let name = foreign.file_name();
        return Err(format!("holds '{}', which is no part of a checkpoint: not replaced", name.display()));
    }
    let weights = entries.iter().any(|e| e.path().extension().is_some_and(|ext| ext == "safetensors"));
    if is_file("config.json") && weights {
        Ok(())
    } else {
        Err("is not a checkpoint (config.json and safetensors), and is not replaced".to_owned())
    }
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

/// Removes what runs that no longer live left beside the output. Failures are left to the next run.
fn remove_stale(parent: &Path, prefix: &str) {
    let Ok(entries) = std::fs::read_dir(parent) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let pid = name.strip_prefix(prefix).and_then(|rest| rest.strip_prefix("partial-"));
        if !pid.is_some_and(|pid| !pid.is_empty() && pid.bytes().all(|b| b.is_ascii_digit())) {
            continue;
        }
        let _ = match File::open(path.join(LOCK)) {
            Ok(lock) if lock.try_lock().is_ok() => std::fs::remove_dir_all(&path),
            Ok(_) => Ok(()),
            // A checkpoint that was replaced, or a folder whose run was killed before it wrote anything.
            Err(_) if check_contents(&path).is_ok() => std::fs::remove_dir_all(&path),
            Err(_) => Ok(()),
        };
    }
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
        write(&output, "model.safetensors");
        assert!(matches!(Staging::begin(&output, &source, false), Err(ConvertError::OutputExists { .. })));
        let staging = Staging::begin(&output, &source, true).unwrap();
        write(staging.dir(), "new");
        staging.commit().unwrap();
        assert_eq!(names(&output), ["new"]);
        assert_eq!(names(root.path()), ["model", "out"]);

        let refusal = |output: &Path| match Staging::begin(output, &source, true) {
            Err(ConvertError::OutputRefused { reason, .. }) => reason,
            other => panic!("{other:?}"),
        };
        assert!(refusal(&output).contains("'new'"));
        assert!(refusal(&source).contains("to be converted"));
        assert!(refusal(root.path()).contains("to be converted"), "the source's parent");
        let project = root.path().join("project");
        for (name, expected) in
            [("config.json", "not a checkpoint"), ("model.safetensors", ""), ("thesis.tex", "'thesis.tex'")]
        {
            write(&project, name);
            match check_existing(&project, &source, true) {
                Ok(()) => assert_eq!(expected, ""),
                Err(error) => {
                    assert!(!expected.is_empty() && error.to_string().contains(expected), "{error}");
                }
            }
        }
        write(&project, RECORD_FILE);
        check_existing(&project, &source, true).unwrap();
    }

    #[test]
    fn what_appears_meanwhile_is_kept() {
        let root = tempfile::tempdir().unwrap();
        let (source, output) = (root.path().join("model"), root.path().join("out"));
        write(&source, "config.json");
        for force in [false, true] {
            let staging = Staging::begin(&output, &source, force).unwrap();
            write(staging.dir(), "new");
            write(&output, "thesis.tex");
            let error = staging.commit().unwrap_err();
            match error {
                ConvertError::OutputExists { .. } => assert!(!force),
                ConvertError::OutputRefused { reason, .. } => assert!(force && reason.contains("thesis.tex")),
                other => panic!("{other}"),
            }
            assert_eq!(names(&output), ["thesis.tex"]);
            assert_eq!(names(root.path()), ["model", "out"]);
            std::fs::remove_dir_all(&output).unwrap();
        }
    }

    #[test]
    fn plain_renames_do_the_same() {
        let root = tempfile::tempdir().unwrap();
        let (source, output) = (root.path().join("model"), root.path().join("out"));
        write(&source, "config.json");
        let begin = |force: bool| {
            let staging = Staging::begin(&output, &source, force).unwrap();
            write(staging.dir(), RECORD_FILE);
            staging
        };
        let mut first = begin(false);
        assert_eq!(first.publish_by_plain_renames().unwrap(), None);
        first.lock = None;
        let mut second = begin(true);
        let aside = second.publish_by_plain_renames().unwrap().unwrap();
        second.lock = None;
        assert_eq!(names(&aside), names(&output));
        std::fs::remove_dir_all(&aside).unwrap();
        std::fs::remove_dir_all(&output).unwrap();
        for force in [false, true] {
            let mut refused = begin(force);
            write(&output, "thesis.tex");
            refused.publish_by_plain_renames().unwrap_err();
            drop(refused);
            assert_eq!(names(&output), ["thesis.tex"]);
            assert_eq!(names(root.path()), ["model", "out"]);
            std::fs::remove_dir_all(&output).unwrap();
        }
    }

    #[test]
    fn what_killed_runs_left_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let (source, output) = (root.path().join("model"), root.path().join("out"));
        write(&source, "config.json");
        write(&root.path().join(".out.partial-1"), LOCK);
        write(&root.path().join(".out.partial-2"), LOCK);
        write(&root.path().join(".out.partial-3"), RECORD_FILE);
        write(&root.path().join(".out.partial-x"), "someone else's");
        let running = File::open(root.path().join(".out.partial-2").join(LOCK)).unwrap();
        running.lock().unwrap();
        drop(Staging::begin(&output, &source, false).unwrap());
        let expected = [".out.partial-2", ".out.partial-x", "model"];
        assert_eq!(names(root.path()), expected, "the running one stays");
    }
}

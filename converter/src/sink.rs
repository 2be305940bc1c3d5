//! The output's shards, written at known offsets by any thread in any order.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::ConvertError;
use crate::output::{Output, Slot};

/// Open shards.
#[derive(Debug)]
pub(crate) struct Sink {
    files: Vec<(PathBuf, File)>,
    output: PathBuf,
    needed: u64,
}

impl Sink {
    /// Creates the shards in `dir` and writes their headers. `output` is the name in messages.
    pub(crate) fn create(dir: &Path, layout: &Output, output: &Path) -> Result<Self, ConvertError> {
        let mut sink = Self {
            files: Vec::with_capacity(layout.shards.len()),
            output: output.to_owned(),
            needed: layout.total_bytes(),
        };
        for (shard, description) in layout.shards.iter().enumerate() {
            let path = dir.join(&description.file_name);
            let file = File::create_new(&path).map_err(ConvertError::io(&path))?;
            sink.files.push((path, file));
            sink.write(Slot { shard, offset: 0 }, 0, &description.header)?;
        }
        Ok(sink)
    }

    /// Writes `bytes` at `start` bytes after the beginning of `slot`.
    pub(crate) fn write(&self, slot: Slot, start: u64, bytes: &[u8]) -> Result<(), ConvertError> {
        let (path, file) = &self.files[slot.shard];
        file.write_all_at(bytes, slot.offset + start).map_err(|e| self.explain(path, e))
    }

    /// Waits until everything is on the disk.
    pub(crate) fn sync(self) -> Result<(), ConvertError> {
        for (path, file) in &self.files {
            file.sync_all().map_err(|e| self.explain(path, e))?;
        }
        Ok(())
    }

    fn explain(&self, path: &Path, error: std::io::Error) -> ConvertError {
        match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                ConvertError::DiskFull { path: self.output.clone(), needed: self.needed, available: None }
            }
            _ => ConvertError::Io { path: path.to_owned(), error },
        }
    }
}

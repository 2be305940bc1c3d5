//! Safetensors shards, read by position: headers are parsed and checked against the file size once, at open.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Read;
use std::num::NonZero;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;

use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::Deserialize;

use super::CheckpointError;

/// The format allows headers of up to 100 MB; a longer one is a corrupt length field.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Bytes that make a thread of their own worth while.
const PARALLEL_READ_BYTES: usize = 1 << 20;

/// Name of a checkpoint's only safetensors file.
pub const SINGLE_FILE: &str = "model.safetensors";
/// Name of the index of a sharded checkpoint.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// Where a tensor is and what it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name.
    pub name: String,
    /// Stored element type.
    pub dtype: Dtype,
    /// Shape, in elements of `dtype`.
    pub shape: Vec<usize>,
    /// Size in bytes.
    pub bytes: u64,
    /// Number of its shard, an index into [`Checkpoint::shard_files`](super::Checkpoint::shard_files).
    pub shard: usize,
    offset: u64,
}

impl TensorInfo {
    /// Offset of its first byte in the shard's file.
    pub fn offset(&self) -> u64 {
        self.offset
    }
}

/// The open shards of a checkpoint.
#[derive(Debug)]
pub(super) struct ShardSet {
    files: Vec<(PathBuf, File)>,
    tensors: BTreeMap<String, TensorInfo>,
}

/// `model.safetensors.index.json`.
#[derive(Debug, Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl ShardSet {
    /// Opens `model.safetensors`, or the shards that the index names.
    pub(super) fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let single = dir.join(SINGLE_FILE);
        let index_path = dir.join(INDEX_FILE);
        let mut set = Self { files: Vec::new(), tensors: BTreeMap::new() };
        if single.is_file() {
            for info in set.add_file(single)? {
                set.tensors.insert(info.name.clone(), info);
            }
        } else if index_path.is_file() {
            set.open_index(dir, &index_path)?;
        } else {
            return Err(CheckpointError::NotACheckpoint {
                dir: dir.to_owned(),
                reason: "holds neither model.safetensors nor model.safetensors.index.json",
            });
        }
        Ok(set)
    }

    fn open_index(&mut self, dir: &Path, index_path: &Path) -> Result<(), CheckpointError> {
        let corrupt = |reason: String| CheckpointError::Corrupt { path: index_path.to_owned(), reason };
        let text = std::fs::read(index_path)
            .map_err(|error| CheckpointError::Io { path: index_path.to_owned(), error })?;
        let index: Index = serde_json::from_slice(&text)
            .map_err(|error| CheckpointError::Json { path: index_path.to_owned(), error })?;
        let mut by_shard: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (tensor, shard) in &index.weight_map {
            by_shard.entry(shard).or_default().push(tensor);
        }
        for (shard, listed) in by_shard {
            let name = Path::new(shard);
            if name.file_name() != Some(name.as_os_str()) {
                return Err(corrupt(format!("shard name '{shard}' is not a plain file name")));
            }
            let mut infos: HashMap<String, TensorInfo> =
                self.add_file(dir.join(name))?.into_iter().map(|info| (info.name.clone(), info)).collect();
            for tensor in listed {
                let info = infos.remove(tensor).ok_or_else(|| {
                    corrupt(format!("tensor {tensor} is listed in {shard} but is not there"))
                })?;
                self.tensors.insert(info.name.clone(), info);
            }
        }
        Ok(())
    }

    /// Opens one safetensors file; returns what it holds.
    fn add_file(&mut self, path: PathBuf) -> Result<Vec<TensorInfo>, CheckpointError> {
        let io = |error| CheckpointError::Io { path: path.clone(), error };
        let corrupt = |reason: String| CheckpointError::Corrupt { path: path.clone(), reason };
        let mut file = File::open(&path).map_err(io)?;
        let file_bytes = file.metadata().map_err(io)?.len();
        if file_bytes < 8 {
            return Err(corrupt(format!("truncated: {file_bytes} bytes are no safetensors file")));
        }
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(io)?;
        let header_bytes = u64::from_le_bytes(length);
        if header_bytes > MAX_HEADER_BYTES {
            return Err(corrupt(format!("no safetensors file: header length {header_bytes}")));
        }
        if 8 + header_bytes > file_bytes {
            return Err(corrupt(format!(
                "truncated: the header takes {header_bytes} bytes, the file has {file_bytes}"
            )));
        }
        // At most MAX_HEADER_BYTES, so the cast cannot lose bits.
        let mut header = vec![0; header_bytes as usize];
        file.read_exact(&mut header).map_err(io)?;
        let metadata: Metadata = serde_json::from_slice(&header)
            .map_err(|e| corrupt(format!("corrupt safetensors header: {e}")))?;
        let expected = 8 + header_bytes + metadata.data_len() as u64;
        if expected != file_bytes {
            let what = if file_bytes < expected { "truncated" } else { "corrupt" };
            return Err(corrupt(format!("{what}: {file_bytes} bytes, the header describes {expected}")));
        }
        let shard = self.files.len();
        let infos = metadata
            .tensors()
            .into_iter()
            .map(|(name, info)| TensorInfo {
                name,
                dtype: info.dtype,
                shape: info.shape.clone(),
                bytes: (info.data_offsets.1 - info.data_offsets.0) as u64,
                shard,
                offset: 8 + header_bytes + info.data_offsets.0 as u64,
            })
            .collect();
        self.files.push((path, file));
        Ok(infos)
    }

    pub(super) fn info(&self, tensor: &str) -> Option<&TensorInfo> {
        self.tensors.get(tensor)
    }

    /// Every tensor, by name.
    pub(super) fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values()
    }

    /// Paths of the shards, in the order of [`TensorInfo::shard`].
    pub(super) fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|(path, _)| path.as_path())
    }

    pub(super) fn path(&self, info: &TensorInfo) -> &Path {
        &self.files[info.shard].0
    }

    /// Fills `out` from byte `start` of the tensor on; the range lies inside it. Large ranges are read by all cores: one
    /// copies from the page cache at a few GB/s.
    pub(super) fn read(&self, info: &TensorInfo, start: u64, out: &mut [u8]) -> Result<(), CheckpointError> {
        debug_assert!(start + out.len() as u64 <= info.bytes, "range inside the tensor");
        let (path, file) = &self.files[info.shard];
        let read = |part: &mut [u8], from: usize| {
            file.read_exact_at(part, info.offset + start + from as u64)
                .map_err(|error| CheckpointError::Io { path: path.clone(), error })
        };
        if out.len() < 2 * PARALLEL_READ_BYTES {
            return read(out, 0);
        }
        let threads = thread::available_parallelism().map_or(1, NonZero::get);
        let part_bytes = out.len().div_ceil(threads).max(PARALLEL_READ_BYTES);
        thread::scope(|scope| {
            let parts = out.chunks_mut(part_bytes).enumerate();
            let readers: Vec<_> =
                parts.map(|(index, part)| scope.spawn(move || read(part, index * part_bytes))).collect();
            readers.into_iter().try_for_each(|reader| match reader.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            })
        })
    }
}

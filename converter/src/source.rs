//! Where weights come from: a Hugging Face folder or a GGUF file, read piece by piece.

use std::ops::Range;
use std::path::{Path, PathBuf};

use models::checkpoint::Checkpoint;
use safetensors::Dtype;
use serde_json::Value;

use crate::error::ConvertError;
use crate::gguf::GgufSource;
use crate::permute::{ChannelOrders, TensorOrder};
use crate::plan::{LM_HEAD, SourceTraits};

/// Bytes of a safetensors tensor that a worker takes at once.
const PIECE_BYTES: u64 = 4 << 20;

/// A tensor of the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceTensor {
    /// Its name in a Hugging Face folder.
    pub name: String,
    /// Element type as it is read (GGUF tensors are dequantized to F32).
    pub dtype: Dtype,
    /// Shape, row-major.
    pub shape: Vec<usize>,
}

impl SourceTensor {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&dim| dim as u64).product()
    }

    /// Bytes as read.
    pub fn bytes(&self) -> u64 {
        self.elements() * self.dtype.bitsize() as u64 / 8
    }
}

/// An open source, its channels in the order of the files or in one of its own.
#[derive(Debug)]
pub(crate) struct Source {
    origin: Origin,
    orders: ChannelOrders,
}

/// What a source's tensors are read from.
#[derive(Debug)]
pub(crate) enum Origin {
    /// A folder with `config.json` and safetensors.
    Folder { checkpoint: Box<Checkpoint>, tensors: Vec<SourceTensor> },
    /// A GGUF file.
    Gguf(Box<GgufSource>),
}

impl Origin {
    fn open(path: &Path) -> Result<Self, ConvertError> {
        if std::fs::metadata(path).map_err(ConvertError::io(path))?.is_file() {
            return Ok(Self::Gguf(Box::new(GgufSource::open(path)?)));
        }
        let checkpoint = Box::new(Checkpoint::open(path)?);
        if let Some(method) = checkpoint.quantization().dialect() {
            return Err(ConvertError::AlreadyQuantized { path: path.to_owned(), method });
        }
        // File order: workers then read each file from its beginning to its end.
        let mut infos: Vec<_> = checkpoint.tensors().collect();
        infos.sort_by_key(|info| (info.shard, info.offset()));
        let tensors = infos
            .into_iter()
            .map(|info| SourceTensor {
                name: info.name.clone(),
                dtype: info.dtype,
                shape: info.shape.clone(),
            })
            .collect();
        Ok(Self::Folder { checkpoint, tensors })
    }

    /// Replaces `out` by bytes `range` of a tensor, whole rows; of a GGUF file by all of it.
    fn read(&self, tensor: usize, range: &Range<u64>, out: &mut Vec<u8>) -> Result<(), ConvertError> {
        match self {
            Self::Folder { checkpoint, tensors } => {
                let info = checkpoint.info(&tensors[tensor].name)?;
                // A piece is at most one row or PIECE_BYTES, and rows fit in memory.
                out.resize((range.end - range.start) as usize, 0);
                Ok(checkpoint.read_range(info, range.start, out)?)
            }
            Self::Gguf(gguf) => gguf.read(tensor, out),
        }
    }
}

impl Source {
    /// Opens a folder, or a file that is taken for GGUF.
    pub(crate) fn open(path: &Path) -> Result<Self, ConvertError> {
        Ok(Self { origin: Origin::open(path)?, orders: ChannelOrders::default() })
    }

    /// From here on, tensors are read with their channels in these orders.
    pub(crate) fn reorder(&mut self, orders: ChannelOrders) {
        self.orders = orders;
    }

    /// The orders of channels that are not those of the files.
    pub(crate) fn orders(&self) -> &ChannelOrders {
        &self.orders
    }

    /// What the tensors are read from.
    pub(crate) fn origin(&self) -> &Origin {
        &self.origin
    }

    /// The tensors, in the order in which they are best read.
    pub(crate) fn tensors(&self) -> &[SourceTensor] {
        match &self.origin {
            Origin::Folder { tensors, .. } => tensors,
            Origin::Gguf(gguf) => gguf.tensors(),
        }
    }

    /// `config.json`, as read or as made from the GGUF metadata.
    pub(crate) fn config(&self) -> &Value {
        match &self.origin {
            Origin::Folder { checkpoint, .. } => checkpoint.config(),
            Origin::Gguf(gguf) => gguf.config(),
        }
    }

    pub(crate) fn traits(&self) -> SourceTraits {
        let head = format!("{LM_HEAD}.weight");
        let tied = match self.config().get("tie_word_embeddings").and_then(Value::as_bool) {
            Some(tied) => tied,
            None => !self.tensors().iter().any(|tensor| tensor.name == head),
        };
        SourceTraits { tied, to_bf16: matches!(self.origin, Origin::Gguf(_)) }
    }

    /// Weight files, in the order in which [`tensors`](Self::tensors) uses them.
    pub(crate) fn weight_files(&self) -> Vec<PathBuf> {
        match &self.origin {
            Origin::Folder { checkpoint, .. } => checkpoint.shard_files().map(Path::to_owned).collect(),
            Origin::Gguf(gguf) => vec![gguf.path().to_owned()],
        }
    }

    /// Index into [`weight_files`](Self::weight_files) of a tensor's file.
    pub(crate) fn file_of(&self, tensor: &SourceTensor) -> Result<usize, ConvertError> {
        match &self.origin {
            Origin::Folder { checkpoint, .. } => Ok(checkpoint.info(&tensor.name)?.shard),
            Origin::Gguf(_) => Ok(0),
        }
    }

    /// Path of a tensor's file; of the model, where there is no such tensor.
    pub(crate) fn path_of(&self, tensor: Option<&str>) -> PathBuf {
        match &self.origin {
            Origin::Folder { checkpoint, .. } => tensor
                .and_then(|name| checkpoint.info(name).ok())
                .and_then(|info| checkpoint.shard_files().nth(info.shard))
                .unwrap_or_else(|| checkpoint.dir())
                .to_owned(),
            Origin::Gguf(gguf) => gguf.path().to_owned(),
        }
    }

    /// Bytes the tensors take in the source's files.
    pub(crate) fn stored_bytes(&self, tensor: usize) -> u64 {
        match &self.origin {
            Origin::Folder { tensors, .. } => tensors[tensor].bytes(),
            Origin::Gguf(gguf) => gguf.stored_bytes(tensor),
        }
    }

    /// Byte ranges, whole rows each, in which a tensor is read.
    pub(crate) fn pieces(&self, tensor: &SourceTensor) -> Vec<Range<u64>> {
        let total = tensor.bytes();
        let rows = tensor.shape.first().copied().unwrap_or(1).max(1) as u64;
        let row = (total / rows).max(1);
        let piece = match &self.origin {
            Origin::Folder { .. } => (PIECE_BYTES / row).max(1) * row,
            // Dequantized as a whole.
            Origin::Gguf(_) => total.max(1),
        };
        (0..total.div_ceil(piece)).map(|i| i * piece..((i + 1) * piece).min(total)).collect()
    }

    /// Replaces `out` by bytes `range` (one of [`pieces`](Self::pieces)) of a tensor.
    pub(crate) fn read(
        &self,
        tensor: usize,
        range: &Range<u64>,
        out: &mut Vec<u8>,
    ) -> Result<(), ConvertError> {
        let info = &self.tensors()[tensor];
        match self.orders.of(&info.name) {
            None => self.origin.read(tensor, range, out),
            Some(TensorOrder::Columns(order)) => {
                self.origin.read(tensor, range, out)?;
                order.gather_columns(info.dtype, out);
                Ok(())
            }
            Some(TensorOrder::Rows(order)) => {
                let row_bytes = info.bytes() / info.shape[0].max(1) as u64;
                if range.end - range.start == info.bytes() {
                    self.origin.read(tensor, range, out)?;
                    order.gather_rows(row_bytes as usize, out);
                    return Ok(());
                }
                let (mut row, mut rows) =
                    (Vec::new(), Vec::with_capacity((range.end - range.start) as usize));
                for index in range.start / row_bytes..range.end / row_bytes {
                    let first = order.source_of(index as usize) as u64 * row_bytes;
                    self.origin.read(tensor, &(first..first + row_bytes), &mut row)?;
                    rows.extend_from_slice(&row);
                }
                *out = rows;
                Ok(())
            }
        }
    }
}

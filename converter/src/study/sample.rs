//! What is studied: panels of weights, and the inputs that reach them when a text is read. Memory is that of the
//! panels; with a text, that of the model.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use kernels::{Backend, Buffer, Device, KV_BLOCK_TOKENS, KvCacheDtype};
use models::checkpoint::{Checkpoint, DenseTensor, TensorInfo, dense_dtype};
use models::{KvCache, ModelConfig, Observer, OutputRows, StepInputs, StepSequence, Workspace};

use super::StudyError;
use super::quantizer::Matrix;
use crate::eval::{EvalError, Windows};
use crate::text_tokenizer::TextTokenizer;

/// Linear modules of a decoder layer, those that read one input together.
const GROUPS: [&[&str]; 4] =
    [&["q_proj", "k_proj", "v_proj"], &["o_proj"], &["gate_proj", "up_proj"], &["down_proj"]];

/// Rows of a panel: the largest block.
const PANEL_ROWS: usize = 128;

/// Tokens of the text that are run.
const WINDOW_TOKENS: usize = 512;

/// Where the panels of activations begin in it: one with the first token, which is often far from all others, and one
/// without.
const TOKEN_PANELS: [usize; 2] = [0, 256];

/// The modules of one layer that read one input.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) modules: Vec<Module>,
    /// Their input, `[tokens, K]`, if a text was given.
    pub(super) input: Option<Matrix>,
}

/// One linear module.
#[derive(Debug)]
pub(super) struct Module {
    /// Last part of its name.
    pub(super) kind: String,
    /// Neighbouring rows of its weight, `[up to 128, K]`.
    pub(super) weight: Matrix,
}

/// Samples `layers` decoder layers, evenly spread, of the unquantized model in `folder`.
pub(super) fn sample(
    folder: &Path,
    text: Option<&Path>,
    layers: NonZeroUsize,
    threads: NonZeroUsize,
) -> Result<(Vec<usize>, Vec<Group>), StudyError> {
    let checkpoint = Checkpoint::open(folder)?;
    if checkpoint.quantization().dialect().is_some() {
        return Err(StudyError::Quantized { path: folder.to_owned() });
    }
    let wrong = |error| StudyError::Model { path: folder.to_owned(), error: Box::new(error) };
    let config = ModelConfig::parse(checkpoint.config()).map_err(|error| wrong(error.into()))?;
    let chosen = spread_out(layers.get(), config.num_layers);
    let mut inputs = match text {
        Some(text) => capture(folder, &checkpoint, text, &chosen, threads)?,
        None => BTreeMap::new(),
    };
    let mut groups = Vec::new();
    for &layer in &chosen {
        for names in GROUPS {
            let modules = names.iter().map(|kind| module(&checkpoint, layer, kind));
            let modules = modules.collect::<Result<_, StudyError>>()?;
            groups.push(Group { modules, input: inputs.remove(&(layer, names[0].to_owned())) });
        }
    }
    Ok((chosen, groups))
}

/// `count` of `0..all`, the first and the last among them.
fn spread_out(count: usize, all: usize) -> Vec<usize> {
    match count.min(all) {
        0 => Vec::new(),
        1 => vec![all / 2],
        count => (0..count).map(|i| i * (all - 1) / (count - 1)).collect(),
    }
}

/// A panel of the middle rows of a module's weight.
fn module(checkpoint: &Checkpoint, layer: usize, kind: &str) -> Result<Module, StudyError> {
    let (infix, suffix) = (format!(".layers.{layer}."), format!(".{kind}.weight"));
    let info = checkpoint.tensors().find(|info| info.name.contains(&infix) && info.name.ends_with(&suffix));
    let missing = || StudyError::NoModule { path: checkpoint.dir().to_owned(), layer, kind: kind.to_owned() };
    let info: &TensorInfo = info.ok_or_else(missing)?;
    let (&[rows, cols], Some(dtype)) = (info.shape.as_slice(), dense_dtype(info.dtype)) else {
        return Err(missing());
    };
    let panel = rows.min(PANEL_ROWS);
    let row_bytes = cols * dtype.size_bytes();
    let mut bytes = vec![0; panel * row_bytes];
    checkpoint.read_range(info, ((rows - panel) / 2 * row_bytes) as u64, &mut bytes)?;
    let tensor = DenseTensor { name: info.name.clone(), dtype, shape: vec![panel, cols], bytes };
    let weight = Matrix { rows: panel, cols, values: tensor.to_f32() };
    if let Some(value) = weight.values.iter().find(|value| !value.is_finite()) {
        return Err(StudyError::NonFinite {
            path: checkpoint.dir().to_owned(),
            tensor: tensor.name,
            value: *value,
        });
    }
    Ok(Module { kind: kind.to_owned(), weight })
}

/// By layer and first module.
type Inputs = BTreeMap<(usize, String), Matrix>;

/// Runs the first window of `text` through the model, and keeps panels of the inputs of `layers`.
fn capture(
    folder: &Path,
    checkpoint: &Checkpoint,
    text: &Path,
    layers: &[usize],
    threads: NonZeroUsize,
) -> Result<Inputs, StudyError> {
    let backend = kernels::open(Device::Cpu { threads: threads.get() }).map_err(EvalError::from)?;
    let model = models::load(&*backend, checkpoint)
        .map_err(|error| StudyError::Model { path: folder.to_owned(), error: Box::new(error) })?;
    let config = model.config();
    let length = WINDOW_TOKENS.min(config.max_model_len);
    let windows = Windows::read(&TextTokenizer::open(folder)?, text, 1, length)?;
    let tokens: Vec<u32> = windows.iter().flatten().copied().collect();
    let largest = tokens.iter().copied().max().unwrap_or(0);
    if largest as usize >= config.vocab_size {
        return Err(StudyError::Vocabulary { path: folder.to_owned(), token: largest });
    }
    let blocks: Vec<u32> = (0..length.div_ceil(KV_BLOCK_TOKENS) as u32).collect();
    let mut inputs = Inputs::new();
    let mut run = || {
        let mut step = StepInputs::new(&*backend, length, 1, blocks.len())?;
        let mut kv = KvCache::new(&*backend, config, blocks.len(), KvCacheDtype::F32)?;
        let mut workspace = Workspace::new(&*backend, &*model, length, 1)?;
        let sequence = StepSequence { tokens: &tokens, first_position: 0, block_table: &blocks };
        step.fill(&*backend, &[sequence], OutputRows::All);
        let mut capture = Capture { backend: &*backend, layers, rows: length, inputs: &mut inputs };
        model.forward_observed(&*backend, &step, &mut kv, &mut workspace, &mut capture);
        Ok(())
    };
    run().map_err(EvalError::Device)?;
    Ok(inputs)
}

/// Keeps panels of what it sees.
struct Capture<'a> {
    backend: &'a dyn Backend,
    layers: &'a [usize],
    rows: usize,
    inputs: &'a mut Inputs,
}

impl Observer for Capture<'_> {
    fn linear_input(
        &mut self,
        layer: usize,
        modules: &mut dyn Iterator<Item = &str>,
        input: &Buffer,
        cols: usize,
    ) {
        let Some(first) = modules.next().filter(|_| self.layers.contains(&layer)) else { return };
        let mut values = Vec::new();
        for start in TOKEN_PANELS {
            let rows = PANEL_ROWS.min(self.rows.saturating_sub(start));
            let kept = values.len();
            values.resize(kept + rows * cols, 0.0);
            self.backend.read_f32(input, start * cols, &mut values[kept..]);
        }
        self.inputs.insert((layer, first.to_owned()), Matrix { rows: values.len() / cols, cols, values });
    }
}

/// Default name of the report: `MODEL-study.html` in the current folder.
pub fn default_output(model: &Path) -> PathBuf {
    let folder = std::fs::canonicalize(model).unwrap_or_else(|_| model.to_owned());
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    PathBuf::from(format!("{name}-study.html"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_spread_from_the_first_to_the_last() {
        assert_eq!(spread_out(4, 30), [0, 9, 19, 29]);
        assert_eq!(spread_out(9, 3), [0, 1, 2]);
        assert_eq!(spread_out(1, 7), [3]);
    }
}

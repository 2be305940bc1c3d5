//! What the tests of this crate share: golden checkpoints, and a model that is ready to run.

use std::fs;
use std::path::{Path, PathBuf};

use kernels::{Backend, Device, KV_BLOCK_TOKENS, KvCacheDtype};
use models::checkpoint::Checkpoint;
use models::{KvCache, Model, OutputRows, StepInputs, StepSequence, Workspace};
use safetensors::SafeTensors;
use serde_json::Value;
use tempfile::TempDir;

/// A file or folder of the repository's test data.
pub(crate) fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests").join(path)
}

/// A checkpoint of `tests/golden/logits`, and what Transformers computes with it.
pub(crate) struct Golden {
    pub(crate) dir: PathBuf,
    pub(crate) tokens: Vec<u32>,
    /// `[tokens, vocab]`.
    pub(crate) logits: Vec<f32>,
}

impl Golden {
    pub(crate) fn read(case: &str) -> Self {
        let dir = data("golden/logits").join(case);
        let bytes = fs::read(dir.join("golden.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let words = |name: &str| -> Vec<u32> {
            let data = tensors.tensor(name).unwrap().data().chunks_exact(4);
            data.map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
        };
        let logits = words("logits").into_iter().map(f32::from_bits).collect();
        Self { dir, tokens: words("input_ids"), logits }
    }

    /// The names of all cases.
    pub(crate) fn cases() -> Vec<String> {
        let entries = fs::read_dir(data("golden/logits")).unwrap().map(Result::unwrap);
        let folders = entries.filter(|entry| entry.file_type().unwrap().is_dir());
        let mut cases: Vec<_> = folders.map(|entry| entry.file_name().into_string().unwrap()).collect();
        cases.sort();
        cases
    }
}

/// A copy of a golden checkpoint with another `config.json`.
pub(crate) fn with_config(case: &str, change: impl FnOnce(&mut Value)) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    let dir = data("golden/logits").join(case);
    for entry in fs::read_dir(&dir).unwrap().map(Result::unwrap) {
        fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    let path = copy.path().join("config.json");
    let mut config = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    change(&mut config);
    fs::write(path, config.to_string()).unwrap();
    copy
}

/// A loaded model with everything that a step needs.
pub(crate) struct Runner {
    pub(crate) backend: Box<dyn Backend>,
    pub(crate) model: Box<dyn Model>,
    pub(crate) kv: KvCache,
    step: StepInputs,
    workspace: Workspace,
}

/// The most tokens of a step.
const MAX_TOKENS: usize = 512;

impl Runner {
    pub(crate) fn load(dir: &Path, kv_dtype: KvCacheDtype, kv_blocks: usize) -> Self {
        Self::load_on(Device::Cpu { threads: 2 }, dir, kv_dtype, kv_blocks)
    }

    pub(crate) fn load_on(device: Device, dir: &Path, kv_dtype: KvCacheDtype, kv_blocks: usize) -> Self {
        let backend = kernels::open(device).unwrap_or_else(|error| panic!("{error}"));
        let checkpoint = Checkpoint::open(dir).unwrap_or_else(|error| panic!("{error}"));
        let model = models::load(&*backend, &checkpoint).unwrap_or_else(|error| panic!("{error}"));
        let kv = KvCache::new(&*backend, model.config(), kv_blocks, kv_dtype).unwrap();
        let step = StepInputs::new(&*backend, MAX_TOKENS, 4, kv_blocks).unwrap();
        let workspace = Workspace::new(&*backend, &*model, MAX_TOKENS, 64).unwrap();
        Self { backend, model, kv, step, workspace }
    }

    /// One step; the logits of all its rows, `[rows, vocab]`.
    pub(crate) fn step(&mut self, sequences: &[StepSequence<'_>]) -> Vec<f32> {
        let Self { backend, model, kv, step, workspace } = self;
        step.fill(&**backend, sequences, OutputRows::All);
        model.forward(&**backend, step, kv, workspace);
        let vocab = model.config().vocab_size;
        let mut logits = vec![0.0; step.rows() * vocab];
        let rows: Vec<u32> = (0..step.rows() as u32).collect();
        for (rows, logits) in rows.chunks(64).zip(logits.chunks_mut(64 * vocab)) {
            model.logits(&**backend, rows, workspace);
            backend.read_f32(workspace.logits(), 0, logits);
        }
        logits
    }

    /// One step whose outputs are `rows` alone; their logits, `[rows, vocab]`.
    pub(crate) fn step_for(&mut self, sequences: &[StepSequence<'_>], rows: &[u32]) -> Vec<f32> {
        let Self { backend, model, kv, step, workspace } = self;
        step.fill(&**backend, sequences, OutputRows::Only(rows));
        model.forward(&**backend, step, kv, workspace);
        let places: Vec<u32> = (0..rows.len() as u32).collect();
        let mut logits = vec![0.0; rows.len() * model.config().vocab_size];
        if !rows.is_empty() {
            model.logits(&**backend, &places, workspace);
            backend.read_f32(workspace.logits(), 0, &mut logits);
        }
        logits
    }

    /// The logits of tokens 0, 15 and the last of a sequence, computed in steps of which the second has no outputs.
    pub(crate) fn some_outputs(&mut self, tokens: &[u32], block_table: &[u32]) -> Vec<f32> {
        let mut logits = Vec::new();
        for (part, rows) in
            [(0..17, &[0, 15][..]), (17..33, &[]), (33..tokens.len(), &[tokens.len() as u32 - 34])]
        {
            let first_position = part.start;
            let sequence = StepSequence { tokens: &tokens[part], first_position, block_table };
            logits.extend(self.step_for(&[sequence], rows));
        }
        logits
    }

    /// Rows of the same tokens among the logits of `tokens` tokens.
    pub(crate) fn same_outputs(&self, logits: &[f32], tokens: usize) -> Vec<f32> {
        let vocab = self.model.config().vocab_size;
        [0, 15, tokens - 1].iter().flat_map(|row| &logits[row * vocab..][..vocab]).copied().collect()
    }

    /// One token for each of `sequences`, as a recorded step; the logits of all rows.
    pub(crate) fn replayed_step(&mut self, sequences: &[StepSequence<'_>]) -> Vec<f32> {
        let Self { backend, model, kv, step, workspace } = self;
        let backend = &**backend;
        let rows: Vec<u32> = (0..sequences.len() as u32).collect();
        // Recorded on other inputs than it is replayed with.
        let other = StepSequence { tokens: &[1], first_position: 0, block_table: sequences[0].block_table };
        step.fill(backend, &vec![other; rows.len()], OutputRows::All);
        let graph = backend.capture(&mut || {
            model.forward(backend, step, kv, workspace);
            model.logits(backend, &rows, workspace);
        });
        step.fill(backend, sequences, OutputRows::All);
        backend.replay(&graph);
        let mut logits = vec![0.0; rows.len() * model.config().vocab_size];
        backend.read_f32(workspace.logits(), 0, &mut logits);
        logits
    }

    /// The logits of a whole sequence that is computed in steps of `chunk` tokens, in the blocks of `block_table`.
    pub(crate) fn sequence(&mut self, tokens: &[u32], chunk: usize, block_table: &[u32]) -> Vec<f32> {
        let mut logits = Vec::new();
        for (index, tokens) in tokens.chunks(chunk).enumerate() {
            let first_position = index * chunk;
            logits.extend(self.step(&[StepSequence { tokens, first_position, block_table }]));
        }
        logits
    }
}

/// Blocks `0, 1, ..` for `tokens` tokens.
pub(crate) fn blocks(tokens: usize) -> Vec<u32> {
    (0..tokens.div_ceil(KV_BLOCK_TOKENS) as u32).collect()
}

/// Differences between two sets of logits, in standard deviations of the expected ones.
#[derive(Debug)]
pub(crate) struct Errors {
    /// The largest; NaN if any is.
    pub(crate) max: f32,
    /// Root mean square.
    pub(crate) rms: f32,
}

impl Errors {
    pub(crate) fn between(actual: &[f32], expected: &[f32]) -> Self {
        assert_eq!(actual.len(), expected.len());
        let n = expected.len() as f32;
        let mean = expected.iter().sum::<f32>() / n;
        let deviation = (expected.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / n).sqrt();
        let errors = || actual.iter().zip(expected).map(|(a, e)| (a - e).abs() / deviation);
        let worse = |worst: f32, error: f32| if error > worst || error.is_nan() { error } else { worst };
        Self {
            max: errors().fold(0.0, worse),
            rms: (errors().map(|error| error * error).sum::<f32>() / n).sqrt(),
        }
    }
}

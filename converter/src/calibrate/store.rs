//! What calibration found, a file for each layer, beside the output: a later run of the same command goes on after
//! the last layer that is there.
//!
//! `.OUT.calibration` holds a locked file, `run.json` (what the layers were made with; other settings start over), and
//! `layer-00007.safetensors`, each written under another name and renamed when it is on the disk.

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use kernels::mx::Energy;
use safetensors::tensor::{Metadata, TensorView};
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

use super::CalibrationError;
use super::modules::StoredModule;

const LOCK: &str = ".lock";
const RUN: &str = "run.json";
/// Metadata key of [`LayerRecord`], as JSON.
const RECORD: &str = "mxconvert";

/// A quantized module, as it will be stored.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PackedModule {
    pub(crate) codes: Vec<u8>,
    pub(crate) scales: Vec<u8>,
    pub(crate) energy: Energy,
}

/// A calibrated layer: its quantized modules by name.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct LayerResult {
    pub(crate) modules: BTreeMap<String, PackedModule>,
    pub(crate) stages: Vec<StageRecord>,
}

/// What became of one group of modules.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageRecord {
    /// The modules that were quantized together.
    pub modules: Vec<String>,
    /// The method whose result was kept: `gptq`, `error-diffusion`, or `nearest`.
    pub kept: String,
    /// Error of the outputs on the held-out windows relative to the unquantized ones, in dB: of direct cast.
    pub nearest_db: f64,
    /// Of the method.
    pub method_db: f64,
}

#[derive(Debug, Serialize, Deserialize)]
struct LayerRecord {
    /// Signal and noise by module.
    energies: BTreeMap<String, (f64, f64)>,
    stages: Vec<StageRecord>,
}

/// The folder.
#[derive(Debug)]
pub(crate) struct Store {
    dir: PathBuf,
    _lock: File,
}

impl Store {
    /// Opens the folder that belongs to `output`, and empties it unless it was made by a run with the same `settings`.
    ///
    /// # Errors
    /// Another run is at it.
    pub(crate) fn open(output: &Path, settings: &serde_json::Value) -> Result<Self, CalibrationError> {
        let output = std::path::absolute(output).map_err(CalibrationError::io(output))?;
        let name = output.file_name().unwrap_or_default().to_string_lossy();
        let dir = output.with_file_name(format!(".{name}.calibration"));
        std::fs::create_dir_all(&dir).map_err(CalibrationError::io(&dir))?;
        let path = dir.join(LOCK);
        let lock = File::create(&path).map_err(CalibrationError::io(&path))?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => CalibrationError::Damaged {
                path: dir.clone(),
                reason: "another run is calibrating into it".to_owned(),
            },
            TryLockError::Error(error) => CalibrationError::Io { path, error },
        })?;
        let store = Self { dir, _lock: lock };
        let run = serde_json::to_vec_pretty(settings).expect("plain data serializes");
        if std::fs::read(store.dir.join(RUN)).ok().as_ref() != Some(&run) {
            store.clear()?;
            store.write(RUN, &run)?;
        }
        Ok(store)
    }

    /// Removes all layers.
    fn clear(&self) -> Result<(), CalibrationError> {
        let entries = std::fs::read_dir(&self.dir).map_err(CalibrationError::io(&self.dir))?;
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.file_name().is_some_and(|name| name != LOCK) {
                std::fs::remove_file(&path).map_err(CalibrationError::io(&path))?;
            }
        }
        Ok(())
    }

    /// Layer `index`, if an earlier run finished it.
    pub(crate) fn layer(&self, index: usize) -> Result<Option<LayerResult>, CalibrationError> {
        let path = self.dir.join(file_name(index));
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(CalibrationError::Io { path, error }),
        };
        let damaged = |reason: String| CalibrationError::Damaged { path: path.clone(), reason };
        let tensors = SafeTensors::deserialize(&bytes).map_err(|e| damaged(e.to_string()))?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| damaged(e.to_string()))?;
        let record = record(&header).map_err(&damaged)?;
        let data = |module: &str, part: &str| {
            let tensor = tensors.tensor(&format!("{module}.{part}")).map_err(|e| damaged(e.to_string()))?;
            Ok::<_, CalibrationError>(tensor.data().to_vec())
        };
        let mut result = LayerResult { stages: record.stages, ..LayerResult::default() };
        for (module, (signal, noise)) in record.energies {
            let (codes, scales) = (data(&module, "codes")?, data(&module, "scales")?);
            result.modules.insert(module, PackedModule { codes, scales, energy: Energy { signal, noise } });
        }
        Ok(Some(result))
    }

    /// The file of layer `index`, which is there, and where its modules are in it.
    pub(super) fn locate(
        &self,
        index: usize,
    ) -> Result<(PathBuf, File, BTreeMap<String, StoredModule>), CalibrationError> {
        let path = self.dir.join(file_name(index));
        let bytes = std::fs::read(&path).map_err(CalibrationError::io(&path))?;
        let damaged = |reason: String| CalibrationError::Damaged { path: path.clone(), reason };
        let (header_bytes, header) =
            SafeTensors::read_metadata(&bytes).map_err(|e| damaged(e.to_string()))?;
        let record = record(&header).map_err(&damaged)?;
        // The header's length comes first.
        let start = 8 + header_bytes as u64;
        let offset = |module: &str, part: &str| {
            let info = header.info(&format!("{module}.{part}"));
            info.map(|info| start + info.data_offsets.0 as u64)
                .ok_or_else(|| damaged(format!("lacks {module}")))
        };
        let mut modules = BTreeMap::new();
        for (module, (signal, noise)) in record.energies {
            let (codes, scales) = (offset(&module, "codes")?, offset(&module, "scales")?);
            let energy = Energy { signal, noise };
            modules.insert(module, StoredModule { file: index, codes, scales, energy });
        }
        let file = File::open(&path).map_err(CalibrationError::io(&path))?;
        Ok((path, file, modules))
    }

    /// Makes layer `index` durable.
    pub(crate) fn save(&self, index: usize, layer: &LayerResult) -> Result<(), CalibrationError> {
        let record = LayerRecord {
            energies: layer
                .modules
                .iter()
                .map(|(module, packed)| (module.clone(), (packed.energy.signal, packed.energy.noise)))
                .collect(),
            stages: layer.stages.clone(),
        };
        let record = serde_json::to_string(&record).expect("plain data serializes");
        let views = layer.modules.iter().flat_map(|(module, packed)| {
            [("codes", &packed.codes), ("scales", &packed.scales)].map(|(part, bytes)| {
                let view =
                    TensorView::new(Dtype::U8, vec![bytes.len()], bytes).expect("one byte per element");
                (format!("{module}.{part}"), view)
            })
        });
        let metadata = HashMap::from([(RECORD.to_owned(), record)]);
        let bytes = safetensors::serialize(views, Some(metadata)).expect("names are unique");
        self.write(&file_name(index), &bytes)
    }

    /// Whole or not at all.
    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), CalibrationError> {
        let (path, unfinished) = (self.dir.join(name), self.dir.join(format!("{name}.unfinished")));
        let written = File::create(&unfinished).and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        });
        written.map_err(CalibrationError::io(&unfinished))?;
        std::fs::rename(&unfinished, &path).map_err(CalibrationError::io(&path))?;
        File::open(&self.dir).and_then(|dir| dir.sync_all()).map_err(CalibrationError::io(&self.dir))
    }

    /// Removes the folder: the output is in place.
    pub(crate) fn remove(self) {
        // What cannot be removed, the next run with this output replaces.
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn record(header: &Metadata) -> Result<LayerRecord, String> {
    let record = header.metadata().as_ref().and_then(|metadata| metadata.get(RECORD));
    let record = record.ok_or_else(|| "has no record".to_owned())?;
    serde_json::from_str(record).map_err(|e| e.to_string())
}

fn file_name(index: usize) -> String {
    format!("layer-{index:05}.safetensors")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn result() -> LayerResult {
        let energy = Energy { signal: 2.5, noise: 0.1 };
        let packed = PackedModule { codes: vec![1, 2, 3], scales: vec![127], energy };
        LayerResult {
            modules: BTreeMap::from([("model.layers.0.mlp.down_proj".to_owned(), packed)]),
            stages: vec![StageRecord {
                modules: vec!["model.layers.0.mlp.down_proj".to_owned()],
                kept: "gptq".to_owned(),
                nearest_db: -18.0,
                method_db: -24.5,
            }],
        }
    }

    #[test]
    fn layers_come_back_to_runs_with_the_same_settings_only() {
        let root = tempfile::tempdir().unwrap();
        let output = root.path().join("out");
        let store = Store::open(&output, &json!({"format": "mxfp4"})).unwrap();
        store.save(3, &result()).unwrap();
        assert!(matches!(Store::open(&output, &json!({})), Err(CalibrationError::Damaged { .. })), "locked");
        drop(store);
        let store = Store::open(&output, &json!({"format": "mxfp4"})).unwrap();
        assert_eq!(store.layer(3).unwrap(), Some(result()));
        assert_eq!(store.layer(2).unwrap(), None);
        drop(store);
        let store = Store::open(&output, &json!({"format": "mxfp6"})).unwrap();
        assert_eq!(store.layer(3).unwrap(), None);
        store.remove();
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn damaged_layers_are_refused() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(&root.path().join("out"), &json!({})).unwrap();
        store.save(0, &result()).unwrap();
        let path = root.path().join(".out.calibration/layer-00000.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 2]).unwrap();
        let message = store.layer(0).unwrap_err().to_string();
        assert!(message.contains("layer-00000.safetensors"), "{message}");
    }
}

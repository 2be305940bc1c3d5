//! The calibrated modules, read back piece by piece when the output is written.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use kernels::mx::{Cast, Energy};

use super::CalibrationError;
use super::store::Store;
use crate::quantize::{QuantizeError, Quantizer, Rows};

/// Where a module's bytes are.
#[derive(Debug)]
pub(super) struct StoredModule {
    /// Index of the layer's file.
    pub(super) file: usize,
    /// Offset in the file.
    pub(super) codes: u64,
    pub(super) scales: u64,
    pub(super) energy: Energy,
}

/// All layers of a [`Store`].
#[derive(Debug)]
pub(crate) struct CalibratedModules {
    store: Store,
    files: Vec<(PathBuf, File)>,
    modules: HashMap<String, StoredModule>,
}

impl CalibratedModules {
    /// Opens the files of all `layers`.
    pub(super) fn open(store: Store, layers: usize) -> Result<Self, CalibrationError> {
        let (mut files, mut modules) = (Vec::new(), HashMap::new());
        for index in 0..layers {
            let (path, file, stored) = store.locate(index)?;
            modules.extend(stored.into_iter().map(|(name, module)| (format!("{name}.weight"), module)));
            files.push((path, file));
        }
        Ok(Self { store, files, modules })
    }

    /// Whether a weight was calibrated.
    pub(crate) fn contains(&self, tensor: &str) -> bool {
        self.modules.contains_key(tensor)
    }

    /// The output is in place: removes what was stored.
    pub(crate) fn remove(self) {
        self.store.remove();
    }
}

/// Returns what calibration found; the signal and noise of a whole weight with its first rows.
impl Quantizer for CalibratedModules {
    fn quantize(
        &self,
        cast: Cast,
        rows: Rows<'_>,
        codes: &mut [u8],
        scales: &mut [u8],
    ) -> Result<Energy, QuantizeError> {
        let module = self.modules.get(rows.tensor).expect("the caller asks for calibrated weights only");
        let (path, file) = &self.files[module.file];
        let first_block = rows.first_index / cast.format.block.size() as u64;
        let block_bytes = cast.format.code_bytes(cast.format.block.size()) as u64;
        file.read_exact_at(codes, module.codes + first_block * block_bytes)
            .and_then(|()| file.read_exact_at(scales, module.scales + first_block))
            .map_err(|error| QuantizeError::Io { path: path.clone(), error })?;
        Ok(if rows.first_index == 0 { module.energy } else { Energy::default() })
    }
}

//! What a checkpoint holds: formats, bytes, bits per weight.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use models::checkpoint::{Checkpoint, CheckpointError};
use serde::Serialize;

/// A checkpoint's contents.
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    /// The folder.
    pub path: String,
    /// JSON dialect of `quantization_config`; `None` for a plain checkpoint.
    pub dialect: Option<&'static str>,
    /// The same tensor of every layer, where it has one format.
    pub groups: Vec<Group>,
    /// All tensors.
    pub total: Group,
}

/// Tensors of one kind.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Group {
    /// Name with `*` for the layer: `model.layers.*.mlp.down_proj`.
    pub name: String,
    /// Scheme (`mxfp4:mxfp6_e2m3`) or dtype (`BF16`).
    pub format: String,
    /// Weights; codes and scales count as one.
    pub tensors: usize,
    /// Elements.
    pub elements: u64,
    /// Bytes on disk, scales included.
    pub bytes: u64,
    /// `8 * bytes / elements`.
    pub bits_per_weight: f64,
    /// `2 * elements / bytes`: how much smaller than BF16.
    pub ratio_to_bf16: f64,
}

impl Group {
    fn add(&mut self, elements: u64, bytes: u64) {
        self.tensors += 1;
        self.elements += elements;
        self.bytes += bytes;
        self.bits_per_weight = 8.0 * self.bytes as f64 / self.elements.max(1) as f64;
        self.ratio_to_bf16 = 2.0 * self.elements as f64 / self.bytes.max(1) as f64;
    }
}

/// Reads the headers and `quantization_config` of a checkpoint folder, in any dialect.
///
/// # Errors
/// It cannot be read, or its tensors are not what it declares.
pub fn inspect(dir: &Path) -> Result<Inspection, CheckpointError> {
    let checkpoint = Checkpoint::open(dir)?;
    let mut groups: BTreeMap<(String, String), Group> = BTreeMap::new();
    let mut total = Group { name: "total".to_owned(), ..Group::default() };
    for tensor in checkpoint.tensors() {
        // Norms and biases are inside layers that a default reaches, but no linear modules.
        let module = module_of(&tensor.name).filter(|_| tensor.shape.len() == 2);
        let declared = match module {
            Some(module) => checkpoint.scheme(module)?.map(|scheme| (module, scheme)),
            None => None,
        };
        let (name, format, elements, bytes) = match declared {
            // Counted with its codes.
            Some(_) if tensor.name.ends_with(".weight_scale") => continue,
            Some((module, scheme)) => {
                let linear = checkpoint.mx_info(module, scheme)?;
                let [rows, cols] = linear.shape;
                (module, scheme.to_string(), rows as u64 * cols as u64, linear.bytes)
            }
            None => {
                let elements = tensor.shape.iter().map(|&dim| dim as u64).product();
                let name = tensor.name.strip_suffix(".weight").unwrap_or(&tensor.name);
                (name, tensor.dtype.to_string(), elements, tensor.bytes)
            }
        };
        let key = (every_layer(name), format);
        let (name, format) = key.clone();
        groups.entry(key).or_insert_with(|| Group { name, format, ..Group::default() }).add(elements, bytes);
        total.add(elements, bytes);
    }
    Ok(Inspection {
        path: dir.display().to_string(),
        dialect: checkpoint.quantization().dialect(),
        groups: groups.into_values().collect(),
        total,
    })
}

/// The module of a tensor that may be part of an MX weight.
fn module_of(tensor: &str) -> Option<&str> {
    [".weight", ".weight_packed", ".weight_scale"].iter().find_map(|suffix| tensor.strip_suffix(suffix))
}

/// Replaces the layer number by `*`.
fn every_layer(name: &str) -> String {
    let parts = name.split('.').map(|part| {
        let number = !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        if number { "*" } else { part }
    });
    parts.collect::<Vec<_>>().join(".")
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} ({})", self.path, self.dialect.unwrap_or("not quantized"))?;
        let rows = || self.groups.iter().chain([&self.total]);
        let name = rows().map(|g| g.name.len()).max().unwrap_or(0);
        let format = rows().map(|g| g.format.len()).max().unwrap_or(0).max(6);
        write!(
            f,
            "{:name$} {:format$} {:>8} {:>15} {:>12} {:>8}",
            "", "format", "tensors", "bytes", "bits/weight", "vs BF16"
        )?;
        for g in rows() {
            write!(
                f,
                "\n{:name$} {:format$} {:>8} {:>15} {:>12.2} {:>7.2}x",
                g.name, g.format, g.tensors, g.bytes, g.bits_per_weight, g.ratio_to_bf16
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_become_stars() {
        assert_eq!(every_layer("model.layers.12.mlp.up_proj"), "model.layers.*.mlp.up_proj");
        assert_eq!(every_layer("model.norm"), "model.norm");
    }
}

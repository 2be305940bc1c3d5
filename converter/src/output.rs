//! The output's files, known byte for byte in size before any data is: tensor names, shards, headers, offsets.

use std::collections::HashMap;

use models::checkpoint::quantization::Dialect;
use models::checkpoint::{INDEX_FILE, SINGLE_FILE};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::{Map, Value, json};

use crate::plan::{Action, Plan};
use crate::source::SourceTensor;

/// Where a tensor's bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slot {
    /// Index of the shard.
    pub(crate) shard: usize,
    /// Offset in the shard's file.
    pub(crate) offset: u64,
}

/// Where the result of one planned tensor goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// One tensor.
    Dense(Slot),
    /// Codes and scales.
    Mx { codes: Slot, scales: Slot },
}

/// One safetensors file.
#[derive(Debug)]
pub(crate) struct Shard {
    pub(crate) file_name: String,
    /// Length field and padded JSON.
    pub(crate) header: Vec<u8>,
    /// Whole file.
    pub(crate) bytes: u64,
}

/// Every file that holds weights.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) shards: Vec<Shard>,
    /// By planned tensor.
    pub(crate) targets: Vec<Target>,
    /// Bytes of each planned tensor's result.
    pub(crate) bytes: Vec<u64>,
    /// `model.safetensors.index.json`, when there are several shards.
    pub(crate) index: Option<Value>,
}

/// A tensor of the output.
struct OutputTensor {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Its planned tensor.
    plan: usize,
}

impl OutputTensor {
    fn bytes(&self) -> u64 {
        // Stored dtypes are whole bytes: packed codes are U8.
        self.shape.iter().map(|&dim| dim as u64).product::<u64>() * self.dtype.bitsize() as u64 / 8
    }
}

impl Output {
    /// Lays out the plan's tensors in shards of at most `max_shard_bytes` (a larger tensor has its own).
    pub(crate) fn new(plan: &Plan, sources: &[SourceTensor], layout: Dialect, max_shard_bytes: u64) -> Self {
        let groups: Vec<Vec<OutputTensor>> = (0..plan.tensors.len())
            .map(|index| output_tensors(plan, index, &sources[plan.tensors[index].source], layout))
            .collect();
        let bytes: Vec<u64> =
            groups.iter().map(|group| group.iter().map(OutputTensor::bytes).sum()).collect();

        let mut shards: Vec<Vec<OutputTensor>> = Vec::new();
        let mut filled = 0;
        for (group, bytes) in groups.into_iter().zip(&bytes) {
            if shards.is_empty() || filled + bytes > max_shard_bytes && filled > 0 {
                shards.push(Vec::new());
                filled = 0;
            }
            filled += bytes;
            let last = shards.len() - 1;
            shards[last].extend(group);
        }

        let count = shards.len();
        let mut slots: Vec<Vec<Slot>> = vec![Vec::new(); plan.tensors.len()];
        let mut weight_map = Map::new();
        let mut files = Vec::with_capacity(count);
        for (shard, tensors) in shards.into_iter().enumerate() {
            let file_name = match count {
                1 => SINGLE_FILE.to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", shard + 1),
            };
            weight_map.extend(tensors.iter().map(|t| (t.name.clone(), Value::from(file_name.as_str()))));
            files.push(lay_out(shard, file_name, &tensors, &mut slots));
        }
        let targets = slots
            .into_iter()
            .map(|slots| match slots[..] {
                [codes, scales] => Target::Mx { codes, scales },
                _ => Target::Dense(slots[0]),
            })
            .collect();
        weight_map.sort_keys();
        let total_size: u64 = bytes.iter().sum();
        let index =
            (count > 1).then(|| json!({"metadata": {"total_size": total_size}, "weight_map": weight_map}));
        Self { shards: files, targets, bytes, index }
    }

    /// Bytes of all shards.
    pub(crate) fn total_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.bytes).sum()
    }

    /// Name of the index file, if there is one.
    pub(crate) fn index_file(&self) -> Option<(&'static str, &Value)> {
        self.index.as_ref().map(|index| (INDEX_FILE, index))
    }
}

/// What one planned tensor becomes: codes, then scales, or one dense tensor.
fn output_tensors(plan: &Plan, index: usize, source: &SourceTensor, layout: Dialect) -> Vec<OutputTensor> {
    let planned = &plan.tensors[index];
    let tensor =
        |name: String, dtype: Dtype, shape: Vec<usize>| OutputTensor { name, dtype, shape, plan: index };
    match planned.action {
        Action::Copy => vec![tensor(planned.name.clone(), source.dtype, source.shape.clone())],
        Action::ToBf16 => vec![tensor(planned.name.clone(), Dtype::BF16, source.shape.clone())],
        Action::Quantize(scheme) => {
            let format = scheme.weight.format;
            let (suffix, dtype) = layout.code_tensor(format.element);
            let module = planned.name.trim_end_matches(".weight");
            let (rows, cols) = (source.shape[0], source.shape[1]);
            vec![
                tensor(format!("{module}.{suffix}"), dtype, vec![rows, format.code_bytes(cols)]),
                tensor(format!("{module}.weight_scale"), Dtype::U8, vec![rows, format.scale_bytes(cols)]),
            ]
        }
    }
}

/// Places tensors in one file, wider elements first so that all are aligned, and makes its header.
fn lay_out(shard: usize, file_name: String, tensors: &[OutputTensor], slots: &mut [Vec<Slot>]) -> Shard {
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(tensors[i].dtype.bitsize()));
    let mut offset = 0_u64;
    let mut offsets = vec![0_u64; tensors.len()];
    let mut infos = Vec::with_capacity(tensors.len());
    for &i in &order {
        let tensor = &tensors[i];
        let end = offset + tensor.bytes();
        offsets[i] = offset;
        let info = TensorInfo {
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            data_offsets: (offset as usize, end as usize),
        };
        infos.push((tensor.name.clone(), info));
        offset = end;
    }
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata =
        Metadata::new(Some(format), infos).expect("offsets are contiguous, sizes follow from shapes");
    let mut json = serde_json::to_vec(&metadata).expect("names and numbers serialize");
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    for (tensor, data) in tensors.iter().zip(&offsets) {
        slots[tensor.plan].push(Slot { shard, offset: header.len() as u64 + data });
    }
    Shard { file_name, bytes: header.len() as u64 + offset, header }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Recipe, SourceTraits, plan};

    fn sources() -> Vec<SourceTensor> {
        let mut tensors = vec![SourceTensor {
            name: "model.embed_tokens.weight".to_owned(),
            dtype: Dtype::BF16,
            shape: vec![100, 32],
        }];
        for layer in 0..5 {
            tensors.push(SourceTensor {
                name: format!("model.layers.{layer}.mlp.up_proj.weight"),
                dtype: Dtype::F32,
                shape: vec![33, 32],
            });
            tensors.push(SourceTensor {
                name: format!("model.layers.{layer}.input_layernorm.weight"),
                dtype: Dtype::F32,
                shape: vec![32],
            });
        }
        tensors
    }

    #[test]
    fn shards_cover_every_byte_once() {
        let sources = sources();
        let plan = plan(
            &Recipe::new("mxfp4".parse().unwrap()),
            &sources,
            SourceTraits { tied: true, to_bf16: false },
        )
        .unwrap();
        for (max, expected_shards) in [(u64::MAX, 1), (7000, 2), (1, 11)] {
            let output = Output::new(&plan, &sources, Dialect::Quark, max);
            assert_eq!(output.shards.len(), expected_shards, "{max}");
            assert_eq!(output.index.is_some(), expected_shards > 1);
            let mut ranges: Vec<(usize, u64, u64)> = Vec::new();
            for ((target, planned), &bytes) in output.targets.iter().zip(&plan.tensors).zip(&output.bytes) {
                match *target {
                    Target::Dense(slot) => ranges.push((slot.shard, slot.offset, bytes)),
                    Target::Mx { codes, scales } => {
                        let scale_bytes = 33;
                        assert!(planned.name.contains("up_proj"));
                        ranges.push((codes.shard, codes.offset, bytes - scale_bytes));
                        ranges.push((scales.shard, scales.offset, scale_bytes));
                    }
                }
            }
            ranges.sort_unstable();
            let mut ends: Vec<u64> = output.shards.iter().map(|s| s.header.len() as u64).collect();
            for (shard, offset, bytes) in ranges {
                assert_eq!(ends[shard], offset);
                ends[shard] += bytes;
            }
            assert!(ends.iter().zip(&output.shards).all(|(end, shard)| *end == shard.bytes));
            assert!(output.shards.iter().all(|s| s.header.len() % 8 == 0));
        }
    }
}

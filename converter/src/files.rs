//! The files around the weights: configs, tokenizer, record, index, model card.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use kernels::mx::ElementRounding;
use models::checkpoint::quantization::Dialect;
use models::checkpoint::{ConversionRecord, INDEX_FILE, RECORD_FILE, RecordedRounding, RecordedSource};
use serde::Serialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::convert::Options;
use crate::error::ConvertError;
use crate::layout;
use crate::mix::render_recipe;
use crate::model_card;
use crate::output::Output;
use crate::permute::PermutationReport;
use crate::plan::Plan;
use crate::report::Report;
use crate::source::{Origin, Source};

/// Copied where the source folder has them.
const COMPANIONS: [&str; 10] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
];

/// The formats that were chosen, to edit and to use again.
const RECIPE_FILE: &str = "mx_recipe.json";

/// Other files that come with checkpoints, here or as they are published.
const OTHERS: [&str; 11] = [
    RECIPE_FILE,
    "config.json",
    "README.md",
    RECORD_FILE,
    INDEX_FILE,
    "hf_quant_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    ".gitattributes",
    "LICENSE",
    "LICENSE.txt",
];

/// Whether a file of this name is part of a checkpoint.
pub(crate) fn is_checkpoint_file(name: &str) -> bool {
    name.ends_with(".safetensors") || COMPANIONS.contains(&name) || OTHERS.contains(&name)
}

/// What the record says beside the plan.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Provenance<'a> {
    pub(crate) options: &'a Options,
    pub(crate) layout: Dialect,
    pub(crate) method: &'static str,
    /// Name and digest of each weight file.
    pub(crate) sha256: &'a [(String, String)],
}

/// Writes everything but the shards into `dir`, `config.json` last. Returns what the user should know.
pub(crate) fn write(
    dir: &Path,
    source: &Source,
    plan: &Plan,
    output: &Output,
    provenance: &Provenance<'_>,
    report: &Report,
) -> Result<Vec<String>, ConvertError> {
    let mut notes = Vec::new();
    match source.origin() {
        Origin::Folder { checkpoint, .. } => copy_companions(checkpoint.dir(), dir)?,
        Origin::Gguf(gguf) => {
            write_json(dir, "generation_config.json", &gguf.generation_config())?;
            match gguf.tokenizer() {
                Ok(files) => {
                    write_json(dir, "tokenizer.json", &files.tokenizer)?;
                    write_json(dir, "tokenizer_config.json", &files.config)?;
                    write_json(dir, "special_tokens_map.json", &files.special_tokens)?;
                }
                Err(reason) => notes.push(format!("no tokenizer written: {reason}")),
            }
        }
    }
    if provenance.options.mix.is_some() {
        write_file(dir, RECIPE_FILE, render_recipe(&provenance.options.recipe).as_bytes())?;
    }
    write_json(dir, RECORD_FILE, &record(plan, provenance, report))?;
    write_file(dir, "README.md", model_card::render(report).as_bytes())?;
    if let Some((name, index)) = output.index_file() {
        write_json(dir, name, index)?;
    }
    write_json(dir, "config.json", &config(source.config(), plan, provenance))?;
    Ok(notes)
}

/// The source's config with `quantization_config`.
fn config(source: &Value, plan: &Plan, provenance: &Provenance<'_>) -> Value {
    let mut config = source.clone();
    let declaration = layout::declare(plan, provenance.options.recipe.scheme);
    if let Some(fields) = config.as_object_mut() {
        fields.insert("quantization_config".to_owned(), provenance.layout.write(&declaration));
        if plan.unties_head {
            fields.insert("tie_word_embeddings".to_owned(), false.into());
        }
    }
    config
}

fn record(plan: &Plan, provenance: &Provenance<'_>, report: &Report) -> ConversionRecord {
    let model = &provenance.options.model;
    let model = std::fs::canonicalize(model).unwrap_or_else(|_| model.clone());
    ConversionRecord {
        tool: "mxconvert".to_owned(),
        tool_version: env!("CARGO_PKG_VERSION").to_owned(),
        method: provenance.method.to_owned(),
        element_rounding: match provenance.options.element_rounding {
            ElementRounding::NearestEven => RecordedRounding::Nearest,
            ElementRounding::Stochastic { seed } => RecordedRounding::Stochastic { seed },
        },
        layout: provenance.layout.name().to_owned(),
        source: RecordedSource {
            name: model.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            sha256: provenance.sha256.iter().cloned().collect::<BTreeMap<_, _>>(),
        },
        layers: layout::schemes(plan)
            .into_iter()
            .map(|(module, scheme)| (module.to_owned(), scheme.into()))
            .collect(),
        permuted: report
            .permutation
            .iter()
            .flat_map(PermutationReport::permuted)
            .map(str::to_owned)
            .collect(),
    }
}

fn copy_companions(from: &Path, to: &Path) -> Result<(), ConvertError> {
    for name in COMPANIONS {
        let path = from.join(name);
        if path.is_file() {
            let bytes = std::fs::read(&path).map_err(ConvertError::io(&path))?;
            write_file(to, name, &bytes)?;
        }
    }
    Ok(())
}

fn write_json(dir: &Path, name: &str, value: &impl Serialize) -> Result<(), ConvertError> {
    let mut text = serde_json::to_vec_pretty(value).expect("plain data serializes");
    text.push(b'\n');
    write_file(dir, name, &text)
}

/// Writes a file and waits until it is on the disk.
fn write_file(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), ConvertError> {
    let path = dir.join(name);
    File::create(&path)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        })
        .map_err(ConvertError::io(&path))
}

/// SHA-256 of a file in lower-case hex, as `sha256sum` prints it; gives up early once `stop` is set.
pub(crate) fn sha256(path: &Path, stop: &AtomicBool) -> Result<String, ConvertError> {
    let mut file = File::open(path).map_err(ConvertError::io(path))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    while !stop.load(Ordering::Relaxed) {
        let read = file.read(&mut buffer).map_err(ConvertError::io(path))?;
        if read == 0 {
            break;
        }
        hash.update(&buffer[..read]);
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_as_sha256sum_does() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("abc");
        std::fs::write(&path, "abc").unwrap();
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256(&path, &AtomicBool::new(false)).unwrap(), expected);
    }
}

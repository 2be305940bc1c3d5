//! `mxconvert`: packs a checkpoint into an MX format, or says what one holds.

#![forbid(unsafe_code)]

mod cli;

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use converter::{ConsoleProgress, convert, inspect};

use cli::{Cli, Invocation};

fn main() -> ExitCode {
    let invocation = match Cli::invocation() {
        Ok(invocation) => invocation,
        Err(exit) => return exit,
    };
    match run(&invocation) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // There is nobody to tell when standard error is closed.
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(invocation: &Invocation) -> anyhow::Result<()> {
    match invocation {
        Invocation::Inspect { dir, json } => {
            let inspection = inspect::inspect(dir)?;
            if *json {
                print(&serde_json::to_string_pretty(&inspection)?)
            } else {
                print(&inspection.to_string())
            }
        }
        Invocation::Convert { options, report: report_file } => {
            let label = options.output.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let report = convert(options, &ConsoleProgress::new(label))?;
            if let Some(path) = report_file {
                let json = serde_json::to_vec_pretty(&report)?;
                std::fs::write(path, json).with_context(|| format!("--report {}", path.display()))?;
            }
            print(&report.to_string())
        }
    }
}

fn print(text: &str) -> anyhow::Result<()> {
    match writeln!(std::io::stdout(), "{text}") {
        // The reader has seen enough: `mxconvert inspect DIR | head`.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("standard output"),
    }
}

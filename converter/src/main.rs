//! `mxconvert`: packs a checkpoint into an MX format, says what one holds, or how good it is.

#![forbid(unsafe_code)]

mod cli;

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use converter::{ConsoleProgress, Report, convert, eval, inspect};

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
        Invocation::Eval { options, json } => {
            // There is nobody to tell when standard error is closed.
            let mut tell = |what: &str| drop(writeln!(std::io::stderr(), "{what}"));
            let evaluation = eval::evaluate(options, &mut tell)?;
            if *json {
                print(&serde_json::to_string_pretty(&evaluation)?)
            } else {
                print(&evaluation.to_string())
            }
        }
        Invocation::Convert { options, report: report_file } => {
            let label = options.output.file_name().unwrap_or_default().to_string_lossy().into_owned();
            // Before the work: a report that cannot be written is a mistake on the command line.
            let mut file =
                report_file.as_deref().map(|path| ReportFile::open(path, &options.output)).transpose()?;
            let report = convert(options, &ConsoleProgress::new(label))?;
            print(&report.to_string())?;
            file.as_mut().map_or(Ok(()), |file| file.write(&report))
        }
    }
}

/// `--report FILE`: opened without changing what it holds, overwritten when there is a report.
struct ReportFile<'a> {
    path: &'a Path,
    file: File,
    /// There was none: it goes again if there is no report.
    created: bool,
}

impl<'a> ReportFile<'a> {
    fn open(path: &'a Path, output: &Path) -> anyhow::Result<Self> {
        if std::path::absolute(path)?.starts_with(std::path::absolute(output)?) {
            anyhow::bail!("--report {}: lies in the output, which is not there yet", path.display());
        }
        let created = !path.exists();
        let file = File::options().write(true).create(true).truncate(false).open(path);
        let file = file.with_context(|| format!("--report {}", path.display()))?;
        Ok(Self { path, file, created })
    }

    fn write(&mut self, report: &Report) -> anyhow::Result<()> {
        self.created = false;
        let json = serde_json::to_vec_pretty(report)?;
        // Pipes and devices have no length.
        let is_file = self.file.metadata().is_ok_and(|metadata| metadata.is_file());
        let emptied = if is_file { self.file.set_len(0) } else { Ok(()) };
        let written = emptied.and_then(|()| self.file.write_all(&json));
        written.with_context(|| format!("--report {}", self.path.display()))
    }
}

impl Drop for ReportFile<'_> {
    fn drop(&mut self) {
        if self.created {
            // The error that brought us here matters more.
            let _ = std::fs::remove_file(self.path);
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

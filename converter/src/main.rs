//! `mxconvert`: packs a checkpoint into an MX format, says what one holds, or how good it is.

#![forbid(unsafe_code)]

mod cli;

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use converter::eval::{EvalOptions, Evaluation};
use converter::{ConsoleProgress, Options, Report, convert, eval, inspect, study};

use cli::{Cli, Invocation};

fn main() -> ExitCode {
    let invocation = match Cli::invocation() {
        Ok(invocation) => invocation,
        Err(exit) => return exit,
    };
    match run(&invocation) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tell(&format!("error: {error:#}"));
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
            let evaluation = eval::evaluate(options, &mut tell)?;
            if *json {
                print(&serde_json::to_string_pretty(&evaluation)?)
            } else {
                print(&evaluation.to_string())
            }
        }
        Invocation::Study { options, output } => {
            let json = output.with_extension("json");
            // Before the work: a report that cannot be written is a mistake on the command line.
            let mut files = [ReportFile::open("--output", output)?, ReportFile::open("--output", &json)?];
            let progress = |done: usize, all: usize| {
                if done == all || done.is_multiple_of(10) {
                    tell(&format!("{done} of {all} tensors"));
                }
            };
            let study = study::study(options, &progress)?;
            let [html_file, json_file] = &mut files;
            html_file.write(study.html().as_bytes())?;
            json_file.write(&serde_json::to_vec(&study)?)?;
            print(&format!("{study}\n{}, {}", output.display(), json.display()))
        }
        Invocation::Convert { options, reports, evaluate } => {
            let label = options.output.file_name().unwrap_or_default().to_string_lossy().into_owned();
            // Before the work: a report that cannot be written is a mistake on the command line.
            let files = reports.iter().map(|path| ReportFile::outside(path, &options.output));
            let mut files = files.collect::<anyhow::Result<Vec<_>>>()?;
            let mut report = convert(options, &ConsoleProgress::new(label))?;
            if let Some(text) = evaluate {
                report.evaluation = Some(before_and_after(options, text)?);
            }
            print(&report.to_string())?;
            files.iter_mut().try_for_each(|file| file.write_report(&report))
        }
    }
}

/// Source and output of a conversion on `text`. A GGUF source is not measured.
fn before_and_after(options: &Options, text: &Path) -> anyhow::Result<Evaluation> {
    let source = options.model.is_dir().then(|| options.model.clone());
    let options = EvalOptions {
        baseline: source,
        texts: vec![text.to_owned()],
        threads: options.threads,
        ..EvalOptions::new(vec![options.output.clone()])
    };
    eval::evaluate(&options, &mut tell).with_context(|| format!("--evaluate {}", text.display()))
}

/// To standard error. There is nobody to tell when it is closed.
fn tell(what: &str) {
    let _ = writeln!(std::io::stderr(), "{what}");
}

/// A file for a report: opened without changing what it holds, overwritten when there is a report.
struct ReportFile<'a> {
    /// Where it was asked for.
    flag: &'static str,
    path: &'a Path,
    file: File,
    /// There was none: it goes again if there is no report.
    created: bool,
}

impl<'a> ReportFile<'a> {
    /// `--report FILE` of a conversion to `output`.
    fn outside(path: &'a Path, output: &Path) -> anyhow::Result<Self> {
        if std::path::absolute(path)?.starts_with(std::path::absolute(output)?) {
            anyhow::bail!("--report {}: lies in the output, which is not there yet", path.display());
        }
        Self::open("--report", path)
    }

    fn open(flag: &'static str, path: &'a Path) -> anyhow::Result<Self> {
        let created = !path.exists();
        let file = File::options().write(true).create(true).truncate(false).open(path);
        let file = file.with_context(|| format!("{flag} {}", path.display()))?;
        Ok(Self { flag, path, file, created })
    }

    /// As HTML, if that is the file's extension; else as JSON.
    fn write_report(&mut self, report: &Report) -> anyhow::Result<()> {
        if self.path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("html")) {
            self.write(report.html().as_bytes())
        } else {
            self.write(&serde_json::to_vec_pretty(report)?)
        }
    }

    fn write(&mut self, content: &[u8]) -> anyhow::Result<()> {
        self.created = false;
        // Pipes and devices have no length.
        let is_file = self.file.metadata().is_ok_and(|metadata| metadata.is_file());
        let emptied = if is_file { self.file.set_len(0) } else { Ok(()) };
        let written = emptied.and_then(|()| self.file.write_all(content));
        written.with_context(|| format!("{} {}", self.flag, self.path.display()))
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

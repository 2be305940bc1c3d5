//! `mxserve`: serves a model over HTTP.

#![forbid(unsafe_code)]

use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::Context;
use clap::ArgMatches;
use config::{LogFormat, ServerConfig};
use server::cli::{Cli, Command};
use server::serve::{announce, serve, stop_signal};
use server::{bench, check_config, demo};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let (cli, matches) = Cli::from_process();
    match run(cli, &matches) {
        Ok(code) => code,
        Err(error) => {
            // Nothing can be done when even standard error is closed.
            let _ = writeln!(std::io::stderr(), "error: {}", describe(&error));
            ExitCode::FAILURE
        }
    }
}

/// The error and its sources, on one line. Some errors quote their source in their own words, others only have it:
/// each thing is said once.
fn describe(error: &anyhow::Error) -> String {
    let mut said = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if said.is_empty() {
            said = cause;
        } else if !said.contains(&cause) {
            said = format!("{said}: {cause}");
        }
    }
    said
}

fn run(cli: Cli, matches: &ArgMatches) -> anyhow::Result<ExitCode> {
    match cli.command {
        None => {
            let config = cli.serve.resolve()?;
            init_log(&config)?;
            serve_until_signal(config, |_| String::new())?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Demo(arguments)) => {
            let config = arguments.resolve_over(demo::defaults())?;
            if let Some(model) = &config.model {
                let model = model.display();
                anyhow::bail!("demo brings its own model; to serve {model}: mxserve {model}");
            }
            init_log(&config)?;
            let demo = demo::prepare()?;
            let needs_key = !config.api_key.is_empty() || config.api_key_file.is_some();
            serve_until_signal(demo.configure(config), move |url| demo.hint(url, needs_key))?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::CheckConfig(arguments)) => {
            let matches = matches.subcommand_matches("check-config").unwrap_or(matches);
            let report = check_config::check(arguments, matches)?;
            std::io::stdout().write_all(report.settings.as_bytes()).context("standard output")?;
            // As for errors.
            let _ = std::io::stderr().write_all(report.remarks().as_bytes());
            Ok(if report.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Some(Command::Bench(arguments)) => {
            bench::run(*arguments)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Serves; prints the table and the `hint` for its URL when the model is loaded.
fn serve_until_signal(config: ServerConfig, hint: impl FnOnce(&str) -> String + Send) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let served = runtime.block_on(async {
        let stop = stop_signal().context("cannot listen to signals")?;
        let scheme = if config.tls.is_some() { "https" } else { "http" };
        let ready = move |address: SocketAddr, model: &_| {
            let url = format!("{scheme}://{address}");
            // A closed standard output is no reason not to serve.
            let _ = announce(&url, model, &hint(&url));
        };
        serve(config, stop, ready).await.map_err(anyhow::Error::from)
    });
    // A model that was still being loaded when the signal came is not waited for.
    runtime.shutdown_background();
    served
}

fn init_log(config: &ServerConfig) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(config.log_level.as_str()).context("log_level")?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal());
    let started = match config.log_format {
        LogFormat::Text => log.try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
    started.map_err(|e| anyhow::anyhow!("the log cannot be started: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_thing_is_said_once() {
        let embedding = anyhow::anyhow!("reason").context("file: reason");
        assert_eq!(describe(&embedding), "file: reason");
        let chaining = anyhow::anyhow!("reason").context("file");
        assert_eq!(describe(&chaining), "file: reason");
    }
}

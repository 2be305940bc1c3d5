//! `mxserve`: serves a model over HTTP.

#![forbid(unsafe_code)]

use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::Context;
use config::{LogFormat, ServerConfig};
use server::cli::{Cli, Command};
use server::serve::{announce, serve, stop_signal};
use server::{bench, demo};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    match run(Cli::from_process()) {
        Ok(()) => ExitCode::SUCCESS,
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

fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        None => {
            let config = cli.serve.resolve()?;
            init_log(&config)?;
            serve_until_signal(config, |_| String::new())
        }
        Some(Command::Demo(arguments)) => {
            let config = arguments.resolve_over(demo::defaults())?;
            if let Some(model) = &config.model {
                let model = model.display();
                anyhow::bail!("demo brings its own model; to serve {model}: mxserve {model}");
            }
            init_log(&config)?;
            let demo = demo::prepare()?;
            let needs_key = !config.api_key.is_empty();
            serve_until_signal(demo.configure(config), move |address| demo.hint(address, needs_key))
        }
        Some(Command::CheckConfig(arguments)) => {
            let config = arguments.resolve()?;
            let text =
                toml::to_string(&config.to_settings()).context("the settings cannot be written as TOML")?;
            std::io::stdout().write_all(text.as_bytes()).context("standard output")?;
            if !config.api_key.is_empty() {
                // As for errors.
                let _ =
                    writeln!(std::io::stderr(), "note: {} API keys are not printed", config.api_key.len());
            }
            Ok(())
        }
        Some(Command::Bench(arguments)) => Ok(bench::run(*arguments)?),
    }
}

/// Serves; prints the table and the `hint` for its address when the model is loaded.
fn serve_until_signal(
    config: ServerConfig,
    hint: impl FnOnce(SocketAddr) -> String + Send,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let served = runtime.block_on(async {
        let stop = stop_signal().context("cannot listen to signals")?;
        let ready = move |address, model: &_| {
            // A closed standard output is no reason not to serve.
            let _ = announce(address, model, &hint(address));
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

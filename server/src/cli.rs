//! The command line of `mxserve`.

use std::path::PathBuf;

use clap::builder::Resettable;
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use config::{ConfigError, ServerConfig, Settings};

use crate::bench::BenchArgs;

/// Serves a model in an MX format (or plain BF16) over an OpenAI-style HTTP API.
///
/// Every flag has a key in the --config file and an environment variable MXSERVE_…; a flag wins over the environment,
/// which wins over the file.
#[derive(Debug, Parser)]
#[command(name = "mxserve", version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    /// A subcommand; without one, MODEL is served. A folder with a subcommand's name is `./demo`.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// What to serve, and how.
    #[command(flatten)]
    pub serve: Serve,
}

/// What to serve, and how.
#[derive(Debug, Args)]
pub struct Serve {
    /// Settings, as far as flags and the environment have them.
    #[command(flatten)]
    pub settings: Settings,
    /// A TOML file with settings
    #[arg(long, value_name = "FILE", env = "MXSERVE_CONFIG")]
    pub config: Option<PathBuf>,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Get a small model, convert it to MXFP6 and serve it on 127.0.0.1:8000
    Demo(Serve),
    /// Check the settings and the files that they name, and print the settings with the source of each
    ///
    /// Standard output is a --config file with what would be used, API keys left out; standard error says what is wrong.
    /// Exit code 0: the server would start; 1: it would not; 2: the command line is wrong.
    CheckConfig(Serve),
    /// Measure how fast a model runs: offline as llama-bench does, or a server over HTTP with --url
    Bench(Box<BenchArgs>),
}

/// Kubernetes sets MXSERVE_PORT to such a value in every pod beside a service named `mxserve`.
const SERVICE_LINK: &[u8] = b"tcp://";

impl Cli {
    /// The command line and the environment of this process, also as they were matched; ends the process when they are wrong, or ask for help.
    pub fn from_process() -> (Self, ArgMatches) {
        let link = std::env::var_os("MXSERVE_PORT")
            .is_some_and(|value| value.as_encoded_bytes().starts_with(SERVICE_LINK));
        let command = if link { without_port_variable(Self::command()) } else { Self::command() };
        let matches = command.get_matches();
        (Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit()), matches)
    }
}

fn without_port_variable(command: clap::Command) -> clap::Command {
    let forget = |command: clap::Command| {
        let has_port = command.get_arguments().any(|argument| argument.get_id() == "port");
        if has_port { command.mut_arg("port", |port| port.env(Resettable::Reset)) } else { command }
    };
    forget(command).mut_subcommands(forget)
}

impl Serve {
    /// Merges the file, the environment and the flags.
    ///
    /// # Errors
    /// The file is unusable, or a value is out of range.
    pub fn resolve(self) -> Result<ServerConfig, ConfigError> {
        self.resolve_over(Settings::default())
    }

    /// As [`resolve`](Self::resolve); `defaults` hold where nothing else was said.
    ///
    /// # Errors
    /// As [`resolve`](Self::resolve).
    pub fn resolve_over(self, defaults: Settings) -> Result<ServerConfig, ConfigError> {
        let file = self.config.as_deref().map(Settings::from_file).transpose()?.unwrap_or_default();
        ServerConfig::resolve(file.or(defaults), self.settings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_port_of_a_service_link_is_no_port() {
        without_port_variable(Cli::command()).debug_assert();
    }

    #[test]
    fn a_model_or_a_subcommand() {
        let cli =
            Cli::try_parse_from(["mxserve", "./demo", "--port", "9", "--disable-log-requests"]).unwrap();
        assert!(cli.command.is_none());
        let config = cli.serve.resolve().unwrap();
        assert_eq!((config.model, config.port, config.log_requests), (Some("./demo".into()), 9, false));

        let cli = Cli::try_parse_from(["mxserve", "demo", "--port", "9"]).unwrap();
        let Some(Command::Demo(serve)) = cli.command else { panic!("demo is a subcommand") };
        assert_eq!(serve.resolve().unwrap().port, 9);
    }

    #[test]
    fn wrong_values_are_refused() {
        for arguments in
            [["mxserve", "--port", "70000"], ["mxserve", "--device", "tpu"], ["mxserve", "--prot", "1"]]
        {
            assert!(Cli::try_parse_from(arguments).is_err(), "{arguments:?}");
        }
    }
}

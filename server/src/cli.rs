//! The command line of `mxserve`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use config::{ConfigError, ServerConfig, Settings};

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
    /// Print the settings that would be used, as a --config file, and check them
    CheckConfig(Serve),
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
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
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

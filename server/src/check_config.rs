//! `mxserve check-config`: what the server would do, where each setting comes from, and whether it would start.

use std::fmt::Write;

use clap::ArgMatches;
use config::{ConfigError, DeviceChoice, ServerConfig, Settings, Sources};

use crate::cli::Serve;
use crate::device;
use crate::http::ApiKeys;
use crate::model::Opened;
use crate::net::Tls;
use crate::tokenizer::ChatTemplate;

/// What was found.
#[derive(Debug, Default)]
pub struct Report {
    /// The settings in use, each with its source in a comment: a `--config` file again, API keys left out.
    pub settings: String,
    /// What was left out or not checked, and why.
    pub notes: Vec<String>,
    /// What would keep the server from starting.
    pub problems: Vec<String>,
}

/// Checks the settings and every file that they name. The model's weights are not read; where its folder is not there
/// (settings may be checked on another machine), that is a note.
///
/// # Errors
/// The settings' file is unusable, or a value is out of range: then there is nothing to print.
pub fn check(serve: Serve, matches: &ArgMatches) -> Result<Report, ConfigError> {
    let path = serve.config.as_deref();
    let file = path.map(Settings::from_file).transpose()?.unwrap_or_default();
    let sources = Sources::of(matches, path.map(|path| (path, &file)));
    let config = ServerConfig::resolve(file, serve.settings)?;
    let mut report = Report::default();
    match toml::to_string(&config.to_settings()) {
        Ok(text) => report.settings = with_sources(&text, &sources),
        Err(error) => report.problems.push(format!("the settings cannot be written as TOML: {error}")),
    }
    let keys = ApiKeys::load(&config.api_key, config.api_key_file.as_deref());
    report.found(keys.map(drop));
    report.found(config.tls.clone().map(Tls::load).transpose().map(drop));
    report.found(device::engine_options(&config, device::choose(&config)).map(drop));
    if let DeviceChoice::Cuda { .. } = config.device
        && let Err(error) = device::choose(&config).check()
    {
        report.notes.push(format!("{error}; the settings may be another machine's"));
    }
    if !config.api_key.is_empty() {
        let (count, source) = (config.api_key.len(), sources.get("api_key"));
        report.notes.push(format!("API keys are not printed: {count} of {source}"));
    }
    match config.model.as_deref() {
        Some(folder) if folder.exists() => report.found(Opened::open(&config, folder).map(drop)),
        Some(folder) => {
            report.notes.push(format!("{}: not here, so the model was not checked", folder.display()));
            report.found(template(&config));
        }
        None => {
            report.notes.push("no model was named, so none was checked".to_owned());
            report.found(template(&config));
        }
    }
    Ok(report)
}

impl Report {
    /// Notes and problems, a line each.
    pub fn remarks(&self) -> String {
        let notes = self.notes.iter().map(|note| format!("note: {note}\n"));
        notes.chain(self.problems.iter().map(|problem| format!("error: {problem}\n"))).collect()
    }

    fn found<E: std::fmt::Display>(&mut self, result: Result<(), E>) {
        self.problems.extend(result.err().map(|error| error.to_string()));
    }
}

/// A template that was asked for compiles; whether it suits the model is seen with the model.
fn template(config: &ServerConfig) -> Result<(), String> {
    let Some(file) = config.chat_template.as_deref() else { return Ok(()) };
    let wrong = |error: &dyn std::fmt::Display| format!("--chat-template: {error}");
    let source = std::fs::read_to_string(file).map_err(|e| wrong(&format!("{}: {e}", file.display())))?;
    ChatTemplate::new(&file.display().to_string(), source, Vec::new()).map(drop).map_err(|e| wrong(&e))
}

/// TOML with the sources of its settings in a column of comments; a table's is beside its name.
fn with_sources(text: &str, sources: &Sources) -> String {
    let width = text.lines().map(str::len).max().unwrap_or(0);
    let mut table = false;
    text.lines().fold(String::new(), |mut out, line| {
        let name = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        let key = name.or_else(|| line.split_once(" = ").map(|(key, _)| key).filter(|_| !table));
        table |= name.is_some();
        // Writing to a string does not fail.
        let _ = match key {
            Some(key) => writeln!(out, "{line:width$}  # {}", sources.get(key)),
            None => writeln!(out, "{line}"),
        };
        out
    })
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;
    use crate::cli::{Cli, Command};

    #[test]
    fn what_is_printed_says_the_same_and_whence() {
        let speculative = r#"{"method": "ngram", "num_speculative_tokens": 4}"#;
        let arguments = ["mxserve", "check-config", "--port", "5", "--speculative-config", speculative];
        let Some(Command::CheckConfig(serve)) = Cli::parse_from(arguments).command else {
            panic!("a subcommand")
        };
        let said = serve.settings.clone();
        let matches = Cli::command().get_matches_from(arguments);
        let report = check(serve, matches.subcommand_matches("check-config").unwrap()).unwrap();
        assert_eq!(report.problems, Vec::<String>::new());
        let source = |start: &str| {
            let line = report.settings.lines().find(|line| line.starts_with(start)).unwrap();
            line.split_once("  # ").unwrap().1
        };
        assert_eq!(
            [source("port"), source("[speculative_config]"), source("max_connections")],
            ["--port", "--speculative-config", "default"]
        );
        let again: Settings = toml::from_str(&report.settings).unwrap();
        let resolved = |settings| ServerConfig::resolve(Settings::default(), settings).unwrap();
        assert_eq!(resolved(again), resolved(said));
    }
}

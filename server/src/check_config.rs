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

/// Settings of a line each, with their sources in a column of comments.
fn with_sources(text: &str, sources: &Sources) -> String {
    let width = text.lines().map(str::len).max().unwrap_or(0);
    text.lines().fold(String::new(), |mut out, line| {
        let key = line.split_once(" = ").map_or(line, |(key, _)| key);
        // Writing to a string does not fail.
        let _ = writeln!(out, "{line:width$}  # {}", sources.get(key));
        out
    })
}

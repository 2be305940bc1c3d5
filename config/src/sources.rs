//! Where each setting comes from, for people who wonder why a server does what it does.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use clap::ArgMatches;
use clap::parser::ValueSource;

use crate::settings::Settings;

/// Where a setting's value was said. Later ones win.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Nowhere.
    Default,
    /// In this file.
    File(PathBuf),
    /// In this environment variable.
    Environment(String),
    /// By this flag.
    Flag(String),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Environment(name) | Self::Flag(name) => f.write_str(name),
        }
    }
}

/// Whether the settings have the key.
fn says(settings: &Settings, key: &str) -> bool {
    // API keys are never written.
    (key == "api_key" && settings.api_key.is_some())
        || toml::Table::try_from(settings).is_ok_and(|table| table.contains_key(key))
}

/// The source of every key.
#[derive(Debug, Clone, Default)]
pub struct Sources(BTreeMap<String, Source>);

impl Sources {
    /// Of flags and the environment as `matches` has them, and of the file.
    pub fn of(matches: &ArgMatches, file: Option<(&Path, &Settings)>) -> Self {
        let command = <Settings as clap::Args>::augment_args(clap::Command::new("settings"));
        let keys = command.get_arguments().map(|argument| {
            let key = argument.get_id().as_str();
            let source = match matches.value_source(key) {
                Some(ValueSource::CommandLine) => Source::Flag(match argument.get_long() {
                    Some(long) => format!("--{long}"),
                    None => key.to_uppercase(),
                }),
                Some(ValueSource::EnvVariable) => {
                    Source::Environment(argument.get_env().unwrap_or_default().to_string_lossy().into_owned())
                }
                _ => match file {
                    Some((path, settings)) if says(settings, key) => Source::File(path.to_owned()),
                    _ => Source::Default,
                },
            };
            (key.to_owned(), source)
        });
        Self(keys.collect())
    }

    /// Of one key.
    pub fn get(&self, key: &str) -> &Source {
        self.0.get(key).unwrap_or(&Source::Default)
    }
}

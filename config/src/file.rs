//! The settings' file, and what is wrong with it in words.

use std::path::Path;

use clap::Args;

use crate::error::ConfigError;
use crate::settings::Settings;

/// How alike two keys must be (Jaro's measure, 0 to 1) for one to be taken for a misspelling of the other; clap's.
const SIMILAR: f64 = 0.7;

/// A parser's error on one line: where, which key, what. A text of the file is not shown: it may be a secret.
fn describe(text: &str, error: &toml::de::Error) -> String {
    let message = error.message().trim().replace('\n', ", ");
    let message = unknown_key(&message).unwrap_or(message);
    let shown = match (message.find("string \""), message.rfind("\", expected")) {
        (Some(from), Some(to)) if from < to => format!("{}a string{}", &message[..from], &message[to + 1..]),
        _ => message,
    };
    let Some(span) = error.span() else { return shown };
    let before = text.get(..span.start).unwrap_or(text);
    let line = before.matches('\n').count();
    let key = text.lines().nth(line).and_then(|line| line.split_once('=')).map(|(key, _)| key.trim());
    let is_bare = |key: &&str| key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_') && !key.is_empty();
    match key.filter(is_bare).filter(|key| !shown.contains(*key)) {
        Some(key) => format!("line {}: {key}: {shown}", line + 1),
        None => format!("line {}: {shown}", line + 1),
    }
}

/// Names what was probably meant by a key that does not exist.
fn unknown_key(message: &str) -> Option<String> {
    let (key, _) = message.strip_prefix("unknown field `")?.split_once('`')?;
    let command = Settings::augment_args(clap::Command::new("settings"));
    let similarity = |id: &str| strsim::jaro(key, id);
    let nearest = command
        .get_arguments()
        .map(|argument| argument.get_id().as_str())
        .max_by(|a, b| similarity(a).total_cmp(&similarity(b)))
        .filter(|id| similarity(id) > SIMILAR);
    Some(match nearest {
        Some(id) => format!("unknown key `{key}`; did you mean `{id}`?"),
        None => format!("unknown key `{key}`; `mxserve --help` has them all, with dashes for underscores"),
    })
}

impl Settings {
    /// Reads a TOML file.
    ///
    /// # Errors
    /// The file cannot be read, is not TOML, has a key that is no knob, or a value of the wrong type.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        toml::from_str(&text)
            .map_err(|e| ConfigError::Parse { path: path.to_owned(), message: describe(&text, &e) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_a_file_are_one_line_without_its_texts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("server.toml");
        let cases = [
            ("port = 1\napi_key = \"hush\"\n", "line 2: api_key: "),
            ("api_key = [\"hush\", 5]\n", "line 1: api_key: "),
            ("port = \"hush\"\n", "line 1: port: "),
            ("hosts = \"hush\"\n", "line 1: unknown key `hosts`; did you mean `host`?"),
            ("max_seqs = 1\n", "line 1: unknown key `max_seqs`; did you mean `max_num_seqs`?"),
            ("zzz = 1\n", "line 1: unknown key `zzz`; `mxserve --help`"),
            ("api_key = [\"hush\"\n", "line "),
            ("host = \"hush\"\n", "line 1: host: "),
            ("kv_cache_dtype = \"hush\"\n", "line 1: kv_cache_dtype: expected auto, bf16, "),
        ];
        for (text, start) in cases {
            std::fs::write(&path, text).unwrap();
            let error = Settings::from_file(&path).unwrap_err().to_string();
            let error = error.strip_prefix(&format!("{}: ", path.display())).unwrap();
            assert!(error.starts_with(start), "{error}");
            assert!(!error.contains('\n') && !error.contains("hush"), "{error}");
        }
    }
}

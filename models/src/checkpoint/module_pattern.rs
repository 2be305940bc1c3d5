//! Patterns over module names, as recipes and quantization configs write them.

use std::fmt;
use std::str::FromStr;

use globset::{Glob, GlobMatcher};
use regex::Regex;

/// A glob over module names in which `*` also matches dots (`model.layers.*.mlp.down_proj`), or, after `re:`, a
/// regular expression matched from the start of the name (as Python's `re.match`).
#[derive(Debug, Clone)]
pub struct ModulePattern {
    text: String,
    matcher: Matcher,
}

#[derive(Debug, Clone)]
enum Matcher {
    Glob(GlobMatcher),
    Regex(Regex),
}

/// A pattern that is neither a glob nor a regular expression.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid pattern '{pattern}': {reason}")]
pub struct InvalidPattern {
    /// The pattern.
    pub pattern: String,
    /// What is wrong with it, in one line.
    pub reason: String,
}

impl ModulePattern {
    /// Whether the pattern matches a module's whole name (a regular expression: its start).
    pub fn matches(&self, module: &str) -> bool {
        match &self.matcher {
            Matcher::Glob(glob) => glob.is_match(module),
            Matcher::Regex(regex) => regex.is_match(module),
        }
    }

    /// The pattern as written.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl FromStr for ModulePattern {
    type Err = InvalidPattern;

    fn from_str(text: &str) -> Result<Self, InvalidPattern> {
        // A regex error draws a picture over several lines; its last line says what is wrong.
        let invalid = |reason: String| InvalidPattern {
            pattern: text.to_owned(),
            reason: reason.lines().last().unwrap_or_default().trim().to_owned(),
        };
        let matcher = match text.strip_prefix("re:") {
            Some(regex) => {
                Matcher::Regex(Regex::new(&format!("^(?:{regex})")).map_err(|e| invalid(e.to_string()))?)
            }
            None => {
                Matcher::Glob(Glob::new(text).map_err(|e| invalid(e.kind().to_string()))?.compile_matcher())
            }
        };
        Ok(Self { text: text.to_owned(), matcher })
    }
}

impl fmt::Display for ModulePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_names() {
        let check = |pattern: &str, name: &str| pattern.parse::<ModulePattern>().unwrap().matches(name);
        assert!(check("lm_head", "lm_head"));
        assert!(!check("lm_head", "model.lm_head"));
        assert!(check("*down_proj", "model.layers.3.mlp.down_proj"));
        assert!(check("model.layers.*.mlp.*", "model.layers.3.mlp.up_proj"));
        assert!(!check("model.layers.*.mlp", "model.layers.3.mlp.up_proj"));
        assert!(check("model.layers.{0,2}.*", "model.layers.2.mlp.up_proj"));
        assert!(check("re:model.layers.[0-1]\\.", "model.layers.1.mlp.up_proj"));
        assert!(check("re:.*up_proj$", "model.layers.1.mlp.up_proj"));
        assert!(!check("re:layers", "model.layers.1.mlp.up_proj"), "matched from the start");
        assert!(check("re:a|b", "b"));
    }

    #[test]
    fn refuses_invalid_patterns_in_one_line() {
        for pattern in ["re:(", "a[", "re:(?=x)"] {
            let error = pattern.parse::<ModulePattern>().unwrap_err().to_string();
            assert!(error.contains(pattern), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }
}

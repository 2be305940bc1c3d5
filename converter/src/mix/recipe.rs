//! A recipe as a file: which module gets which format, to edit and to use again.

use std::fmt;
use std::path::{Path, PathBuf};

use kernels::mx::{Rotation, Scheme};
use models::checkpoint::ModulePattern;
use serde::de::{Error as _, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::plan::Recipe;

/// A recipe file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// It cannot be read.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// It is no recipe.
    #[error("{}: {error}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column.
        error: serde_json::Error,
    },
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct File {
    format: Text<Scheme>,
    #[serde(default)]
    layers: Layers,
    #[serde(default)]
    exclude: Vec<Text<ModulePattern>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rotate: Option<Text<Rotation>>,
}

/// A string that stands for a value: what is wrong with it has a line and a column.
#[derive(Debug)]
struct Text<T>(T);

impl<'de, T: std::str::FromStr<Err: fmt::Display>> Deserialize<'de> for Text<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map(Self).map_err(D::Error::custom)
    }
}

impl<T: fmt::Display> Serialize for Text<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

/// An object of patterns and formats, in order: the last match wins.
#[derive(Debug, Default)]
struct Layers(Vec<(ModulePattern, Scheme)>);

impl<'de> Deserialize<'de> for Layers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Self::default())
    }
}

impl<'de> Visitor<'de> for Layers {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of module patterns and formats")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Self, A::Error> {
        while let Some(Text(pattern)) = map.next_key::<Text<ModulePattern>>()? {
            let format: String = map.next_value()?;
            let scheme = format.parse().map_err(|e| A::Error::custom(format!("layers: '{pattern}': {e}")))?;
            if self.0.iter().any(|(other, _)| other.as_str() == pattern.as_str()) {
                return Err(A::Error::custom(format!("layers: '{pattern}' is there twice")));
            }
            self.0.push((pattern, scheme));
        }
        Ok(self)
    }
}

impl Serialize for Layers {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (index, (pattern, scheme)) in self.0.iter().enumerate() {
            // Of equal patterns the last wins, which is where it is written.
            let again = self.0[index + 1..].iter().any(|(other, _)| other.as_str() == pattern.as_str());
            if !again {
                map.serialize_entry(pattern.as_str(), &Text(scheme))?;
            }
        }
        map.end()
    }
}

/// Reads a recipe in JSON: `format`, an object `layers` of patterns and formats of which the last match wins, a list
/// `exclude` of patterns, and `rotate`, all as the flags of these names take them. Scale rules are not part of it.
///
/// # Errors
/// The file cannot be read, or has something else in it.
pub fn read_recipe(path: &Path) -> Result<Recipe, RecipeError> {
    let text =
        std::fs::read_to_string(path).map_err(|error| RecipeError::Io { path: path.to_owned(), error })?;
    let recipe = parse(&text).map_err(|error| RecipeError::Invalid { path: path.to_owned(), error })?;
    Ok(Recipe { file: Some(path.to_owned()), ..recipe })
}

fn parse(text: &str) -> Result<Recipe, serde_json::Error> {
    let file: File = serde_json::from_str(text)?;
    let exclude = file.exclude.into_iter().map(|Text(pattern)| pattern).collect();
    let rotation = file.rotate.map(|Text(rotation)| rotation);
    Ok(Recipe { layers: file.layers.0, exclude, rotation, ..Recipe::new(file.format.0) })
}

/// The file that [`read_recipe`] reads.
pub fn render_recipe(recipe: &Recipe) -> String {
    let file = File {
        format: Text(recipe.scheme),
        layers: Layers(recipe.layers.clone()),
        exclude: recipe.exclude.iter().cloned().map(Text).collect(),
        rotate: recipe.rotation.map(Text),
    };
    let mut text = serde_json::to_string_pretty(&file).expect("plain data serializes");
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layers(recipe: &Recipe) -> Vec<(&str, String)> {
        recipe.layers.iter().map(|(pattern, scheme)| (pattern.as_str(), scheme.to_string())).collect()
    }

    #[test]
    fn files_say_what_recipes_do() {
        let text = r#"{"format": "w4a6", "exclude": ["re:.*\\.1\\..*"],
            "layers": {"lm_head": "mxfp6", "*.down_proj": "mxfp8"}, "rotate": "block-hadamard"}"#;
        let recipe = parse(text).unwrap();
        assert_eq!(recipe.scheme.to_string(), "mxfp4:mxfp6_e2m3");
        let again = parse(&render_recipe(&recipe)).unwrap();
        for recipe in [&recipe, &again] {
            let expected = [("lm_head", "mxfp6_e2m3".to_owned()), ("*.down_proj", "mxfp8_e4m3".to_owned())];
            assert_eq!(layers(recipe), expected);
            assert_eq!(recipe.exclude[0].as_str(), "re:.*\\.1\\..*");
            assert_eq!(recipe.rotation, Some(Rotation::BlockHadamard));
        }
        assert_eq!(render_recipe(&recipe), render_recipe(&again));
    }

    #[test]
    fn of_equal_patterns_the_last_is_written() {
        let mut recipe = parse(r#"{"format": "mxfp4", "layers": {"a": "mxfp6", "b*": "mxfp8"}}"#).unwrap();
        recipe.layers.push(("a".parse().unwrap(), "mxint8".parse().unwrap()));
        let again = parse(&render_recipe(&recipe)).unwrap();
        assert_eq!(layers(&again), [("b*", "mxfp8_e4m3".to_owned()), ("a", "mxint8".to_owned())]);
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        for (text, part) in [
            ("{}", "`format`"),
            (r#"{"format": "mxfp5"}"#, "mxfp5"),
            (r#"{"format": "mxfp4", "layer": 1}"#, "`layer`"),
            (r#"{"format": "mxfp4", "layers": {"lm_head": "mxfp5"}}"#, "'lm_head': "),
            (r#"{"format": "mxfp4", "layers": {"lm_head": 4}}"#, "integer `4`"),
            (r#"{"format": "mxfp4", "layers": {"a": "mxfp4", "a": "mxfp6"}}"#, "'a' is there twice"),
            (r#"{"format": "mxfp4", "exclude": ["re:("]}"#, "re:("),
            (r#"{"format": "mxfp4", "rotate": "givens"}"#, "givens"),
            (r#"{"format": "mxfp4", "layers": ["a"]}"#, "an object of module patterns"),
        ] {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.contains(part) && message.contains("line 1 column"), "{message}");
            assert!(!message.contains('\n'), "{message}");
        }
    }
}

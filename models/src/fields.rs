//! Typed access to the fields of a JSON configuration; a null counts as absent, as in Hugging Face's classes.

use serde_json::{Map, Value};

use crate::ConfigError;

/// Larger sizes are mistakes; below it, products of three sizes fit a `usize`.
const LARGEST_SIZE: u64 = 1 << 21;

/// The fields of one JSON object in `file`.
#[derive(Debug, Clone)]
pub(crate) struct Fields<'a> {
    file: &'static str,
    /// Dotted path of the object, with a trailing dot; empty for the whole file.
    path: String,
    object: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The top level of `file`.
    pub(crate) fn new(file: &'static str, value: &'a Value) -> Result<Self, ConfigError> {
        match value {
            Value::Object(object) => Ok(Self { file, path: String::new(), object }),
            other => Err(ConfigError::Invalid {
                file,
                field: "the top level".to_owned(),
                value: other.to_string(),
                expected: "an object".to_owned(),
            }),
        }
    }

    /// The value of `field`, unless absent or null.
    pub(crate) fn value(&self, field: &str) -> Option<&'a Value> {
        self.object.get(field).filter(|value| !value.is_null())
    }

    /// Whether `field` is there, even if null.
    pub(crate) fn mentions(&self, field: &str) -> bool {
        self.object.contains_key(field)
    }

    /// Names and values of all fields.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&'a String, &'a Value)> {
        self.object.iter()
    }

    /// The object at `field`.
    pub(crate) fn object(&self, field: &str) -> Result<Option<Self>, ConfigError> {
        self.typed(field, "an object", |value| {
            let path = format!("{}{field}.", self.path);
            value.as_object().map(|object| Self { file: self.file, path, object })
        })
    }

    /// A number of things, possibly 0.
    pub(crate) fn count(&self, field: &str) -> Result<Option<usize>, ConfigError> {
        self.typed(field, "an integer from 0 to 2097152", |value| {
            value.as_u64().filter(|&n| n <= LARGEST_SIZE).map(|n| n as usize)
        })
    }

    /// A size of at least 1.
    pub(crate) fn size(&self, field: &str) -> Result<Option<usize>, ConfigError> {
        self.typed(field, "an integer from 1 to 2097152", |value| {
            value.as_u64().filter(|n| (1..=LARGEST_SIZE).contains(n)).map(|n| n as usize)
        })
    }

    /// A finite number above 0.
    pub(crate) fn positive(&self, field: &str) -> Result<Option<f64>, ConfigError> {
        self.typed(field, "a number above 0", |value| value.as_f64().filter(|&x| x > 0.0))
    }

    /// A finite number of at least 0.
    pub(crate) fn non_negative(&self, field: &str) -> Result<Option<f64>, ConfigError> {
        self.typed(field, "a number of at least 0", |value| value.as_f64().filter(|&x| x >= 0.0))
    }

    /// True or false; `default` when absent.
    pub(crate) fn flag(&self, field: &str, default: bool) -> Result<bool, ConfigError> {
        Ok(self.typed(field, "true or false", Value::as_bool)?.unwrap_or(default))
    }

    /// A string.
    pub(crate) fn text(&self, field: &str) -> Result<Option<&'a str>, ConfigError> {
        self.typed(field, "a string", Value::as_str)
    }

    /// A list of strings.
    pub(crate) fn texts(&self, field: &str) -> Result<Option<Vec<&'a str>>, ConfigError> {
        self.typed(field, "a list of strings", |value| value.as_array()?.iter().map(Value::as_str).collect())
    }

    /// One token id or a list of them; empty when absent.
    pub(crate) fn token_ids(&self, field: &str) -> Result<Vec<u32>, ConfigError> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = self.typed(field, "a token id or a list of token ids", |value| match value {
            Value::Array(ids) => ids.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        })?;
        Ok(ids.unwrap_or_default())
    }

    /// `value`, or an error that `field` is missing.
    pub(crate) fn require<T>(&self, field: &str, value: Option<T>) -> Result<T, ConfigError> {
        value.ok_or_else(|| ConfigError::Missing { file: self.file, field: self.dotted(field) })
    }

    /// The error that `field` is not `expected`.
    pub(crate) fn invalid(&self, field: &str, expected: impl Into<String>) -> ConfigError {
        let (file, field, value) = self.located(field);
        ConfigError::Invalid { file, field, value, expected: expected.into() }
    }

    /// The error that what `field` asks for is not implemented, while `supported` is.
    pub(crate) fn unsupported(&self, field: &str, supported: impl Into<String>) -> ConfigError {
        let (file, field, value) = self.located(field);
        ConfigError::Unsupported { file, field, value, supported: supported.into() }
    }

    fn typed<T>(
        &self,
        field: &str,
        expected: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        match self.value(field) {
            None => Ok(None),
            Some(value) => match convert(value) {
                Some(converted) => Ok(Some(converted)),
                None => Err(self.invalid(field, expected)),
            },
        }
    }

    fn dotted(&self, field: &str) -> String {
        format!("{}{field}", self.path)
    }

    fn located(&self, field: &str) -> (&'static str, String, String) {
        let value = self.object.get(field).map_or_else(|| "absent".to_owned(), Value::to_string);
        (self.file, self.dotted(field), value)
    }
}

//! Integers as clients write them: `3`, and `3.0` from languages that have one type of number.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserializer, Error, Unexpected, Visitor};

/// Reads an integer or `null`; for `#[serde(deserialize_with)]`.
pub(super) fn optional<'de, T, D>(deserializer: D) -> Result<Option<T>, D::Error>
where
    T: TryFrom<i128>,
    D: Deserializer<'de>,
{
    deserializer.deserialize_any(Integer(PhantomData))
}

struct Integer<T>(PhantomData<T>);

impl<T: TryFrom<i128>> Integer<T> {
    fn of<E: Error>(&self, value: i128, shown: Unexpected<'_>) -> Result<Option<T>, E> {
        T::try_from(value).map(Some).map_err(|_| E::invalid_value(shown, self))
    }
}

impl<T: TryFrom<i128>> Visitor<'_> for Integer<T> {
    type Value = Option<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if T::try_from(-1).is_ok() { "an integer" } else { "an integer of at least 0" })
    }

    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Self::Value, E> {
        self.of(value.into(), Unexpected::Unsigned(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Self::Value, E> {
        self.of(value.into(), Unexpected::Signed(value))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Self::Value, E> {
        // Beyond 2^53 a float is no certain integer.
        if value.fract() == 0.0 && value.abs() <= 9_007_199_254_740_992.0 {
            self.of(value as i128, Unexpected::Float(value))
        } else {
            Err(E::invalid_value(Unexpected::Float(value), &self))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    #[test]
    fn whole_floats_are_integers() {
        let read = |value: Value| super::optional::<usize, _>(value);
        assert_eq!(read(json!(3)).unwrap(), Some(3));
        assert_eq!(read(json!(3.0)).unwrap(), Some(3));
        assert_eq!(read(json!(null)).unwrap(), None);
        for bad in [json!(3.5), json!(-1), json!(-1.0), json!("3"), json!(true), json!(1e300)] {
            assert!(read(bad.clone()).is_err(), "{bad}");
        }
        assert_eq!(super::optional::<i64, _>(json!(-1.0)).unwrap(), Some(-1));
        let error = read(json!("3")).unwrap_err().to_string();
        assert!(error.contains("an integer of at least 0"), "{error}");
    }
}

//! Parts that dialects share: element names, scale rules, helpers over JSON.

use kernels::mx::{Block, Cast, ElementType, MxFormat, ScaleRounding};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::Refusal;

/// Name of an element type in Quark's and our JSON: that of its MX format without `mx`, as in `fp6_e2m3`.
pub(super) fn element_name(element: ElementType) -> &'static str {
    let name = element.spec().name;
    name.strip_prefix("mx").unwrap_or(name)
}

/// Reverse of [`element_name`].
pub(super) fn element(name: &str) -> Option<ElementType> {
    ElementType::ALL.into_iter().find(|e| element_name(*e) == name)
}

/// A cast to `element` in blocks of `group_size`, with the format's default scale rule unless one is named.
pub(super) fn cast(element: ElementType, block: Block, rounding: Option<ScaleRounding>) -> Cast {
    Cast {
        format: MxFormat { element, block },
        scale_rounding: rounding.unwrap_or(element.default_scale_rounding()),
    }
}

/// Deserializes `value`, the field `at` (empty: the declaration itself). The innermost field that is not as it should
/// be is blamed, with serde's words as the reason.
pub(super) fn parse<T: DeserializeOwned>(at: &str, value: &Value) -> Result<T, Refusal> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        // Where serde knows no path, it says a dot.
        let inner = if path == "." { "" } else { path.as_str() };
        Refusal::new(inner, error.inner().to_string()).within(at)
    })
}

/// Refuses a field that declares something: anything but absent, null, false, empty.
pub(super) fn refuse_unless_empty(field: &str, value: Option<&Value>, what: &str) -> Result<(), Refusal> {
    let empty = match value {
        None | Some(Value::Null | Value::Bool(false)) => true,
        Some(Value::Array(a)) => a.is_empty(),
        Some(Value::Object(o)) => o.is_empty(),
        Some(Value::String(s)) => s.is_empty(),
        Some(Value::Bool(true) | Value::Number(_)) => false,
    };
    if empty { Ok(()) } else { Err(Refusal::new(field, format!("{what} is not supported"))) }
}

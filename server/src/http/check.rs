//! Checks of fields, with errors that say what a field must be.

use super::error::ApiError;

/// The most alternatives that log-probabilities may be asked for.
const MAX_LOGPROBS: usize = 20;

/// A number of alternatives.
pub(super) fn logprobs(field: &'static str, k: i64) -> Result<usize, ApiError> {
    let k = usize::try_from(k).ok().filter(|&k| k <= MAX_LOGPROBS);
    k.ok_or_else(|| out_of_range(field, &format!("from 0 to {MAX_LOGPROBS}")))
}

/// Token ids that a client sent.
pub(super) fn require_in_vocabulary(
    field: &'static str,
    ids: &[u32],
    vocab_size: usize,
) -> Result<(), ApiError> {
    match ids.iter().find(|&&id| id as usize >= vocab_size) {
        Some(id) => {
            let message = format!("{field}: {id} is no token id of this model (0 to {})", vocab_size - 1);
            Err(ApiError::field(field, message))
        }
        None => Ok(()),
    }
}

/// Refuses `field` unless `ok`, saying what it must be.
pub(super) fn require(field: &'static str, ok: bool, expected: &str) -> Result<(), ApiError> {
    if ok { Ok(()) } else { Err(out_of_range(field, expected)) }
}

/// The error of a field that must be something else.
pub(super) fn out_of_range(field: &'static str, expected: &str) -> ApiError {
    ApiError::field(field, format!("{field} must be {expected}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_says_what_is_expected() {
        let error = require("n", false, "at least 1").unwrap_err();
        assert_eq!(error, ApiError::field("n", "n must be at least 1"));
        require("n", true, "").unwrap();
    }

    #[test]
    fn alternatives_and_token_ids() {
        assert_eq!(logprobs("logprobs", 20), Ok(20));
        assert!(logprobs("logprobs", 21).is_err() && logprobs("logprobs", -1).is_err());
        require_in_vocabulary("tokens", &[0, 9], 10).unwrap();
        let error = require_in_vocabulary("tokens", &[0, 10], 10).unwrap_err();
        assert_eq!(error.to_string(), "tokens: 10 is no token id of this model (0 to 9)");
    }
}

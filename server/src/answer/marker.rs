//! A marker in a text that arrives in pieces.

/// Where a marker may be in a text.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// It begins at this byte.
    At(usize),
    /// It is not there, but may begin at this byte, which may be the end.
    Maybe(usize),
}

/// Looks for `marker` in `text`, of which more may follow.
pub(super) fn find(text: &str, marker: &str) -> Found {
    if let Some(at) = text.find(marker) {
        return Found::At(at);
    }
    let longest = (marker.len() - 1).min(text.len());
    let begins = |len: &usize| {
        let at = text.len() - len;
        text.is_char_boundary(at) && marker.starts_with(&text[at..])
    };
    let held = (1..=longest).rev().find(begins).unwrap_or(0);
    Found::Maybe(text.len() - held)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_and_their_beginnings() {
        assert_eq!(find("a<b>c", "<b>"), Found::At(1));
        assert_eq!(find("a<b", "<b>"), Found::Maybe(1));
        assert_eq!(find("a<c", "<b>"), Found::Maybe(3));
        assert_eq!(find("é<", "<b>"), Found::Maybe(2));
        assert_eq!(find("", "<b>"), Found::Maybe(0));
    }
}

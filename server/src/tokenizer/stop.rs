//! Stop strings in a text that arrives in pieces.

/// A stop string was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopHit {
    /// Index of the stop string in the request.
    pub index: usize,
}

/// Finds stop strings across the borders of pieces. Text that could be the beginning of a stop string is held back
/// until it is certain that it is not.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<String>,
    include: bool,
    /// Text that was pushed and not handed out.
    held: String,
}

impl StopMatcher {
    /// A matcher for `stops` (none empty). The stop string itself belongs to the text with `include`.
    pub fn new(stops: Vec<String>, include: bool) -> Self {
        Self { stops, include, held: String::new() }
    }

    /// Whether there is anything to look for.
    pub fn is_empty(&self) -> bool {
        self.stops.is_empty()
    }

    /// The stop string of a hit.
    pub fn stop(&self, hit: &StopHit) -> &str {
        &self.stops[hit.index]
    }

    /// Adds text; returns what may be shown, and the stop string that ends it, if any. The one that is complete
    /// first wins; of those complete at the same place the longest.
    pub fn push(&mut self, piece: &str) -> (String, Option<StopHit>) {
        if self.stops.is_empty() {
            return (piece.to_owned(), None);
        }
        self.held.push_str(piece);
        if let Some((index, end)) = self.find() {
            let cut = if self.include { end } else { end - self.stops[index].len() };
            let mut shown = std::mem::take(&mut self.held);
            shown.truncate(cut);
            return (shown, Some(StopHit { index }));
        }
        let keep = self.possible_beginning();
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), None)
    }

    /// Adds text in which stop strings do not count (before `min_tokens`); all of it may be shown.
    pub fn pass(&mut self, piece: &str) -> String {
        let mut shown = std::mem::take(&mut self.held);
        shown.push_str(piece);
        shown
    }

    /// What was held back, when no more text follows.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Index and end of the stop string that ends first.
    fn find(&self) -> Option<(usize, usize)> {
        self.stops
            .iter()
            .enumerate()
            .filter_map(|(index, stop)| Some((index, self.held.find(stop.as_str())? + stop.len())))
            .min_by_key(|&(index, end)| (end, std::cmp::Reverse(self.stops[index].len())))
    }

    /// Bytes at the end of the held text that begin some stop string.
    fn possible_beginning(&self) -> usize {
        let held = self.held.as_bytes();
        let longest = self.stops.iter().map(|stop| stop.len() - 1).max().unwrap_or(0).min(held.len());
        let begins = |len: &usize| {
            let tail = &held[held.len() - len..];
            self.stops.iter().any(|stop| stop.as_bytes().starts_with(tail))
        };
        // A stop string begins with a whole character, and so does any tail that equals its beginning.
        (1..=longest).rev().find(begins).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[&str], include: bool, pieces: &[&str]) -> (String, Option<usize>) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| (*s).to_owned()).collect(), include);
        let mut shown = String::new();
        for piece in pieces {
            let (text, hit) = matcher.push(piece);
            shown.push_str(&text);
            if let Some(hit) = hit {
                return (shown, Some(hit.index));
            }
        }
        shown.push_str(&matcher.finish());
        (shown, None)
    }

    #[test]
    fn across_pieces() {
        assert_eq!(run(&["END"], false, &["a E", "N", "D b"]), ("a ".into(), Some(0)));
        assert_eq!(run(&["END"], true, &["a E", "N", "D b"]), ("a END".into(), Some(0)));
        assert_eq!(run(&["END"], false, &["a E", "N", "E"]), ("a ENE".into(), None));
        assert_eq!(run(&["END"], false, &["a EN"]), ("a EN".into(), None));
    }

    #[test]
    fn the_first_to_be_complete_wins() {
        assert_eq!(run(&["bcd", "c"], false, &["abcd"]), ("ab".into(), Some(1)));
        assert_eq!(run(&["d", "bcd"], false, &["abcd"]), ("a".into(), Some(1)));
        assert_eq!(run(&["aab"], false, &["a", "a", "a", "b"]), ("a".into(), Some(0)));
    }

    #[test]
    fn only_a_possible_beginning_is_held() {
        let mut matcher = StopMatcher::new(vec!["\n\n".into(), "日本".into()], false);
        assert_eq!(matcher.push("one\n"), ("one".into(), None));
        assert_eq!(matcher.push("two日"), ("\ntwo".into(), None));
        assert_eq!(matcher.push("曜"), ("日曜".into(), None));
        assert_eq!(matcher.push("é"), ("é".into(), None));
    }

    #[test]
    fn text_that_does_not_count_is_passed() {
        let mut matcher = StopMatcher::new(vec!["xx".into()], false);
        assert_eq!(matcher.pass("axx"), "axx");
        assert_eq!(matcher.push("bx"), ("b".into(), None));
        assert_eq!(matcher.pass("x"), "xx");
    }

    proptest! {
        /// The result does not depend on how the text is cut into pieces.
        #[test]
        fn pieces_do_not_matter(text in "[ab]{0,24}", stop in "[ab]{1,5}", cuts in prop::collection::vec(0usize..24, 0..8)) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(text.len())).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&str> = cuts.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            let expected = match text.find(&stop) {
                Some(at) => (text[..at].to_owned(), Some(0)),
                None => (text.clone(), None),
            };
            prop_assert_eq!(run(&[&stop], false, &pieces), expected);
        }
    }
}

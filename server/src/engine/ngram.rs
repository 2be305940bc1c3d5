//! Drafts by prompt lookup: where the last tokens occurred before, what followed them there is likely to follow again.
//! As vLLM's method `ngram`; Saxena, "Prompt Lookup Decoding" (2023).

/// How drafts are looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NgramLookup {
    /// Most tokens of a draft.
    pub num_speculative_tokens: usize,
    /// Most tokens that must have occurred before: longer matches are preferred up to here.
    pub max: usize,
    /// Least tokens that must have occurred before; at least 1.
    pub min: usize,
}

/// Up to `at_most` tokens that may follow `tokens`: what followed the longest n-gram that ends them, where it occurred
/// last with as much behind it. Empty where it has not occurred before.
pub(super) fn draft(tokens: &[u32], lookup: NgramLookup, at_most: usize) -> &[u32] {
    let wanted = lookup.num_speculative_tokens.min(at_most);
    let Some((last, before)) = tokens.split_last().filter(|_| wanted > 0) else { return &[] };
    // Length of the match, tokens that follow it, and where those begin.
    let mut best = (0, 0, 0);
    for (at, _) in before.iter().enumerate().rev().filter(|(_, token)| *token == last) {
        let start = at + 1;
        let earlier = tokens[..start].iter().rev();
        let length = earlier.zip(tokens.iter().rev()).take(lookup.max).take_while(|(a, b)| a == b).count();
        let following = (tokens.len() - start).min(wanted);
        if length >= lookup.min && (length, following) > (best.0, best.1) {
            best = (length, following, start);
            if (length, following) == (lookup.max, wanted) {
                break;
            }
        }
    }
    let (_, following, start) = best;
    &tokens[start..start + following]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_before_is_drafted() {
        const LOOKUP: NgramLookup = NgramLookup { num_speculative_tokens: 3, max: 3, min: 2 };
        // (tokens, at most, draft)
        let cases: [(&[u32], usize, &[u32]); 12] = [
            (&[], 9, &[]),
            (&[1], 9, &[]),
            (&[1, 2, 3, 4, 5], 9, &[]),
            (&[1, 2, 3, 4, 5, 1, 2], 9, &[3, 4, 5]),
            (&[1, 2, 3, 4, 5, 1, 2], 2, &[3, 4]),
            (&[1, 2, 3, 4, 5, 1, 2], 0, &[]),
            // One token alone is too little.
            (&[1, 2, 3, 9, 2], 9, &[]),
            // The longer match wins over the later one.
            (&[7, 1, 2, 3, 8, 1, 2, 4, 9, 7, 1, 2], 9, &[3, 8, 1]),
            // The later one wins among equals.
            (&[1, 2, 3, 3, 3, 1, 2, 4, 4, 4, 1, 2], 9, &[4, 4, 4]),
            // But not if less is known behind it.
            (&[1, 2, 3, 4, 5, 1, 2, 1, 2], 9, &[3, 4, 5]),
            // A repetition goes on.
            (&[5, 5, 5, 5, 5, 5, 5], 9, &[5, 5, 5]),
            (&[5, 5, 5, 5], 9, &[5]),
        ];
        for (tokens, at_most, expected) in cases {
            assert_eq!(draft(tokens, LOOKUP, at_most), expected, "{tokens:?} {at_most}");
        }
    }
}

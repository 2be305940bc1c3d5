//! Prompts that no two requests share a beginning of, nor those of a run of another size, so that no prefix is found in a
//! cache by chance: only the same run a second time finds its prompts there.

/// Common English words; almost all are one token each in the vocabularies of current models.
#[rustfmt::skip]
const WORDS: [&str; 96] = [
    "the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not",
    "he", "his", "but", "at", "are", "this", "have", "from", "or", "had", "an", "they", "which", "one", "you", "were",
    "all", "her", "she", "there", "would", "their", "we", "him", "been", "has", "when", "who", "will", "no", "more",
    "if", "out", "so", "up", "said", "what", "its", "about", "than", "into", "them", "can", "only", "other", "time",
    "new", "some", "could", "these", "two", "may", "first", "then", "do", "any", "like", "my", "now", "over", "such",
    "our", "man", "me", "even", "most", "made", "after", "also", "well", "many", "must", "years", "much", "way", "down",
    "should", "world", "people", "house",
];

/// `count` prompts of `words` random words each; the same for the same arguments.
pub(super) fn prompts(seed: u64, count: usize, words: usize) -> Vec<String> {
    let mut seeds = fastrand::Rng::with_seed(seed);
    let mut random = fastrand::Rng::with_seed(seeds.u64(..) ^ (count as u64).rotate_left(32) ^ words as u64);
    let mut prompt = || {
        let words: Vec<&str> = (0..words).map(|_| WORDS[random.usize(..WORDS.len())]).collect();
        words.join(" ")
    };
    (0..count).map(|_| prompt()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_differ_and_come_again() {
        let made = prompts(1, 16, 20);
        assert_eq!(made, prompts(1, 16, 20));
        assert_ne!(made, prompts(2, 16, 20));
        assert!(made.iter().all(|prompt| prompt.split(' ').count() == 20));
        let begin = |prompt: &String| prompt.split(' ').take(6).collect::<Vec<_>>().join(" ");
        let mut begins: Vec<String> = made.iter().map(begin).collect();
        begins.sort();
        begins.dedup();
        assert_eq!(begins.len(), 16);
        let larger = prompts(1, 64, 20);
        assert!(!larger.iter().any(|prompt| made.contains(prompt)));
    }
}

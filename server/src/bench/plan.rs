//! Which tests there are: prompts, generations, or one after the other, for each batch size and depth.

use std::fmt;

use super::args::OfflineBench;

/// One test: `batch` sequences that have `depth` tokens of context compute `prompt` tokens of prompt, then generate
/// `generated` tokens each. Only the last two are timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Test {
    pub(super) batch: usize,
    pub(super) depth: usize,
    pub(super) prompt: usize,
    pub(super) generated: usize,
}

impl Test {
    /// Tokens that are timed, over all sequences.
    pub(super) fn tokens(&self) -> usize {
        self.batch * (self.prompt + self.generated)
    }

    /// Whether no prompt is timed: such a test is as fast as weights come from memory.
    pub(super) fn only_generates(&self) -> bool {
        self.prompt == 0
    }

    /// Most tokens of a sequence, with the one that is drawn last.
    pub(super) fn tokens_per_sequence(&self) -> usize {
        self.depth + self.prompt + self.generated + 1
    }
}

/// As `llama-bench` names tests: `pp512`, `tg128 @ d1024`.
impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.prompt, self.generated) {
            (prompt, 0) => write!(f, "pp{prompt}")?,
            (0, generated) => write!(f, "tg{generated}")?,
            (prompt, generated) => write!(f, "pp{prompt}+tg{generated}")?,
        }
        match self.depth {
            0 => Ok(()),
            depth => write!(f, " @ d{depth}"),
        }
    }
}

/// The tests of `bench`, in the order in which they run.
pub(super) fn tests(bench: &OfflineBench) -> Vec<Test> {
    let pairs = (bench.prompts.iter().map(|&prompt| (prompt, 0)))
        .chain(bench.generations.iter().map(|&generated| (0, generated)))
        .chain(bench.both.iter().copied());
    let sizes: Vec<(usize, usize)> = pairs.collect();
    let mut tests = Vec::new();
    for &depth in &bench.depths {
        for &batch in &bench.batches {
            tests.extend(sizes.iter().map(|&(prompt, generated)| Test { batch, depth, prompt, generated }));
        }
    }
    tests
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_llama_bench() {
        let test = |depth, prompt, generated| Test { batch: 1, depth, prompt, generated }.to_string();
        assert_eq!(test(0, 512, 0), "pp512");
        assert_eq!(test(1024, 0, 128), "tg128 @ d1024");
        assert_eq!(test(0, 512, 128), "pp512+tg128");
    }
}

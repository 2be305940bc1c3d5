//! Runs sequences through a model, several to a step, and hands out the logits of the tokens that are scored.

use kernels::{Backend, KV_BLOCK_TOKENS, KvCacheDtype};
use models::{KvCache, Model, OutputRows, StepInputs, StepSequence, Workspace};

/// Rows of a step that the runner aims at: enough to fill the matrix products.
const STEP_TOKENS: usize = 512;

/// Most rows of logits at a time.
pub(super) const LOGIT_ROWS: usize = 64;

/// Sequences with a common beginning.
#[derive(Debug, Clone)]
pub(super) struct Group<'a> {
    /// Token ids of each, from position 0.
    pub(super) sequences: Vec<&'a [u32]>,
    /// Tokens from this position on are scored; at least 1.
    pub(super) scored_from: usize,
}

impl<'a> Group<'a> {
    /// A sequence of which all tokens but the first are scored.
    pub(super) fn alone(sequence: &'a [u32]) -> Self {
        Self { sequences: vec![sequence], scored_from: 1 }
    }

    /// Tokens, in whole KV blocks, that all sequences begin with and whose logits nobody wants: they are computed
    /// once.
    fn shared(&self) -> usize {
        let [first, rest @ ..] = self.sequences.as_slice() else { return 0 };
        let unscored = if rest.is_empty() { 0 } else { self.scored_from - 1 };
        let common = rest.iter().fold(unscored, |common, other| {
            first.iter().zip(*other).take(common).take_while(|(a, b)| a == b).count()
        });
        common / KV_BLOCK_TOKENS * KV_BLOCK_TOKENS
    }

    /// Rows of a step.
    fn rows(&self) -> usize {
        let all: usize = self.sequences.iter().map(|sequence| sequence.len()).sum();
        all - self.shared() * self.sequences.len().saturating_sub(1)
    }

    /// KV blocks of a step.
    fn blocks(&self) -> usize {
        let all: usize = self.sequences.iter().map(|sequence| sequence.len().div_ceil(KV_BLOCK_TOKENS)).sum();
        all - self.shared() / KV_BLOCK_TOKENS * self.sequences.len().saturating_sub(1)
    }
}

/// A token to score.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Scored {
    /// Its sequence, counted through all groups.
    pub(super) sequence: usize,
    /// Its position there; the logits are those of the position before.
    pub(super) position: usize,
    /// The token.
    pub(super) token: u32,
}

/// Logits of some of the scored tokens.
#[derive(Debug)]
pub(super) struct Chunk<'a> {
    /// How many came before, in all chunks of the run.
    pub(super) first: usize,
    /// The tokens.
    pub(super) scored: &'a [Scored],
    /// F32 `[scored.len(), vocab_size]`.
    pub(super) logits: &'a [f32],
}

/// What a step has computed.
#[derive(Debug)]
struct Step {
    /// Tokens scored before, in all steps of the run.
    first: usize,
    /// The tokens it scores.
    scored: Vec<Scored>,
    /// The rows of their logits.
    rows: Vec<u32>,
}

/// A loaded model with the memory of its steps.
pub(super) struct Runner<'a> {
    backend: &'a dyn Backend,
    model: &'a dyn Model,
    kv: KvCache,
    step: StepInputs,
    workspace: Workspace,
    limits: Limits,
    logits: Vec<f32>,
}

/// What a step holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Limits {
    tokens: usize,
    sequences: usize,
    blocks: usize,
}

impl Limits {
    /// Enough for each of `groups`, and for several small ones.
    fn of(groups: &[Group<'_>]) -> Self {
        let most = |sizes: &mut dyn Iterator<Item = usize>| sizes.max().unwrap_or(1);
        let tokens = most(&mut groups.iter().map(Group::rows)).max(STEP_TOKENS);
        let sequences = most(&mut groups.iter().map(|group| group.sequences.len()));
        let sequences = sequences.max(STEP_TOKENS / KV_BLOCK_TOKENS);
        let blocks = most(&mut groups.iter().map(Group::blocks));
        // Each sequence may leave one block partly empty.
        let blocks = blocks.max(tokens.div_ceil(KV_BLOCK_TOKENS) + sequences);
        Self { tokens, sequences, blocks }
    }
}

impl<'a> Runner<'a> {
    /// Memory for steps of `groups` or smaller ones.
    ///
    /// # Errors
    /// Out of memory, or a KV cache that the device does not have.
    pub(super) fn new(
        backend: &'a dyn Backend,
        model: &'a dyn Model,
        kv_cache: KvCacheDtype,
        groups: &[Group<'_>],
    ) -> kernels::Result<Self> {
        let limits = Limits::of(groups);
        let config = model.config();
        Ok(Self {
            backend,
            model,
            kv: KvCache::new(backend, config, limits.blocks, kv_cache)?,
            step: StepInputs::new(backend, limits.tokens, limits.sequences, limits.blocks)?,
            workspace: Workspace::new(backend, model, limits.tokens, LOGIT_ROWS)?,
            limits,
            logits: Vec::new(),
        })
    }

    /// Runs `groups`, each as if alone, and calls `visit` with the logits of all scored tokens, in order.
    pub(super) fn run(&mut self, groups: &[Group<'_>], visit: &mut dyn FnMut(&Chunk<'_>)) {
        self.steps(groups, &mut |runner, step| {
            let chunks = step.scored.chunks(LOGIT_ROWS).zip(step.rows.chunks(LOGIT_ROWS));
            for (index, (scored, rows)) in chunks.enumerate() {
                let logits = runner.logits(rows);
                visit(&Chunk { first: step.first + index * LOGIT_ROWS, scored, logits });
            }
        });
    }

    /// The scored tokens of `groups` in the order of [`run`](Self::run), and the final hidden states
    /// F32 `[scored tokens, hidden_size]` that their logits come from.
    pub(super) fn hidden(&mut self, groups: &[Group<'_>]) -> (Vec<Scored>, Vec<f32>) {
        let width = self.hidden_size();
        let (mut all, mut hidden, mut rows) = (Vec::new(), Vec::new(), Vec::new());
        self.steps(groups, &mut |runner, step| {
            rows.resize(runner.step.rows() * width, 0.0);
            runner.backend.read_f32(runner.workspace.hidden(), 0, &mut rows);
            hidden.extend(step.rows.iter().flat_map(|&row| &rows[row as usize * width..][..width]));
            all.extend_from_slice(&step.scored);
        });
        (all, hidden)
    }

    /// The logits of up to [`LOGIT_ROWS`] hidden states that [`hidden`](Self::hidden) returned.
    pub(super) fn logits_of(&mut self, hidden: &[f32]) -> &[f32] {
        let rows: Vec<u32> = (0..(hidden.len() / self.hidden_size()) as u32).collect();
        self.backend.write_f32(self.workspace.hidden_mut(), 0, hidden);
        self.logits(&rows)
    }

    /// Width of a hidden state.
    pub(super) fn hidden_size(&self) -> usize {
        self.model.config().hidden_size
    }

    /// Logits of `rows` of the last step.
    fn logits(&mut self, rows: &[u32]) -> &[f32] {
        self.model.logits(self.backend, rows, &mut self.workspace);
        self.logits.resize(rows.len() * self.model.config().vocab_size, 0.0);
        self.backend.read_f32(self.workspace.logits(), 0, &mut self.logits);
        &self.logits
    }

    /// Runs `groups` in steps, and calls `done` after each.
    fn steps(&mut self, groups: &[Group<'_>], done: &mut dyn FnMut(&mut Self, &Step)) {
        let (mut first_group, mut first_sequence, mut first_scored) = (0, 0, 0);
        while first_group < groups.len() {
            let count = self.fitting(&groups[first_group..]);
            let part = &groups[first_group..][..count];
            let step = Step { first: first_scored, ..self.forward(part, first_sequence) };
            done(self, &step);
            first_group += count;
            first_sequence += part.iter().map(|group| group.sequences.len()).sum::<usize>();
            first_scored += step.scored.len();
        }
    }

    /// How many of the first groups a step holds: one at least.
    fn fitting(&self, groups: &[Group<'_>]) -> usize {
        let mut left = self.limits;
        let fits = groups.iter().take_while(|group| {
            let take = |left: &mut usize, size: usize| left.checked_sub(size).map(|rest| *left = rest);
            take(&mut left.tokens, group.rows()).is_some()
                && take(&mut left.sequences, group.sequences.len()).is_some()
                && take(&mut left.blocks, group.blocks()).is_some()
        });
        fits.count().max(1)
    }

    /// One step, as if it were the first.
    fn forward(&mut self, groups: &[Group<'_>], first_sequence: usize) -> Step {
        let mut tables: Vec<Vec<u32>> = Vec::new();
        let mut parts: Vec<(&[u32], usize)> = Vec::new();
        let (mut scored, mut rows) = (Vec::new(), Vec::new());
        let (mut next_block, mut next_row) = (0, 0);
        for group in groups {
            let shared = group.shared();
            let group_start = tables.len();
            for (index, sequence) in group.sequences.iter().enumerate() {
                // Later sequences read the keys and values that the first one writes in the same step.
                let start = if index == 0 { 0 } else { shared };
                let mut table = match index {
                    0 => Vec::new(),
                    _ => tables[group_start][..shared / KV_BLOCK_TOKENS].to_vec(),
                };
                let blocks = sequence.len().div_ceil(KV_BLOCK_TOKENS) - table.len();
                table.extend(next_block..next_block + blocks as u32);
                next_block += blocks as u32;
                for position in group.scored_from..sequence.len() {
                    let sequence_index = first_sequence + tables.len();
                    scored.push(Scored { sequence: sequence_index, position, token: sequence[position] });
                    rows.push((next_row + position - 1 - start) as u32);
                }
                next_row += sequence.len() - start;
                parts.push((&sequence[start..], start));
                tables.push(table);
            }
        }
        let sequences: Vec<_> = (parts.iter().zip(&tables))
            .map(|(&(tokens, first_position), table)| StepSequence {
                tokens,
                first_position,
                block_table: table,
            })
            .collect();
        self.step.fill(self.backend, &sequences, OutputRows::All);
        self.model.forward(self.backend, &self.step, &mut self.kv, &mut self.workspace);
        Step { first: 0, scored, rows }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use kernels::Device;
    use models::checkpoint::Checkpoint;

    use super::*;

    /// The logits of every scored token, by sequence and position.
    fn run(groups: &[Group<'_>]) -> Vec<(usize, usize, Vec<f32>)> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/models/rustdoc-6m");
        let backend = kernels::open(Device::Cpu { threads: 2 }).unwrap();
        let model = models::load(&*backend, &Checkpoint::open(Path::new(folder)).unwrap()).unwrap();
        let mut runner = Runner::new(&*backend, &*model, KvCacheDtype::F32, groups).unwrap();
        let (mut all, mut count) = (Vec::new(), 0);
        runner.run(groups, &mut |chunk| {
            assert_eq!(chunk.first, count);
            count += chunk.scored.len();
            for (scored, logits) in chunk.scored.iter().zip(chunk.logits.chunks(4096)) {
                all.push((scored.sequence, scored.position, logits.to_vec()));
            }
        });
        all
    }

    #[test]
    fn a_shared_beginning_changes_nothing() {
        let text: Vec<u32> = (0..700).map(|i| (i * 37 + i / 5) % 4096).collect();
        let answer = |prompt: usize, own: u32, length: usize| -> Vec<u32> {
            text[..prompt].iter().copied().chain((0..length as u32).map(|i| (own + i * i) % 4096)).collect()
        };
        // Beginnings of less than a block, of whole blocks, of blocks and a part; groups of more rows than a step.
        let questions = [(5, 3), (16, 2), (17, 3), (100, 4), (300, 2), (33, 1)];
        let sequences: Vec<Vec<Vec<u32>>> = (questions.iter())
            .map(|&(prompt, answers)| {
                (0..answers).map(|i| answer(prompt, 11 * i, 9 + 30 * i as usize)).collect()
            })
            .collect();
        let group = |answers: &[usize], question: usize| Group {
            sequences: answers.iter().map(|&i| sequences[question][i].as_slice()).collect(),
            scored_from: questions[question].0,
        };
        let together: Vec<_> =
            (0..6).map(|q| group(&(0..sequences[q].len()).collect::<Vec<_>>(), q)).collect();
        assert_eq!(together.iter().map(Group::shared).collect::<Vec<_>>(), [0, 0, 16, 96, 288, 0]);
        let alone: Vec<_> = (0..6)
            .flat_map(|q| (0..sequences[q].len()).map(move |i| (q, i)))
            .map(|(q, i)| group(&[i], q))
            .collect();
        let (together, alone) = (run(&together), run(&alone));
        assert_eq!(together.len(), alone.len());
        for (together, alone) in together.iter().zip(&alone) {
            assert_eq!(together, alone);
        }
    }
}

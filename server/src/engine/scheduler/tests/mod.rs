//! The scheduler by tables: who runs, who gives way, how sequences end.

mod caching;
mod simulation;
mod speculation;

use super::*;
use crate::engine::request::{FinishReason, GenerateRequest, Sampling, Scheduling, StopConditions, Usage};

const B: usize = KV_BLOCK_TOKENS;

const CACHING: Features = Features { prefix_caching: true, speculation: None };

const LOOKUP: NgramLookup = NgramLookup { num_speculative_tokens: 3, max: 3, min: 1 };

/// A token that ends every sequence of these tests.
const EOS: u32 = 1;

fn sequence(id: u64, prompt: usize, max_tokens: usize) -> Sequence {
    let request = GenerateRequest {
        id: id.to_string(),
        prompt: vec![7; prompt],
        sampling: Sampling::default(),
        stop: StopConditions { max_tokens, eos_token_ids: vec![EOS], ..StopConditions::default() },
        scheduling: Scheduling::default(),
        logprobs: None,
        prompt_logprobs: None,
        pooling: None,
    };
    Sequence::new(SequenceId(id), request, usize::MAX)
}

fn scheduler(max_num_seqs: usize, max_num_batched_tokens: usize, blocks: usize) -> Scheduler {
    Scheduler::new(Limits { max_num_seqs, max_num_batched_tokens }, Features::default(), blocks)
}

/// Runs one step with token 9 for everyone; returns `(id, tokens)` of the batch.
fn step(scheduler: &mut Scheduler) -> Vec<(u64, usize)> {
    let (mut batch, mut updates) = (Batch::default(), Vec::new());
    scheduler.schedule(&mut batch);
    let planned = batch.items.iter().map(|i| (scheduler.running()[i.index].id().0, i.tokens)).collect();
    let sampled = vec![9; batch.items.iter().map(BatchItem::draws).sum()];
    scheduler.commit(&batch, &sampled, &mut updates);
    planned
}

#[test]
fn batches_of_a_few_sequences() {
    struct Case {
        name: &'static str,
        limits: (usize, usize, usize),
        /// Prompt length and `max_tokens`, all there at the start.
        sequences: &'static [(usize, usize)],
        /// `(id, tokens)` of each step, until nothing is left.
        steps: &'static [&'static [(u64, usize)]],
    }
    let cases = [
        Case {
            name: "one sequence: the prompt, then token by token",
            limits: (4, 100, 10),
            sequences: &[(5, 3)],
            steps: &[&[(0, 5)], &[(0, 1)], &[(0, 1)]],
        },
        Case {
            name: "max_tokens 0 computes the prompt and no more",
            limits: (4, 3, 10),
            sequences: &[(5, 0)],
            steps: &[&[(0, 3)], &[(0, 2)]],
        },
        Case {
            name: "prompts share a step within the budget; the last one is cut, its rest comes after the decodes",
            limits: (4, 10, 10),
            sequences: &[(4, 4), (4, 4), (4, 1)],
            steps: &[
                &[(0, 4), (1, 4), (2, 2)],
                &[(0, 1), (1, 1), (2, 2)],
                &[(0, 1), (1, 1)],
                &[(0, 1), (1, 1)],
            ],
        },
        Case {
            name: "a long prompt leaves decodes alone and fills what is left of each step",
            limits: (4, 4, 10),
            sequences: &[(1, 4), (8, 1)],
            steps: &[&[(0, 1), (1, 3)], &[(0, 1), (1, 3)], &[(0, 1), (1, 2)], &[(0, 1)]],
        },
        Case {
            name: "max_num_seqs: the third waits for a place",
            limits: (2, 100, 10),
            sequences: &[(2, 1), (2, 2), (2, 1)],
            steps: &[&[(0, 2), (1, 2)], &[(1, 1), (2, 2)]],
        },
        Case {
            name: "a budget of one token serves the oldest first",
            limits: (2, 1, 10),
            sequences: &[(2, 2), (1, 1)],
            steps: &[&[(0, 1)], &[(0, 1)], &[(0, 1)], &[(1, 1)]],
        },
        Case {
            name: "who does not fit beside the others waits, and nobody overtakes",
            limits: (4, 100, 4),
            sequences: &[(B, 2), (3 * B, 1), (1, 1)],
            steps: &[&[(0, B)], &[(0, 1)], &[(1, 3 * B)], &[(2, 1)]],
        },
        Case {
            name: "when blocks run out the youngest gives way, and is computed again with what it had generated",
            limits: (4, 100, 3),
            sequences: &[(B - 1, 3), (B - 1, 4)],
            steps: &[
                &[(0, B - 1), (1, B - 1)],
                &[(0, 1), (1, 1)], // both are at B tokens: full blocks
                &[(0, 1)],         // 0 takes the last block, 1 gives way
                &[(1, B + 1)],     // 1 again: prompt and two generated tokens
                &[(1, 1)],
            ],
        },
    ];
    for case in cases {
        let (seqs, tokens, blocks) = case.limits;
        let mut scheduler = scheduler(seqs, tokens, blocks);
        for (id, &(prompt, max_tokens)) in case.sequences.iter().enumerate() {
            scheduler.add(sequence(id as u64, prompt, max_tokens));
        }
        let mut steps = Vec::new();
        while !scheduler.is_idle() {
            assert!(steps.len() < 100, "{}: does not end: {steps:?}", case.name);
            steps.push(step(&mut scheduler));
        }
        assert_eq!(steps, case.steps, "{}", case.name);
        assert_eq!(scheduler.blocks().used(), 0, "{}", case.name);
    }
}

#[test]
fn sequences_end_for_the_right_reason() {
    // (max_tokens, min_tokens, what is drawn, expected end and number of tokens)
    let cases: [(usize, usize, &[u32], FinishReason, usize); 6] = [
        (3, 0, &[9, 9, 9, 9], FinishReason::Length, 3),
        (3, 0, &[9, EOS, 9], FinishReason::Eos, 2),
        (3, 0, &[9, 9, EOS], FinishReason::Eos, 3),
        (3, 0, &[2, 9, 9], FinishReason::StopToken(2), 1),
        (9, 2, &[EOS, 2, EOS, 9], FinishReason::Eos, 3),
        (2, 2, &[EOS, EOS], FinishReason::Length, 2),
    ];
    for (max_tokens, min_tokens, drawn, reason, expected) in cases {
        let stop =
            StopConditions { max_tokens, min_tokens, eos_token_ids: vec![EOS], stop_token_ids: vec![2] };
        let request = GenerateRequest {
            id: String::new(),
            prompt: vec![7; 4],
            sampling: Sampling::default(),
            stop,
            scheduling: Scheduling::default(),
            logprobs: None,
            prompt_logprobs: None,
            pooling: None,
        };
        let mut scheduler = scheduler(1, 100, 10);
        scheduler.add(Sequence::new(SequenceId(0), request, 100));
        let (mut batch, mut updates) = (Batch::default(), Vec::new());
        for &token in drawn {
            if !scheduler.is_idle() {
                scheduler.schedule(&mut batch);
                scheduler.commit(&batch, &[token], &mut updates);
            }
        }
        assert_eq!(updates.len(), expected, "{drawn:?}");
        let usage = Usage { prompt_tokens: 4, cached_tokens: 0, completion_tokens: expected };
        assert_eq!(updates.last().unwrap().finished, Some((reason, usage)), "{drawn:?}");
    }
}

#[test]
fn the_context_ends_a_sequence() {
    let mut scheduler = scheduler(1, 100, 10);
    let request = GenerateRequest {
        id: String::new(),
        prompt: vec![7; 4],
        sampling: Sampling::default(),
        stop: StopConditions { max_tokens: usize::MAX, ..StopConditions::default() },
        scheduling: Scheduling::default(),
        logprobs: None,
        prompt_logprobs: None,
        pooling: None,
    };
    scheduler.add(Sequence::new(SequenceId(0), request, 6));
    assert_eq!([step(&mut scheduler), step(&mut scheduler)], [vec![(0, 4)], vec![(0, 1)]]);
    assert!(scheduler.is_idle());
}

#[test]
fn removing_frees_blocks_and_keeps_the_order() {
    let mut scheduler = scheduler(2, 100, 10);
    for id in 0..4 {
        scheduler.add(sequence(id, B, 9));
    }
    step(&mut scheduler);
    assert_eq!((scheduler.running().len(), scheduler.waiting.len(), scheduler.blocks().used()), (2, 2, 2));
    assert!(scheduler.remove(SequenceId(0)).is_some());
    assert!(scheduler.remove(SequenceId(2)).is_some());
    assert!(scheduler.remove(SequenceId(2)).is_none());
    assert_eq!(scheduler.blocks().used(), 1);
    assert_eq!(step(&mut scheduler), [(1, 1), (3, B)]);
}

/// A prompt of `family`: families differ from their second block on.
fn prompt_of(family: u32, len: usize) -> Vec<u32> {
    (0..len).map(|at| if at < B + 5 { 7 } else { 100 + family }).collect()
}

fn sequence_of(id: u64, prompt: Vec<u32>, max_tokens: usize, scheduling: Scheduling) -> Sequence {
    let request = GenerateRequest {
        id: id.to_string(),
        prompt,
        sampling: Sampling::default(),
        stop: StopConditions { max_tokens, eos_token_ids: vec![EOS], ..StopConditions::default() },
        scheduling,
        logprobs: None,
        prompt_logprobs: None,
        pooling: None,
    };
    Sequence::new(SequenceId(id), request, usize::MAX)
}

#[test]
fn priorities_decide_who_runs_and_who_gives_way() {
    let rank = |priority| Scheduling { priority, ..Scheduling::default() };
    let mut waiting = scheduler(1, 100, 10);
    for (id, priority) in [(0, 5), (1, 0), (2, -1), (3, 0)] {
        waiting.add(sequence_of(id, vec![7; 2], 1, rank(priority)));
    }
    let order: Vec<_> =
        std::iter::from_fn(|| (!waiting.is_idle()).then(|| step(&mut waiting)[0].0)).collect();
    assert_eq!(order, [2, 1, 3, 0]);

    // The later but more important one takes the last block.
    let mut full = scheduler(4, 100, 3);
    full.add(sequence_of(0, vec![7; B - 1], 4, rank(1)));
    full.add(sequence_of(1, vec![7; B - 1], 4, rank(0)));
    assert_eq!(step(&mut full), [(1, B - 1), (0, B - 1)]);
    assert_eq!(step(&mut full), [(1, 1), (0, 1)]);
    assert_eq!(step(&mut full), [(1, 1)]);
}

#[test]
fn an_important_prompt_does_not_hold_up_streams() {
    let rank = |priority| Scheduling { priority, ..Scheduling::default() };
    let mut scheduler = scheduler(4, 8, 20);
    scheduler.add(sequence_of(0, vec![7; 2], 9, rank(1)));
    scheduler.add(sequence_of(1, vec![7; 2], 9, rank(1)));
    step(&mut scheduler);
    scheduler.add(sequence_of(2, vec![7; 20], 1, rank(0)));
    assert_eq!(step(&mut scheduler), [(0, 1), (1, 1), (2, 6)]);
    assert_eq!(step(&mut scheduler), [(2, 6), (0, 1), (1, 1)]);
}

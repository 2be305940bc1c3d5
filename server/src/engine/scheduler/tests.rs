//! The scheduler by tables, and by simulated load.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::engine::request::{GenerateRequest, Sampling, Scheduling, StopConditions};

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
fn beginnings_are_found() {
    let salted = |salt: &str| Scheduling { cache_salt: Some(salt.to_owned()), ..Scheduling::default() };
    let open = Scheduling::default;
    // Prompts one after the other, each with the tokens that are computed of it.
    type Case = (&'static str, Vec<(Vec<u32>, Scheduling, usize)>);
    let cases: [Case; 5] = [
        (
            "full blocks are shared, but for the last token's",
            vec![
                (prompt_of(0, 2 * B), open(), 2 * B),
                (prompt_of(0, 2 * B), open(), B),
                (prompt_of(0, 2 * B + 1), open(), 1),
                (prompt_of(0, B), open(), B),
                (prompt_of(0, B + 1), open(), 1),
            ],
        ),
        (
            "up to where prompts differ",
            vec![(prompt_of(0, 3 * B), open(), 3 * B), (prompt_of(1, 3 * B), open(), 2 * B)],
        ),
        ("a short prompt has no full block", vec![(vec![7; 5], open(), 5), (vec![7; 5], open(), 5)]),
        (
            "answers are beginnings too",
            vec![
                (prompt_of(0, 2 * B - 2), open(), 2 * B - 2),
                // Two of the three tokens drawn have been computed.
                ([prompt_of(0, 2 * B - 2), vec![9, 9, 9, 3]].concat(), open(), 2),
            ],
        ),
        (
            "salts separate",
            vec![
                (prompt_of(0, 2 * B), salted("a"), 2 * B),
                (prompt_of(0, 2 * B), salted("b"), 2 * B),
                (prompt_of(0, 2 * B), open(), 2 * B),
                (prompt_of(0, 2 * B), salted("a"), B),
            ],
        ),
    ];
    for (name, prompts) in cases {
        let limits = Limits { max_num_seqs: 4, max_num_batched_tokens: 100 };
        let mut scheduler = Scheduler::new(limits, CACHING, 20);
        for (id, (prompt, scheduling, computed)) in (0..).zip(prompts) {
            scheduler.add(sequence_of(id, prompt, 3, scheduling));
            assert_eq!(step(&mut scheduler), [(id, computed)], "{name}: prompt {id}");
            while !scheduler.is_idle() {
                step(&mut scheduler);
            }
        }
        assert_eq!(scheduler.blocks().used(), 0, "{name}");
    }
}

#[test]
fn those_who_run_share_and_memory_counts_once() {
    let limits = Limits { max_num_seqs: 4, max_num_batched_tokens: 100 };
    let mut scheduler = Scheduler::new(limits, CACHING, 6);
    scheduler.add(sequence_of(0, prompt_of(0, 3 * B + 1), 9, Scheduling::default()));
    assert_eq!(step(&mut scheduler), [(0, 3 * B + 1)]);
    // Without sharing, neither would have room.
    scheduler.add(sequence_of(1, prompt_of(0, 3 * B + 1), 9, Scheduling::default()));
    assert_eq!(step(&mut scheduler), [(0, 1), (1, 1)]);
    assert_eq!(scheduler.blocks().used(), 5);
    let usage = scheduler.remove(SequenceId(1)).map(|sequence| sequence.usage());
    assert_eq!(usage.map(|usage| usage.cached_tokens), Some(3 * B));
    assert_eq!(scheduler.blocks().used(), 4);
}

#[test]
fn a_prompt_that_is_scored_is_computed() {
    let limits = Limits { max_num_seqs: 4, max_num_batched_tokens: 100 };
    let mut scheduler = Scheduler::new(limits, CACHING, 20);
    for id in 0..2 {
        let request = GenerateRequest {
            id: String::new(),
            prompt: prompt_of(0, 3 * B),
            sampling: Sampling::default(),
            stop: StopConditions { max_tokens: 1, ..StopConditions::default() },
            scheduling: Scheduling::default(),
            logprobs: None,
            prompt_logprobs: (id == 1).then_some(0),
            pooling: None,
        };
        scheduler.add(Sequence::new(SequenceId(id), request, 100));
        let mut batch = Batch::default();
        scheduler.schedule(&mut batch);
        assert_eq!((batch.tokens(), batch.prefix_hits), (3 * B, 0));
        assert_eq!(batch.prefix_queries, if id == 1 { 0 } else { 3 * B });
        scheduler.commit(&batch, &[9], &mut Vec::new());
    }
}

#[test]
fn who_is_preempted_finds_its_blocks_again() {
    let limits = Limits { max_num_seqs: 4, max_num_batched_tokens: 100 };
    let mut scheduler = Scheduler::new(limits, CACHING, 4);
    scheduler.add(sequence_of(0, prompt_of(0, B - 1), 3, Scheduling::default()));
    scheduler.add(sequence_of(1, vec![3; 2 * B - 1], 4, Scheduling::default()));
    let mut steps = Vec::new();
    while !scheduler.is_idle() {
        steps.push(step(&mut scheduler));
    }
    let expected: [&[(u64, usize)]; 5] = [
        &[(0, B - 1), (1, 2 * B - 1)],
        &[(0, 1), (1, 1)],
        &[(0, 1)], // 0 takes the last block, 1 gives way
        &[(1, 1)], // both of its full blocks are still there
        &[(1, 1)],
    ];
    assert_eq!(steps, expected);
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

/// What a simulated client does.
#[derive(Debug, Clone)]
struct Client {
    prompt: usize,
    family: u32,
    priority: i64,
    max_tokens: usize,
    /// Steps between the arrival before and this one.
    gap: usize,
    /// Goes away this many steps after it came.
    leaves_after: Option<usize>,
}

fn client() -> impl Strategy<Value = Client> {
    let leaves_after = prop_oneof![4 => Just(None), 1 => (0..60_usize).prop_map(Some)];
    (1..=4 * B, 0..3_u32, 0..3_i64, 0..=3 * B, 0..4_usize, leaves_after).prop_map(
        |(prompt, family, priority, max_tokens, gap, leaves_after)| Client {
            prompt,
            family,
            priority,
            max_tokens,
            gap,
            leaves_after,
        },
    )
}

/// The token drawn at a place of a sequence: any function of these two alone, as real sampling is. Every other sequence
/// repeats itself, now and then with a change.
fn drawn(id: SequenceId, place: usize) -> u32 {
    let place = if id.0.is_multiple_of(2) && !place.is_multiple_of(11) { 60 + place % 3 } else { place };
    let mixed = (id.0 << 32 | place as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    // About one token in 50 ends its sequence.
    if mixed.is_multiple_of(50) { EOS } else { 2 + (mixed % 1000) as u32 }
}

/// What a client of the simulation must hear in the end.
fn expected_output(id: SequenceId, max_tokens: usize) -> Vec<u32> {
    let mut output = Vec::new();
    while output.len() < max_tokens && output.last() != Some(&EOS) {
        output.push(drawn(id, output.len()));
    }
    output
}

/// Checks what must hold after every `schedule`.
fn check_plan(scheduler: &Scheduler, batch: &Batch) {
    let limits = scheduler.limits;
    assert!(batch.tokens() <= limits.max_num_batched_tokens, "the token budget is kept");
    assert!(scheduler.running().len() <= limits.max_num_seqs);
    assert!(!batch.items.is_empty() || scheduler.is_idle(), "there is work and nobody runs");

    let ranks: Vec<_> = scheduler.waiting.iter().map(Sequence::rank).collect();
    assert!(ranks.is_sorted(), "those who wait are in order: {ranks:?}");
    let known = scheduler.running().len() - batch.admitted.len();
    let ranks: Vec<_> = scheduler.running()[..known].iter().map(Sequence::rank).collect();
    assert!(ranks.is_sorted(), "those who run are in order: {ranks:?}");
    if known > 0 {
        assert_eq!(
            batch.items.first().map(|item| item.index),
            Some(0),
            "the first always runs: nobody starves"
        );
    }

    // Positions of each block in tables, and whether all its tokens are computed for that table's owner.
    let mut held: BTreeMap<u32, Vec<(usize, bool)>> = BTreeMap::new();
    for sequence in scheduler.sequences() {
        for (at, block) in sequence.block_table.blocks().iter().enumerate() {
            held.entry(*block).or_default().push((at, (at + 1) * B <= sequence.computed()));
        }
    }
    for (block, places) in &held {
        let is_shared_rightly = places.iter().all(|&(at, full)| full && at == places[0].0);
        assert!(places.len() == 1 || is_shared_rightly, "block {block}: {places:?}");
    }
    assert_eq!(held.len(), scheduler.blocks().used(), "blocks are held or free");
    assert!(scheduler.waiting.iter().all(|s| s.computed() == 0 && s.block_table.blocks().is_empty()));

    for item in &batch.items {
        let sequence = &scheduler.running()[item.index];
        let known = item.tokens - item.drafts;
        assert!(known >= 1 && known <= sequence.remaining());
        assert!(item.drafts == 0 || (item.samples && known == 1), "drafts are for those who decode");
        assert!(sequence.tokens().len() + item.drafts < sequence.max_len() || item.drafts == 0);
        let room = sequence.block_table.blocks().len() * B;
        assert!(sequence.computed() + item.tokens <= room, "every token has a slot");
    }
}

/// The keys and values of a simulated cache, by slot: each is a function of its token and all before it, as real ones
/// are.
#[derive(Default)]
struct Memory(BTreeMap<usize, u64>);

impl Memory {
    /// Computes a batch; what it reads must be what its sequences would have written.
    fn run(&mut self, scheduler: &Scheduler, batch: &Batch) {
        for item in &batch.items {
            let sequence = &scheduler.running()[item.index];
            let blocks = sequence.block_table.blocks();
            let first = sequence.computed();
            let mut value = 0_u64;
            let tokens = sequence.tokens()[..first].iter().chain(sequence.next_tokens(item.tokens));
            for (at, &token) in tokens.enumerate() {
                value = (value ^ u64::from(token)).wrapping_mul(0x100_0000_01b3).rotate_left(17);
                let slot = blocks[at / B] as usize * B + at % B;
                if at < first {
                    assert_eq!(self.0.get(&slot), Some(&value), "{:?} reads what it is", sequence.id());
                } else {
                    self.0.insert(slot, value);
                }
            }
        }
    }
}

/// What came of a simulation.
#[derive(Debug, Default)]
struct Simulated {
    preemptions: usize,
    prefix_hits: usize,
    speculated: Speculated,
}

/// Serves `clients` to the end; checks each step, and what each client heard.
fn simulate(limits: Limits, features: Features, blocks: usize, clients: &[Client]) -> Simulated {
    let mut scheduler = Scheduler::new(limits, features, blocks);
    let mut memory = Memory::default();
    let mut simulated = Simulated::default();
    let (mut batch, mut updates) = (Batch::default(), Vec::new());
    let mut outputs: BTreeMap<SequenceId, Vec<u32>> = BTreeMap::new();
    let mut prompts = BTreeSet::new();
    let mut ended = BTreeSet::new();
    let mut gone = BTreeSet::new();
    let mut leaving: Vec<(usize, SequenceId)> = Vec::new();
    let mut now = 0;
    let mut arrivals = clients.iter().enumerate().peekable();
    let mut next_arrival = clients.first().map_or(0, |client| client.gap);

    while arrivals.peek().is_some() || !scheduler.is_idle() {
        while let Some((index, client)) = arrivals.next_if(|_| now >= next_arrival) {
            let id = SequenceId(index as u64);
            let prompt = prompt_of(client.family, client.prompt);
            let scheduling = Scheduling { priority: client.priority, ..Scheduling::default() };
            scheduler.add(sequence_of(id.0, prompt, client.max_tokens, scheduling));
            leaving.extend(client.leaves_after.map(|steps| (now + steps, id)));
            next_arrival = now + arrivals.peek().map_or(0, |(_, client)| client.gap);
        }
        for &(_, id) in leaving.iter().filter(|(at, _)| *at == now) {
            if scheduler.remove(id).is_some() {
                gone.insert(id);
            }
        }
        scheduler.schedule(&mut batch);
        check_plan(&scheduler, &batch);
        memory.run(&scheduler, &batch);
        simulated.preemptions += batch.preempted.len();
        simulated.prefix_hits += batch.prefix_hits;
        let sampled: Vec<u32> = batch
            .items
            .iter()
            .flat_map(|item| {
                let sequence = &scheduler.running()[item.index];
                let draft = &sequence.next_tokens(item.tokens)[item.tokens - item.drafts..];
                let place = sequence.generated();
                (0..item.draws()).map(move |ahead| {
                    // What follows a wrong draft means nothing.
                    let is_right = (0..ahead).all(|i| draft[i] == drawn(sequence.id(), place + i));
                    if is_right { drawn(sequence.id(), place + ahead) } else { 5000 }
                })
            })
            .collect();
        scheduler.commit(&batch, &sampled, &mut updates);
        for update in updates.drain(..) {
            assert!(!ended.contains(&update.id) && !gone.contains(&update.id));
            if update.prompt.is_some() {
                assert!(prompts.insert(update.id), "a prompt completes once");
            }
            outputs.entry(update.id).or_default().extend(update.token.map(|token| token.id));
            if let Some(token) = update.token {
                assert_eq!(sampled[token.draw], token.id);
            }
            if update.finished.is_some() {
                ended.insert(update.id);
            }
        }
        now += 1;
        assert!(now < 1_000_000, "does not end");
    }

    simulated.speculated = scheduler.speculated();
    assert_eq!(scheduler.blocks().used(), 0, "blocks leak");
    for (index, client) in clients.iter().enumerate() {
        let id = SequenceId(index as u64);
        let expected = expected_output(id, client.max_tokens);
        let output = outputs.remove(&id).unwrap_or_default();
        if gone.contains(&id) {
            assert!(expected.starts_with(&output), "what a client heard before it left is right");
        } else {
            assert!(ended.contains(&id), "every request ends");
            assert_eq!(output, expected, "a preempted sequence goes on where it was");
        }
    }
    simulated
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn every_client_is_served(
        max_num_seqs in 1..8_usize,
        max_num_batched_tokens in prop_oneof![1..8_usize, 1..200_usize],
        // The longest sequence needs 7 blocks.
        blocks in prop_oneof![7..12_usize, 7..60_usize],
        prefix_caching: bool,
        speculation in prop::option::of(Just(LOOKUP)),
        clients in prop::collection::vec(client(), 0..24),
    ) {
        let limits = Limits { max_num_seqs, max_num_batched_tokens };
        simulate(limits, Features { prefix_caching, speculation }, blocks, &clients);
    }
}

#[test]
fn the_simulation_preempts_shares_and_speculates() {
    // Otherwise the property above would not say what it seems to.
    let client =
        Client { prompt: 2 * B, family: 0, priority: 0, max_tokens: 3 * B, gap: 1, leaves_after: None };
    let limits = Limits { max_num_seqs: 8, max_num_batched_tokens: 64 };
    for (prefix_caching, speculation) in
        [(false, None), (true, None), (false, Some(LOOKUP)), (true, Some(LOOKUP))]
    {
        let features = Features { prefix_caching, speculation };
        let simulated = simulate(limits, features, 11, &vec![client.clone(); 12]);
        assert!(simulated.preemptions > 0, "{simulated:?}");
        assert_eq!(simulated.prefix_hits > 0, prefix_caching, "{simulated:?}");
        let Speculated { tokens, accepted, .. } = simulated.speculated;
        assert_eq!(
            (accepted > 0, tokens > accepted),
            (speculation.is_some(), speculation.is_some()),
            "{simulated:?}"
        );
    }
}

#[test]
fn drafts_are_accepted_as_far_as_they_are_right() {
    // (drawn in one step, tokens that the sequence gets) after a draft of 4, 5, 6.
    let cases: [(&[u32], &[u32]); 6] = [
        (&[4, 5, 6, 7], &[4, 5, 6, 7]),
        (&[4, 5, 9, 7], &[4, 5, 9]),
        (&[4, 9, 6, 7], &[4, 9]),
        (&[9, 5, 6, 7], &[9]),
        (&[4, EOS, 6, 7], &[4, EOS]),
        (&[EOS, 5, 6, 7], &[EOS]),
    ];
    for (drawn, expected) in cases {
        let limits = Limits { max_num_seqs: 1, max_num_batched_tokens: 100 };
        let features = Features { speculation: Some(LOOKUP), ..CACHING };
        let mut scheduler = Scheduler::new(limits, features, 10);
        scheduler.add(sequence_of(0, vec![2, 3, 4, 5, 6, 7, 2], 9, Scheduling::default()));
        let (mut batch, mut updates) = (Batch::default(), Vec::new());
        scheduler.schedule(&mut batch);
        scheduler.commit(&batch, &[3], &mut updates);
        updates.clear();
        scheduler.schedule(&mut batch);
        assert_eq!(batch.items, [BatchItem { index: 0, tokens: 4, drafts: 3, samples: true }]);
        assert_eq!(scheduler.running()[0].next_tokens(4), [3, 4, 5, 6]);
        scheduler.commit(&batch, drawn, &mut updates);
        let got: Vec<u32> = updates.iter().filter_map(|update| update.token).map(|token| token.id).collect();
        assert_eq!(got, expected, "{drawn:?}");
        let ended = updates.last().and_then(|update| update.finished).map(|(reason, _)| reason);
        assert_eq!(ended, expected.contains(&EOS).then_some(FinishReason::Eos));
        if let Some(sequence) = scheduler.running().first() {
            assert_eq!(sequence.remaining(), 1, "all but the last are in the cache: {drawn:?}");
            assert_eq!(sequence.tokens()[8..], *expected);
        }
        let accepted = expected.iter().zip([4, 5, 6]).take_while(|(a, b)| **a == *b).count();
        let expected = Speculated { drafts: 1, tokens: 3, accepted: accepted as u64 };
        assert_eq!(scheduler.speculated(), expected, "{drawn:?}");
    }
}

#[test]
fn drafts_fit_what_is_left() {
    let drafted = |tokens, blocks, max_tokens, sampling: Sampling| {
        let limits = Limits { max_num_seqs: 4, max_num_batched_tokens: tokens };
        let features = Features { speculation: Some(LOOKUP), ..Features::default() };
        let mut scheduler = Scheduler::new(limits, features, blocks);
        let request = GenerateRequest {
            id: String::new(),
            prompt: vec![5; B - 2],
            sampling,
            stop: StopConditions { max_tokens, ..StopConditions::default() },
            scheduling: Scheduling::default(),
            logprobs: None,
            prompt_logprobs: None,
            pooling: None,
        };
        scheduler.add(Sequence::new(SequenceId(0), request, 100));
        let mut batch = Batch::default();
        while scheduler.sequences().any(|sequence| sequence.generated() == 0) {
            scheduler.schedule(&mut batch);
            let sampled = vec![5; batch.items.iter().map(BatchItem::draws).sum()];
            scheduler.commit(&batch, &sampled, &mut Vec::new());
        }
        scheduler.schedule(&mut batch);
        batch.items[0].drafts
    };
    let plain = Sampling::default;
    assert_eq!(drafted(100, 10, 20, plain()), 3);
    assert_eq!(drafted(3, 10, 20, plain()), 2, "the step's budget");
    assert_eq!(drafted(100, 1, 3, plain()), 1, "the last token but one, and the cache's only block");
    assert_eq!(drafted(100, 2, 20, plain()), 1, "the other block is kept for those who run");
    assert_eq!(drafted(100, 10, 2, plain()), 0, "one token is left");
    let penalized = Sampling { presence_penalty: 0.5, ..plain() };
    assert_eq!(drafted(100, 10, 20, penalized), 0, "what is drawn depends on what was drawn before");
}

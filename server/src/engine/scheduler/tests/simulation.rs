//! The scheduler under simulated load: clients that come, leave, share beginnings and have priorities, over a memory
//! whose contents are checked.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

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

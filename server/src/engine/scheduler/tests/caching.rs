//! Prefix caching.

use super::*;

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

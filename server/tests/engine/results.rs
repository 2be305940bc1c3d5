//! What comes out: the same whatever else runs, and what was asked for.

use super::*;

/// Requests of many kinds and lengths.
fn mixed_requests() -> Vec<GenerateRequest> {
    let lengths = [1, 15, 16, 17, 40, 3, 64, 33, 90, 7, 48, 120];
    let kinds = lengths.iter().enumerate().map(|(index, &len)| {
        let seed = 1000 + index as u64;
        let base = Sampling { seed, ..Sampling::default() };
        let sampling = match index % 6 {
            0 => Sampling { temperature: 0.0, ..base },
            1 => base,
            2 => Sampling { temperature: 0.8, top_p: 0.9, ..base },
            3 => Sampling { temperature: 1.5, top_k: Some(40), min_p: 0.02, ..base },
            4 => Sampling { repetition_penalty: 1.3, frequency_penalty: 0.2, ..base },
            _ => Sampling { presence_penalty: 0.7, logit_bias: vec![(11, 2.5), (500, -9.0)], ..base },
        };
        let mut request = GenerateRequest { sampling, ..request(len, 20 + 3 * index) };
        request.prompt = text_tokens()[37 * index..][..len].to_vec();
        request.logprobs = (index % 3 == 0).then_some(index % 4);
        request.prompt_logprobs = (index % 2 == 0).then_some(index % 5);
        request
    });
    kinds.collect()
}

fn alone() -> Vec<Heard> {
    let engine = start(options(64));
    mixed_requests().into_iter().map(|request| run(&engine, request)).collect()
}

fn assert_same(name: &str, expected: &[Heard], heard: &[Heard]) {
    for (index, (expected, heard)) in expected.iter().zip(heard).enumerate() {
        assert_eq!(heard.tokens, expected.tokens, "{name}: tokens of request {index}");
        assert_eq!(heard, expected, "{name}: request {index}");
    }
    assert_eq!(heard.len(), expected.len(), "{name}");
}

#[test]
fn a_crowd_changes_nothing_whatever_the_chunks_and_the_memory() {
    let expected = alone();
    let cases = [
        ("steps of 512 tokens", EngineOptions { max_num_batched_tokens: 512, ..options(200) }),
        ("steps of 7 tokens", EngineOptions { max_num_batched_tokens: 7, ..options(200) }),
        ("steps of one token", EngineOptions { max_num_batched_tokens: 1, ..options(200) }),
        ("three at a time", EngineOptions { max_num_seqs: 3, ..options(200) }),
        // The longest sequence needs 11 blocks, all together about 90.
        ("little memory", options(14)),
        ("little memory and steps of 7 tokens", EngineOptions { max_num_batched_tokens: 7, ..options(14) }),
    ];
    for (name, options) in cases {
        let engine = start(options);
        // In reverse, so that neither places in the batch nor blocks are those of the runs alone.
        let mut requests = mixed_requests();
        requests.reverse();
        let channels = engine.submit_all(requests).unwrap();
        let mut heard: Vec<Heard> = channels.into_iter().map(hear).collect();
        heard.reverse();
        assert_same(name, &expected, &heard);
        let stats = engine.stats();
        assert_eq!(stats.preemptions > 0, name.starts_with("little memory"), "{name}: {stats:?}");
        assert_eq!((stats.running, stats.waiting, stats.kv_blocks_used), (0, 0, 0), "{name}");
        let tokens: usize = expected.iter().map(|heard| heard.tokens.len()).sum();
        assert_eq!(stats.generation_tokens, tokens as u64, "{name}");
        let prompts: usize = mixed_requests().iter().map(|request| request.prompt.len()).sum();
        assert_eq!(stats.prompt_tokens, prompts as u64, "{name}: recomputed prompts count once");
    }
}

#[test]
fn those_who_leave_take_nothing_from_those_who_stay() {
    let expected = alone();
    let engine = start(options(14));
    for round in 0..4 {
        let channels = engine.submit_all(mixed_requests()).unwrap();
        let mut staying = Vec::new();
        for (index, mut events) in channels.into_iter().enumerate() {
            if index % 4 == round {
                staying.push((index, events));
                continue;
            }
            // Some leave before they run, some after a few events, while others are preempted and come back.
            for _ in 0..index % 3 * 2 {
                events.blocking_recv();
            }
        }
        for (index, events) in staying {
            // Those of later rounds find their prompts in the cache.
            assert_eq!(hear(events).but_for_the_cache(), expected[index], "round {round}, request {index}");
        }
    }
    lifecycle::wait_for(&engine, "idle", |stats| stats.running + stats.waiting == 0);
    assert_eq!(engine.stats().kv_blocks_used, 0);
}

/// Turns of a conversation and requests with the same beginning; each finds something in the cache of those before.
fn related_requests() -> Vec<GenerateRequest> {
    let text = text_tokens();
    let long = &text[..200];
    let mut prompts = vec![long.to_vec(), long.to_vec(), [&long[..100], &text[300..350]].concat()];
    // Whole blocks, with and without one token more.
    prompts.extend([64, 64, 65].map(|len| text[500..500 + len].to_vec()));
    prompts.extend([long[..150].to_vec(), long.to_vec()]);
    let requests = prompts.into_iter().enumerate().map(|(index, prompt)| {
        let sampling =
            Sampling { seed: index as u64, temperature: [0.0, 0.9][index % 2], ..Sampling::default() };
        let logprobs = (index % 3 == 0).then_some(2);
        GenerateRequest { prompt, sampling, logprobs, ..request(1, 24) }
    });
    requests.collect()
}

#[test]
fn what_is_found_in_the_cache_is_what_would_be_computed() {
    for kv_cache_dtype in [kernels::KvCacheDtype::Bf16, kernels::KvCacheDtype::Mxint8] {
        // Heads of the bundled model are as wide as an MX block.
        let plain = EngineOptions { prefix_caching: false, kv_cache_dtype, ..options(200) };
        let cached = EngineOptions { prefix_caching: true, ..plain };
        let engine = start(plain);
        let expected: Vec<Heard> = related_requests().into_iter().map(|r| run(&engine, r)).collect();
        assert!(expected.iter().all(|heard| heard.cached_tokens == Some(0)));
        assert_eq!((engine.stats().prefix_cache_queries, engine.stats().prefix_cache_hits), (0, 0));

        for (name, options) in [
            ("roomy", cached),
            ("steps of 7 tokens", EngineOptions { max_num_batched_tokens: 7, ..cached }),
            ("little memory", EngineOptions { kv_cache: KvCacheSize::Blocks(15), ..cached }),
        ] {
            let engine = start(options);
            let heard: Vec<Heard> = related_requests().into_iter().map(|r| run(&engine, r)).collect();
            let hits: usize = heard.iter().map(|heard| heard.cached_tokens.unwrap_or(0)).sum();
            let queries: usize = related_requests().iter().map(|r| r.prompt.len()).sum();
            let stats = engine.stats();
            assert_eq!(
                (stats.prefix_cache_queries, stats.prefix_cache_hits),
                (queries as u64, hits as u64),
                "{name}"
            );
            if name != "little memory" {
                let found: Vec<_> = heard.iter().filter_map(|heard| heard.cached_tokens).collect();
                assert_eq!(found, [0, 192, 96, 0, 48, 64, 144, 192], "{name}");
            }
            assert!(hits > 0, "{name}");
            let heard: Vec<Heard> = heard.into_iter().map(Heard::but_for_the_cache).collect();
            assert_same(name, &expected, &heard);

            // All at once, twice: some find what others are still using, some what has ended, and some are preempted.
            for round in 0..2 {
                let channels = engine.submit_all(related_requests()).unwrap();
                let heard: Vec<Heard> = channels.into_iter().map(|c| hear(c).but_for_the_cache()).collect();
                assert_same(&format!("{name}, crowd {round}"), &expected, &heard);
            }
            assert_eq!(engine.stats().kv_blocks_used, 0, "{name}");
        }
    }
}

#[test]
fn the_next_turn_of_a_conversation_finds_question_and_answer() {
    let engine = start(options(64));
    let first = run(&engine, request(40, 40));
    let mut second = request(40, 4);
    second.prompt.extend(&first.tokens);
    second.prompt.extend(&text_tokens()[400..410]);
    // 79 tokens of the first turn were computed: its last one was drawn and not used.
    assert_eq!(run(&engine, second.clone()).cached_tokens, Some(64));
    // With another salt it finds nothing, nor does who wants the prompt scored; the text is the same.
    let expected = run(&engine, second.clone()).but_for_the_cache();
    let scheduling = Scheduling { cache_salt: Some("other".to_owned()), ..Scheduling::default() };
    let salted = run(&engine, GenerateRequest { scheduling, ..second.clone() });
    assert_eq!(salted.cached_tokens, Some(0));
    assert_eq!(salted, expected);
    let scored = run(&engine, GenerateRequest { prompt_logprobs: Some(1), ..second });
    assert_eq!((scored.cached_tokens, scored.prompt.map(|p| p.len())), (Some(0), Some(89)));
    assert_eq!(scored.tokens, expected.tokens);
}

#[test]
fn speculation_changes_nothing_but_the_number_of_steps() {
    let requests = || {
        let mut requests = mixed_requests();
        // What repeats itself is what is drafted.
        requests.extend((0..4).map(|index| {
            let phrase = &text_tokens()[50 * index..][..6 + index];
            let sampling = Sampling { seed: 7, temperature: [0.0, 0.6][index % 2], ..Sampling::default() };
            GenerateRequest { prompt: phrase.repeat(6), sampling, logprobs: Some(index), ..request(1, 90) }
        }));
        requests
    };
    let plain = start(options(200));
    let expected: Vec<Heard> = requests().into_iter().map(|request| run(&plain, request)).collect();
    assert_eq!(plain.stats().spec_decode_drafts, 0);
    let lookup = NgramLookup { num_speculative_tokens: 4, max: 3, min: 2 };
    let speculating = EngineOptions { speculation: Some(lookup), ..options(200) };
    for (name, options) in [
        ("roomy", speculating),
        ("steps of 7 tokens", EngineOptions { max_num_batched_tokens: 7, ..speculating }),
        ("little memory", EngineOptions { kv_cache: KvCacheSize::Blocks(14), ..speculating }),
    ] {
        let alone = start(options);
        let heard = requests().into_iter().map(|r| run(&alone, r).but_for_the_cache()).collect::<Vec<_>>();
        assert_same(name, &expected, &heard);
        let crowded = start(options);
        let channels = crowded.submit_all(requests()).unwrap();
        let heard: Vec<Heard> = channels.into_iter().map(|c| hear(c).but_for_the_cache()).collect();
        assert_same(&format!("{name}, a crowd"), &expected, &heard);
        let stats = crowded.stats();
        assert_eq!((stats.running, stats.waiting, stats.kv_blocks_used), (0, 0, 0), "{name}");

        let stats = alone.stats();
        assert!(stats.spec_decode_accepted_tokens <= stats.spec_decode_draft_tokens, "{name}: {stats:?}");
        assert!(stats.spec_decode_draft_tokens <= 4 * stats.spec_decode_drafts, "{name}: {stats:?}");
        assert_eq!(stats.generation_tokens, plain.stats().generation_tokens, "{name}");
        if name == "roomy" {
            let saved = plain.stats().steps - stats.steps;
            assert_eq!(saved, stats.spec_decode_accepted_tokens, "a step less for each token that was right");
            assert!(saved > 50, "{stats:?}");
        }
    }
}

#[test]
fn seeds_decide_what_is_drawn() {
    let engine = start(options(64));
    let draw = |seed| {
        let sampling = Sampling { seed, ..Sampling::default() };
        run(&engine, GenerateRequest { sampling, ..request(20, 30) }).tokens
    };
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
}

#[test]
fn generated_logprobs_are_those_of_the_same_tokens_as_a_prompt() {
    let engine = start(options(64));
    let generated = run(&engine, GenerateRequest { logprobs: Some(3), ..request(30, 25) });
    assert_eq!((generated.tokens.len(), generated.logprobs.len()), (25, 25));
    assert!(generated.logprobs.iter().all(|l| l.rank == 1 && l.top.len() == 3 && l.logprob == l.top[0].1));

    let mut again = GenerateRequest { prompt_logprobs: Some(3), ..request(30, 0) };
    again.prompt.extend(&generated.tokens);
    let scored = run(&engine, again);
    assert!(scored.tokens.is_empty());
    let usage = Usage { prompt_tokens: 55, cached_tokens: 0, completion_tokens: 0 };
    assert_eq!(scored.end, Some((FinishReason::Length, usage)));
    let scored = scored.prompt.expect("prompt log-probabilities were asked for");
    assert_eq!(scored.len(), 54);
    assert_eq!(scored[29..], generated.logprobs);
}

#[test]
fn a_prompt_that_is_preempted_halfway_is_scored_once() {
    let scored = GenerateRequest { prompt_logprobs: Some(2), ..request(120, 3) };
    let expected = run(&start(options(64)), scored.clone());
    assert_eq!(expected.prompt.as_ref().map(Vec::len), Some(119));

    // 3 tokens of the prompt a step; the other sequence needs its third block when some 50 are computed.
    let engine = start(EngineOptions { max_num_batched_tokens: 4, ..options(10) });
    let [older, younger] = engine.submit_all(vec![request(15, 25), scored]).unwrap().try_into().unwrap();
    assert_eq!(hear(older).tokens.len(), 25);
    assert_eq!(hear(younger), expected);
    assert_eq!(engine.stats().preemptions, 1);
}

#[test]
fn a_prompt_of_one_token_has_nothing_to_score() {
    let engine = start(options(64));
    let heard = run(&engine, GenerateRequest { prompt_logprobs: Some(1), ..request(1, 1) });
    assert_eq!((heard.prompt, heard.tokens.len()), (Some(vec![]), 1));
    assert_eq!(run(&engine, request(1, 0)).prompt, None);
}

#[test]
fn bias_masks_and_penalties_steer_the_output() {
    let engine = start(options(64));
    let steered = |sampling, stop: StopConditions| {
        let stop = StopConditions { max_tokens: 12, ..stop };
        run(&engine, GenerateRequest { sampling, stop, logprobs: Some(0), ..request(30, 12) })
    };
    let greedy = || Sampling { temperature: 0.0, ..Sampling::default() };
    let free = steered(greedy(), StopConditions::default());

    let forced = steered(Sampling { logit_bias: vec![(77, 1e4)], ..greedy() }, StopConditions::default());
    assert_eq!(forced.tokens, [77; 12]);
    assert!(forced.logprobs[0].rank > 1, "log-probabilities are the model's own");
    assert!(forced.logprobs[0].logprob < free.logprobs[0].logprob);

    let allowed = vec![100, 200, 300];
    let masked = steered(
        Sampling { allowed_token_ids: Some(allowed.clone()), temperature: 2.0, ..greedy() },
        StopConditions::default(),
    );
    assert!(masked.tokens.iter().all(|token| allowed.contains(token)), "{:?}", masked.tokens);

    let mut distinct =
        steered(Sampling { presence_penalty: 1e4, ..greedy() }, StopConditions::default()).tokens;
    distinct.sort_unstable();
    distinct.dedup();
    assert_eq!(distinct.len(), 12, "no token twice");

    let end = StopConditions { min_tokens: 5, eos_token_ids: vec![77], ..StopConditions::default() };
    let stopped = steered(Sampling { logit_bias: vec![(77, 1e4)], ..greedy() }, end);
    assert_eq!((stopped.tokens.len(), stopped.tokens[5]), (6, 77));
    assert!(!stopped.tokens[..5].contains(&77));
    assert_eq!(stopped.end.map(|(reason, _)| reason), Some(FinishReason::Eos));

    let at = StopConditions { stop_token_ids: vec![free.tokens[3]], ..StopConditions::default() };
    let cut = steered(greedy(), at);
    let first = free.tokens.iter().position(|token| *token == free.tokens[3]).unwrap();
    assert_eq!(cut.tokens, free.tokens[..=first]);
    assert_eq!(cut.end.map(|(reason, _)| reason), Some(FinishReason::StopToken(free.tokens[3])));
}

#[test]
fn the_context_ends_generation() {
    let engine = start(EngineOptions { max_model_len: Some(40), ..options(64) });
    let heard = run(&engine, request(30, usize::MAX));
    assert_eq!(heard.tokens.len(), 10);
    assert_eq!(heard.end.map(|(reason, _)| reason), Some(FinishReason::Length));
    assert_eq!(run(&engine, request(39, 5)).tokens.len(), 1);
    assert_eq!(run(&engine, request(40, 0)).tokens.len(), 0);
}

#[test]
fn a_pooled_prompt_does_not_depend_on_chunks_or_neighbours() {
    let pooled = |prompt_len, pooling| GenerateRequest { pooling: Some(pooling), ..request(prompt_len, 0) };
    let whole = start(EngineOptions { max_num_batched_tokens: 256, ..options(64) });
    let chunked = start(EngineOptions { max_num_batched_tokens: 7, ..options(64) });
    for pooling in [Pooling::Mean, Pooling::Last] {
        let alone = run(&whole, pooled(100, pooling)).embedding.expect("a vector was asked for");
        assert_eq!(alone.len(), 256);
        let others: Vec<_> =
            (1..6).map(|len| chunked.submit(request(len, 20)).expect("it is taken")).collect();
        assert_eq!(run(&chunked, pooled(100, pooling)).embedding, Some(alone.clone()));
        others.into_iter().for_each(|other| drop(hear(other)));
        assert_ne!(run(&whole, pooled(99, pooling)).embedding, Some(alone));
    }
    // The last token's state is the mean of a prompt of one token.
    assert_eq!(
        run(&whole, pooled(1, Pooling::Mean)).embedding,
        run(&whole, pooled(1, Pooling::Last)).embedding
    );
    assert_eq!(run(&whole, request(5, 0)).embedding, None);
}

//! Drafts.

use super::*;

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

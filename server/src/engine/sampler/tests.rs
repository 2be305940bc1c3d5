//! What is done to rows of logits, by tables.

use super::*;
use crate::engine::block_manager::BlockManager;
use crate::engine::request::{GenerateRequest, Scheduling, StopConditions};
use crate::engine::sequence::SequenceId;

/// A sequence with prompt 0, 1 and output 1, 2, 2.
fn sequence(sampling: Sampling, stop: StopConditions) -> Sequence {
    let stop = StopConditions { max_tokens: 100, ..stop };
    let (id, prompt) = (String::new(), vec![0, 1]);
    let scheduling = Scheduling::default();
    let request = GenerateRequest {
        id,
        prompt,
        sampling,
        stop,
        scheduling,
        logprobs: None,
        prompt_logprobs: None,
        pooling: None,
    };
    let mut sequence = Sequence::new(SequenceId(0), request, 100);
    for token in [1, 2, 2] {
        sequence.push(token);
    }
    sequence
}

#[test]
fn rows_are_processed_as_asked() {
    const NO: f32 = f32::NEG_INFINITY;
    let off = Sampling::default;
    let until = |min_tokens, eos: &[u32], stop: &[u32]| StopConditions {
        min_tokens,
        eos_token_ids: eos.to_vec(),
        stop_token_ids: stop.to_vec(),
        ..StopConditions::default()
    };
    let none = StopConditions::default;
    let cases: [(&str, Sampling, StopConditions, [f32; 4]); 15] = [
        (
            "presence: once for each generated token",
            Sampling { presence_penalty: 1.0, ..off() },
            none(),
            [4.0, 1.0, -3.0, 1.0],
        ),
        (
            "frequency: by occurrences",
            Sampling { frequency_penalty: 1.0, ..off() },
            none(),
            [4.0, 1.0, -4.0, 1.0],
        ),
        (
            "repetition: prompt and output, by sign",
            Sampling { repetition_penalty: 2.0, ..off() },
            none(),
            [2.0, 1.0, -4.0, 1.0],
        ),
        (
            "bias, ids out of range skipped",
            Sampling { logit_bias: vec![(3, 5.0), (9, 1.0)], ..off() },
            none(),
            [4.0, 2.0, -2.0, 6.0],
        ),
        (
            "bias before penalties",
            Sampling { logit_bias: vec![(2, 4.0)], repetition_penalty: 2.0, ..off() },
            none(),
            [2.0, 1.0, 1.0, 1.0],
        ),
        ("allowed", Sampling { allowed_token_ids: Some(vec![3, 1, 9]), ..off() }, none(), [NO, 2.0, NO, 1.0]),
        (
            "a bias does not allow",
            Sampling { allowed_token_ids: Some(vec![1]), logit_bias: vec![(0, 9.0)], ..off() },
            none(),
            [NO, 2.0, NO, NO],
        ),
        (
            "a bad word of one token",
            Sampling { bad_words: vec![vec![0]], ..off() },
            none(),
            [NO, 2.0, -2.0, 1.0],
        ),
        (
            "a bad word of several, where the others were said",
            Sampling { bad_words: vec![vec![2, 2, 3], vec![1, 2, 0], vec![0, 1, 1]], ..off() },
            none(),
            [4.0, 2.0, -2.0, NO],
        ),
        (
            "nothing but bad words",
            Sampling { bad_words: vec![vec![0], vec![1]], allowed_token_ids: Some(vec![0, 1]), ..off() },
            none(),
            [4.0, 2.0, NO, NO],
        ),
        ("too short to stop", off(), until(4, &[0], &[3]), [NO, 2.0, -2.0, NO]),
        ("long enough to stop", off(), until(3, &[0], &[3]), [4.0, 2.0, -2.0, 1.0]),
        (
            "only stop tokens are allowed",
            Sampling { allowed_token_ids: Some(vec![0]), ..off() },
            until(4, &[0], &[]),
            [4.0, NO, NO, NO],
        ),
        ("all of them stop", off(), until(4, &[0, 1, 2, 3], &[]), [4.0, 2.0, -2.0, 1.0]),
        ("nothing asked for", off(), none(), [4.0, 2.0, -2.0, 1.0]),
    ];
    for (name, sampling, stop, expected) in cases {
        let sequence = sequence(sampling, stop);
        let mut row = [4.0, 2.0, -2.0, 1.0];
        process(&sequence, None, &[4.0, 2.0, -2.0, 1.0], &mut row);
        assert_eq!(row, expected, "{name}");
        if !is_processed(&sequence) {
            assert_eq!(row, [4.0, 2.0, -2.0, 1.0], "{name}: a row that is left alone would not change");
        }
    }
}

#[test]
fn a_grammar_goes_before_everything_else() {
    const NO: f32 = f32::NEG_INFINITY;
    let raw = [4.0, 2.0, -2.0, 1.0];
    let processed = |sampling: Sampling| {
        let stop = StopConditions { min_tokens: 9, eos_token_ids: vec![3], ..StopConditions::default() };
        let mut row = raw;
        let mask = TokenMask::from_words(vec![0b1010]);
        process(&sequence(sampling, stop), Some(&mask), &raw, &mut row);
        row
    };
    assert_eq!(processed(Sampling::default()), [NO, 2.0, NO, NO], "too short to stop");
    let only = |ids: &[u32]| Sampling { allowed_token_ids: Some(ids.to_vec()), ..Sampling::default() };
    assert_eq!(processed(only(&[0, 1])), [NO, 2.0, NO, NO]);
    assert_eq!(processed(only(&[0, 2])), [NO, 2.0, NO, NO], "nothing would be left");
    assert_eq!(processed(only(&[3])), [NO, NO, NO, 1.0], "it must stop");
}

#[test]
fn the_draw_is_the_place_in_the_output() {
    let mut sequence = sequence(Sampling { seed: 11, ..Sampling::default() }, StopConditions::default());
    let drawn = params(&Draw { sequence: &sequence, ahead: 0 });
    assert_eq!((drawn.seed, drawn.draw), (11, 3));
    assert_eq!(params(&Draw { sequence: &sequence, ahead: 2 }).draw, 5);
    sequence.restart(&mut BlockManager::new(0));
    assert_eq!(params(&Draw { sequence: &sequence, ahead: 0 }).draw, 3);
}

//! Teacher-forced logits against Hugging Face Transformers, and that they do not depend on how the work is cut.

use crate::common::{Golden, Runner, blocks, max_error};
use kernels::Dtype;
use models::StepSequence;

#[test]
fn logits_match_transformers() {
    let cases = Golden::cases();
    assert!(cases.len() >= 9, "{cases:?}");
    for case in cases {
        let golden = Golden::read(&case);
        let table = blocks(golden.tokens.len());
        for (kv_dtype, tolerance) in [(Dtype::F32, 1e-4), (Dtype::Bf16, 0.05)] {
            let mut runner = Runner::load(&golden.dir, kv_dtype, table.len());
            let logits = runner.sequence(&golden.tokens, golden.tokens.len(), &table);
            let error = max_error(&logits, &golden.logits);
            assert!(error <= tolerance, "{case}, {kv_dtype:?} cache: off by {error} standard deviations");
        }
    }
}

#[test]
fn chunks_and_block_placement_change_no_bit() {
    for case in Golden::cases() {
        let golden = Golden::read(&case);
        for kv_dtype in [Dtype::F32, Dtype::Bf16] {
            let mut runner = Runner::load(&golden.dir, kv_dtype, 8);
            let whole = runner.sequence(&golden.tokens, golden.tokens.len(), &[0, 1, 2]);
            for (chunk, table) in [(1, [0, 1, 2]), (7, [5, 0, 7]), (16, [2, 1, 0]), (39, [7, 6, 3])] {
                let cut = runner.sequence(&golden.tokens, chunk, &table);
                assert!(whole == cut, "{case}, {kv_dtype:?} cache: chunks of {chunk} change the logits");
            }
        }
    }
}

#[test]
fn neighbours_in_the_batch_change_no_bit() {
    for case in Golden::cases() {
        let golden = Golden::read(&case);
        let mut runner = Runner::load(&golden.dir, Dtype::Bf16, 8);
        let vocab = runner.model.config().vocab_size;
        let (first, second) = (&golden.tokens[..23], &golden.tokens[23..]);
        let alone = [runner.sequence(first, 23, &[0, 1]), runner.sequence(second, 17, &[2, 3])];

        // A prefill of the second beside a chunk of the first, then one decode row of each.
        let start =
            runner.step(&[StepSequence { tokens: &first[..9], first_position: 0, block_table: &[6, 4] }]);
        let mixed = runner.step(&[
            StepSequence { tokens: &second[..16], first_position: 0, block_table: &[1, 7] },
            StepSequence { tokens: &first[9..22], first_position: 9, block_table: &[6, 4] },
        ]);
        let decode = runner.step(&[
            StepSequence { tokens: &first[22..], first_position: 22, block_table: &[6, 4] },
            StepSequence { tokens: &second[16..], first_position: 16, block_table: &[1, 7] },
        ]);
        let together = [
            [&start, &mixed[16 * vocab..], &decode[..vocab]].concat(),
            [&mixed[..16 * vocab], &decode[vocab..]].concat(),
        ];
        assert!(alone == together, "{case}: the batch changes the logits");
    }
}

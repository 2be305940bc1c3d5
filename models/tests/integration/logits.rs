//! Teacher-forced logits against Hugging Face Transformers, and that they do not depend on how the work is cut.

use kernels::KvCacheDtype;
use models::StepSequence;
use serde_json::json;

use crate::common::{Errors, Golden, Runner, blocks, with_config};

#[test]
fn logits_match_transformers() {
    let cases = Golden::cases();
    assert!(cases.len() >= 9, "{cases:?}");
    for case in cases {
        let golden = Golden::read(&case);
        let table = blocks(golden.tokens.len());
        let errors = |kv_dtype| {
            let mut runner = Runner::load(&golden.dir, kv_dtype, table.len());
            Errors::between(&runner.sequence(&golden.tokens, golden.tokens.len(), &table), &golden.logits)
        };
        let exact = errors(KvCacheDtype::F32);
        assert!(exact.max <= 3e-5, "{case}, F32 cache: {exact:?}");
        // Eight bits of keys and values, in the sharp attention of these models.
        let rounded = errors(KvCacheDtype::Bf16);
        assert!(rounded.rms <= 0.015, "{case}, BF16 cache: {rounded:?}");
    }
}

#[test]
fn the_logits_tell_what_the_config_says() {
    let plain_rope = json!({ "rope_type": "default", "rope_theta": 10000.0 });
    let quiet_yarn = json!({ "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "attention_factor": 1.0,
                             "original_max_position_embeddings": 32 });
    for (case, field, value) in [
        ("llama", "rms_norm_eps", json!(1e-3)),
        ("llama", "rope_parameters", json!({ "rope_theta": 9000.0 })),
        ("llama_biases", "attention_bias", json!(false)),
        ("llama_biases", "mlp_bias", json!(false)),
        ("llama_rope_linear", "rope_scaling", json!(null)),
        ("llama_rope_llama3", "rope_scaling", json!(null)),
        ("llama_rope_yarn", "rope_parameters", plain_rope),
        ("llama_rope_yarn", "rope_parameters", quiet_yarn),
        ("mistral_window", "sliding_window", json!(12)),
        ("mistral_window", "sliding_window", json!(null)),
        ("qwen2_window", "max_window_layers", json!(0)),
        ("qwen2_window", "use_sliding_window", json!(false)),
        ("qwen3", "architectures", json!(["LlamaForCausalLM"])),
    ] {
        let golden = Golden::read(case);
        let table = blocks(golden.tokens.len());
        let copy = with_config(case, |config| config[field] = value.clone());
        let mut runner = Runner::load(copy.path(), KvCacheDtype::F32, table.len());
        let logits = runner.sequence(&golden.tokens, golden.tokens.len(), &table);
        let errors = Errors::between(&logits, &golden.logits);
        assert!(errors.max > 3e-3, "{case} with {field} = {value} makes no difference: {errors:?}");
    }
}

#[test]
fn chunks_and_block_placement_change_no_bit() {
    for case in Golden::cases() {
        let golden = Golden::read(&case);
        for kv_dtype in [KvCacheDtype::F32, KvCacheDtype::Bf16] {
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
fn rows_that_are_no_outputs_change_no_bit() {
    for case in Golden::cases() {
        let golden = Golden::read(&case);
        let count = golden.tokens.len();
        let mut runner = Runner::load(&golden.dir, KvCacheDtype::Bf16, 8);
        let all = runner.sequence(&golden.tokens, count, &[0, 1, 2]);
        let some = runner.some_outputs(&golden.tokens, &[5, 0, 7]);
        assert!(runner.same_outputs(&all, count) == some, "{case}: the logits depend on which are wanted");
        // Nothing of it stays.
        assert!(runner.sequence(&golden.tokens, count, &[2, 1, 0]) == all, "{case}: the next step");
    }
}

#[test]
fn neighbours_in_the_batch_change_no_bit() {
    for case in Golden::cases() {
        let golden = Golden::read(&case);
        let mut runner = Runner::load(&golden.dir, KvCacheDtype::Bf16, 8);
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

//! Whole models on a GPU, held to the CPU backend. Without a GPU (or in a build without CUDA) they say that they are
//! skipped.

#![allow(clippy::print_stdout, reason = "a test that is skipped says so, and errors are worth reading")]

use std::path::{Path, PathBuf};

use kernels::mx::{Cast, ElementType, MxFormat, Rotation, Scheme};
use kernels::{Device, KvCacheDtype};
use models::StepSequence;

use crate::common::{Errors, Golden, Runner, blocks, data};
use crate::quantized::{in_a_layer, quantize};

const GPU: Device = Device::Cuda { ordinal: 0, strict: false };

/// Whether there is a GPU; says why not.
fn has_gpu() -> bool {
    match GPU.check() {
        Ok(()) => true,
        Err(error) => {
            println!("SKIPPED: {error}");
            false
        }
    }
}

/// Weights in every format, with every format that activations are declared in, and with rotated inputs.
fn schemes() -> Vec<Scheme> {
    let cast = |element| Cast::from(MxFormat::new(element));
    let weight_only =
        ElementType::ALL.map(|element| Scheme { weight: cast(element), activation: None, rotation: None });
    let both = [
        (ElementType::Int8, ElementType::Int8),
        (ElementType::E4m3, ElementType::E4m3),
        (ElementType::E4m3, ElementType::E5m2),
        (ElementType::E2m3, ElementType::E2m3),
        (ElementType::E2m1, ElementType::E4m3),
        (ElementType::E2m1, ElementType::E2m3),
        (ElementType::E2m1, ElementType::E3m2),
        (ElementType::E2m1, ElementType::E2m1),
        (ElementType::E2m1, ElementType::Int8),
    ];
    let both = both.map(|(w, a)| Scheme { weight: cast(w), activation: Some(cast(a)), rotation: None });
    let rotated = [None, Some(cast(ElementType::E2m3))].map(|activation| Scheme {
        weight: cast(ElementType::E2m1),
        activation,
        rotation: Some(Rotation::BlockHadamard),
    });
    weight_only.into_iter().chain(both).chain(rotated).collect()
}

/// The logits of `tokens` on both devices, a prompt in one step and the rest token by token; the errors of the GPU's.
fn compare(dir: &Path, tokens: &[u32], prompt: usize, dtype: KvCacheDtype) -> Errors {
    let table = blocks(tokens.len());
    let run = |device| {
        let mut runner = Runner::load_on(device, dir, dtype, table.len());
        let mut logits = runner.sequence(&tokens[..prompt], prompt, &table);
        for (position, token) in tokens.iter().enumerate().skip(prompt) {
            let token = std::slice::from_ref(token);
            let step = StepSequence { tokens: token, first_position: position, block_table: &table };
            logits.extend(runner.step(&[step]));
        }
        logits
    };
    Errors::between(&run(GPU), &run(Device::Cpu { threads: 8 }))
}

/// Rounding every activation to eight bits along the way, in models whose attention is made to be sharp.
const GOLDEN_RMS: f32 = 0.04;

#[test]
fn every_architecture_computes_what_the_cpu_does() {
    if !has_gpu() {
        return;
    }
    for case in Golden::cases() {
        let golden = Golden::read(&case);
        let errors = compare(&golden.dir, &golden.tokens, golden.tokens.len() - 8, KvCacheDtype::Bf16);
        println!("{case}: {errors:?}");
        assert!(errors.rms <= GOLDEN_RMS, "{case}: {errors:?}");
    }
}

#[test]
fn every_scheme_computes_what_the_cpu_does() {
    if !has_gpu() {
        return;
    }
    check_schemes(&data("models/rustdoc-6m"), &some_tokens(), 1.0);
}

/// As above for the unquantized model in the folder `MX_TEST_MODEL`, on a text of its own making.
#[test]
fn every_scheme_of_a_given_model_computes_what_the_cpu_does() {
    let Some(model) = std::env::var_os("MX_TEST_MODEL").map(PathBuf::from) else {
        println!("SKIPPED: no MX_TEST_MODEL");
        return;
    };
    if has_gpu() {
        // The difference grows with the layers that it goes through.
        check_schemes(&model, &greedy_text(&model, &[1, 504, 3575, 282], 300), 3.0);
    }
}

/// Holds every scheme to a bound, `factor` times that of a model of six layers; prints all errors before it fails.
fn check_schemes(model: &Path, tokens: &[u32], factor: f32) {
    let mut too_large = Vec::new();
    for scheme in schemes() {
        let quantized = quantize(model, |module| in_a_layer(module).then_some(scheme));
        let errors = compare(quantized.path(), tokens, tokens.len() - 20, KvCacheDtype::Bf16);
        println!("{scheme}: {errors:?}");
        // Of declared activations, some fall to the other side of a rounding boundary: the further, the fewer bits their
        // format has.
        let bits = |cast: Cast| f32::from(cast.format.element.spec().mantissa_bits as u8);
        let bound = scheme.activation.map_or(0.02, |cast| (0.6 * (-bits(cast)).exp2()).max(0.03));
        if errors.rms > bound * factor {
            too_large.push((scheme.to_string(), errors.rms));
        }
    }
    assert!(too_large.is_empty(), "{too_large:?}");
}

/// Few rows of the last layer go through other kernels than all of them, which add up in another order.
#[test]
fn outputs_are_those_of_a_step_of_all_rows() {
    if !has_gpu() {
        return;
    }
    let (tokens, model) = (some_tokens(), data("models/rustdoc-6m"));
    for scheme in schemes() {
        let quantized = quantize(&model, |module| in_a_layer(module).then_some(scheme));
        let table = blocks(tokens.len());
        let mut runner = Runner::load_on(GPU, quantized.path(), KvCacheDtype::Bf16, table.len());
        let all = runner.sequence(&tokens, tokens.len(), &table);
        let some = runner.some_outputs(&tokens, &table);
        let errors = Errors::between(&some, &runner.same_outputs(&all, tokens.len()));
        println!("{scheme}: {errors:?}");
        assert!(errors.rms <= 0.03, "{scheme}: {errors:?}");
        assert!(runner.sequence(&tokens, tokens.len(), &table) == all, "{scheme}: the next step");
    }
}

/// Keys that lie within a rounding error of the border of two codes may fall to either side of it.
#[test]
fn every_kv_cache_computes_what_the_cpu_does() {
    if !has_gpu() {
        return;
    }
    for (dtype, bound) in [(KvCacheDtype::Mxfp8, 0.03), (KvCacheDtype::Mxint8, 0.03)] {
        let errors = compare(&data("models/rustdoc-6m"), &some_tokens(), 280, dtype);
        println!("{dtype}: {errors:?}");
        assert!(errors.rms <= bound, "{dtype}: {errors:?}");
    }
}

fn some_tokens() -> Vec<u32> {
    (0..300).map(|i| (i * i * 7 + i * 13) % 2000 + 5).collect()
}

/// `prompt` and the most likely tokens after it, `len` in all.
fn greedy_text(model: &Path, prompt: &[u32], len: usize) -> Vec<u32> {
    let table = blocks(len);
    let mut runner = Runner::load_on(GPU, model, KvCacheDtype::Bf16, table.len());
    let vocab = runner.model.config().vocab_size;
    let mut tokens = prompt.to_vec();
    let mut logits = runner.sequence(prompt, prompt.len(), &table);
    while tokens.len() < len {
        let last = &logits[logits.len() - vocab..];
        // Without the end of a text, and anything else that is said before a text begins.
        let next = (3..vocab).max_by(|&a, &b| last[a].total_cmp(&last[b])).expect("a vocabulary");
        let position = tokens.len();
        tokens.push(next as u32);
        let step =
            StepSequence { tokens: &tokens[position..], first_position: position, block_table: &table };
        logits = runner.step(&[step]);
    }
    tokens
}

#[test]
fn recorded_steps_neighbours_and_repetition_change_no_bit() {
    if !has_gpu() {
        return;
    }
    for case in Golden::cases() {
        let golden = Golden::read(&case);
        let mut runner = Runner::load_on(GPU, &golden.dir, KvCacheDtype::Bf16, 8);
        let vocab = runner.model.config().vocab_size;
        let (first, second) = (&golden.tokens[..23], &golden.tokens[23..]);
        let [last, end] = [first.len() - 1, second.len() - 1];
        runner.sequence(&first[..last], last, &[0, 1]);
        runner.sequence(&second[..end], end, &[2, 3]);
        let of_first = StepSequence { tokens: &first[last..], first_position: last, block_table: &[0, 1] };
        let of_second = StepSequence { tokens: &second[end..], first_position: end, block_table: &[2, 3] };
        let alone = [runner.step(&[of_first]), runner.step(&[of_second])].concat();
        assert!(alone == [runner.step(&[of_first]), runner.step(&[of_second])].concat(), "{case}: again");
        let together = runner.step(&[of_second, of_first]);
        assert!(
            alone[..vocab] == together[vocab..] && alone[vocab..] == together[..vocab],
            "{case}: together"
        );
        assert!(alone == runner.replayed_step(&[of_first, of_second]), "{case}: replayed");
    }
}

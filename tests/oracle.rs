//! The whole model against an independent implementation: candle-transformers' Llama.

use candle_core::{DType, Device as CandleDevice, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::{Cache, Config, Llama, LlamaEosToks};
use kernels::{Device, KvCacheDtype};
use models::checkpoint::Checkpoint;
use models::{KvCache, OutputRows, StepInputs, StepSequence, Workspace};

use crate::common::{heldout_windows, rustdoc};

/// Logits of the last token by candle, in F32.
fn candle_logits(tokens: &[u32]) -> Vec<f32> {
    let device = CandleDevice::Cpu;
    let tensors =
        candle_core::safetensors::load(rustdoc().join("model.safetensors"), &device).expect("weights");
    let builder = VarBuilder::from_tensors(tensors, DType::F32, &device);
    let config = Config {
        hidden_size: 256,
        intermediate_size: 768,
        vocab_size: 4096,
        num_hidden_layers: 6,
        num_attention_heads: 8,
        num_key_value_heads: 4,
        use_flash_attn: false,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        bos_token_id: None,
        eos_token_id: Some(LlamaEosToks::Single(0)),
        rope_scaling: None,
        max_position_embeddings: 1024,
        tie_word_embeddings: true,
    };
    let model = Llama::load(builder, &config).expect("the model");
    let mut cache = Cache::new(false, DType::F32, &config, &device).expect("a cache");
    let input = Tensor::new(tokens, &device).and_then(|t| t.unsqueeze(0)).expect("tokens");
    let logits = model.forward(&input, 0, &mut cache).expect("logits");
    logits.flatten_all().and_then(|l| l.to_vec1()).expect("numbers")
}

fn our_logits(tokens: &[u32]) -> Vec<f32> {
    let backend = kernels::open(Device::Cpu { threads: 2 }).expect("the CPU");
    let model =
        models::load(&*backend, &Checkpoint::open(&rustdoc()).expect("the checkpoint")).expect("the model");
    let config = model.config();
    let blocks: Vec<u32> = (0..16).collect();
    let mut step = StepInputs::new(&*backend, 256, 1, 16).expect("memory");
    let mut kv = KvCache::new(&*backend, config, 16, KvCacheDtype::F32).expect("memory");
    let mut workspace = Workspace::new(&*backend, &*model, 256, 1).expect("memory");
    let sequence = StepSequence { tokens, first_position: 0, block_table: &blocks };
    step.fill(&*backend, &[sequence], OutputRows::Only(&[tokens.len() as u32 - 1]));
    model.forward(&*backend, &step, &mut kv, &mut workspace);
    model.logits(&*backend, &[0], &mut workspace);
    let mut logits = vec![0.0; config.vocab_size];
    backend.read_f32(workspace.logits(), 0, &mut logits);
    logits
}

#[test]
fn logits_are_those_of_candle() {
    for (window, len) in heldout_windows(3).iter().zip([1, 37, 200]) {
        let (ours, theirs) = (our_logits(&window[..len]), candle_logits(&window[..len]));
        let scale = theirs.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
        let error = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(error < 1e-4 * scale, "{len} tokens: {error} of {scale}");
    }
}

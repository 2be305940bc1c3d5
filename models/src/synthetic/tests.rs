//! Synthetic models against their shapes.

use kernels::{Device, KvCacheDtype};
use serde_json::json;

use super::*;
use crate::{KvCache, OutputRows, StepInputs, StepSequence, Workspace};

fn scheme(name: &str) -> Option<Scheme> {
    Some(name.parse().unwrap())
}

#[test]
fn every_shape_is_a_model_config() {
    // Parameters as published, heads counted once where they are tied.
    let published = [134_515_008, 1_235_814_400, 4_022_468_096, 8_030_261_248];
    for (shape, expected) in Shape::ALL.iter().zip(published) {
        assert_eq!(parameters(&ModelConfig::parse(&shape.config()).unwrap()), expected, "{}", shape.name);
        assert_eq!(shape.name.parse(), Ok(*shape));
    }
    assert!("llama-9b".parse::<Shape>().unwrap_err().to_string().contains("llama-70b-tp8"));
}

/// Counted from the sizes alone.
fn parameters(config: &ModelConfig) -> usize {
    let (hidden, heads) = (config.hidden_size, config.heads);
    let attention = hidden * heads.qkv_width() + heads.q_width() * hidden;
    let head_norms = if config.qk_norm { 2 * heads.dim } else { 0 };
    let layer = attention + 3 * hidden * config.intermediate_size + 2 * hidden + head_norms;
    let tables = if config.tie_word_embeddings { 1 } else { 2 };
    config.num_layers * layer + hidden + tables * config.vocab_size * hidden
}

#[test]
fn weights_are_in_the_formats_asked_for_and_logits_are_finite() {
    let backend = kernels::open(Device::Cpu { threads: 1 }).unwrap();
    let mut config = "smollm2-135m".parse::<Shape>().unwrap().config();
    config["num_hidden_layers"] = json!(2);
    config["vocab_size"] = json!(512);
    for (linears, head) in [
        (None, None),
        (scheme("mxfp4:mxint8"), scheme("mxint8")),
        (scheme("mxfp6"), None),
        (scheme("mxfp8_e5m2"), scheme("mxfp6:mxfp6")),
    ] {
        let model = load(backend.as_ref(), &config, Formats { linears, head }).unwrap();
        let info = model.linear_info();
        let (of_head, of_layers) = info.split_last().unwrap();
        assert_eq!((of_head.group.as_str(), of_head.scheme), ("lm_head", head));
        assert!(of_layers.iter().all(|info| info.scheme == linears && info.layers == 2), "{info:?}");

        let logits = logits(backend.as_ref(), model.as_ref());
        let spread = logits.iter().copied().fold(0.0, |most: f32, x| most.max(x.abs()));
        assert!(logits.iter().all(|x| x.is_finite()) && spread > 0.01, "{linears:?}: up to {spread}");
    }
}

fn logits(backend: &dyn Backend, model: &dyn Model) -> Vec<f32> {
    let config = model.config();
    let mut kv = KvCache::new(backend, config, 1, KvCacheDtype::F32).unwrap();
    let mut step = StepInputs::new(backend, 4, 1, 1).unwrap();
    let mut workspace = Workspace::new(backend, model, 4, 1).unwrap();
    let sequence = StepSequence { tokens: &[1, 2, 3, 4], first_position: 0, block_table: &[0] };
    step.fill(backend, &[sequence], OutputRows::All);
    model.forward(backend, &step, &mut kv, &mut workspace);
    model.logits(backend, &[3], &mut workspace);
    let mut logits = vec![0.0; config.vocab_size];
    backend.read_f32(workspace.logits(), 0, &mut logits);
    logits
}

#[test]
fn a_block_that_does_not_fit_is_an_error() {
    let backend = kernels::open(Device::Cpu { threads: 1 }).unwrap();
    let mut config = "smollm2-135m".parse::<Shape>().unwrap().config();
    config["intermediate_size"] = json!(1500);
    let formats = Formats { linears: scheme("mxfp4"), head: None };
    let error = load(backend.as_ref(), &config, formats).err().unwrap().to_string();
    assert!(error.contains("down_proj") && error.contains("1500"), "{error}");
}

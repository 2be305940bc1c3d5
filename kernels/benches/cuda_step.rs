//! The layers of a decode step and of a prompt's on a GPU, recorded as a server records decode steps: time per layer, and
//! what each kind of operator adds to it. Operators overlap with their neighbours, so that the parts are found by leaving
//! each out.
//!
//! `cargo bench -p kernels --features cuda --bench cuda_step [-- SCHEME…]`

#![allow(clippy::print_stdout, reason = "a benchmark prints its results")]

mod synthetic;

use std::iter::once;
use std::time::Instant;

use kernels::mx::Scheme;
use kernels::{
    AttentionInputs, Backend, Buffer, Component, Device, Dtype, Heads, HostSpans, KV_BLOCK_TOKENS,
    KvCacheDtype, PagedKv, Weight,
};

use synthetic::{noise, upload};

/// Llama-3.1-8B.
const HEADS: Heads = Heads { q: 32, kv: 8, dim: 128 };
const HIDDEN: usize = 4096;
const INTERMEDIATE: usize = 14_336;

/// Layers with weights of their own, enough that no cache holds them.
const LAYERS: usize = 8;

/// Steps that are timed: sequences, rows of each, and tokens in each one's cache.
const STEPS: [[usize; 3]; 6] =
    [[1, 1, 256], [8, 1, 256], [16, 1, 256], [64, 1, 256], [256, 1, 256], [2, 4096, 4096]];

/// Times that are taken, and replays between two looks at the clock: of decode steps, and of prompts.
const SAMPLES: usize = 9;
const REPLAYS: [usize; 2] = [20, 2];

/// Kinds of operators that can be left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Norms,
    Rope,
    Attention,
    Products,
}

const PARTS: [Part; 4] = [Part::Norms, Part::Rope, Part::Attention, Part::Products];

fn main() {
    let device = Device::Cuda { ordinal: 0, strict: false };
    if let Err(error) = device.check() {
        println!("SKIPPED: {error}");
        return;
    }
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let schemes = if wanted.is_empty() { vec!["mxfp4".to_owned(), "w4a8".to_owned()] } else { wanted };
    println!(
        "scheme   rows        us per layer; us less without an operator: {PARTS:?}; us in replays one by one"
    );
    for label in schemes {
        let scheme: Scheme = label.parse().expect("a scheme");
        let gpu = kernels::open(device).expect("the device opens");
        let layers: Vec<Layer> = (0..LAYERS).map(|seed| Layer::new(gpu.as_ref(), scheme, seed)).collect();
        for sizes in STEPS {
            let mut step = Step::new(gpu.as_ref(), sizes);
            let rows = step.rows;
            let (all, waited) = step.time(&layers, &PARTS);
            let parts: Vec<String> = PARTS
                .iter()
                .map(|&part| {
                    let others: Vec<Part> = PARTS.into_iter().filter(|&other| other != part).collect();
                    format!("{:6.1}", all - step.time(&layers, &others).0)
                })
                .collect();
            println!("{label:8} {rows:4} {all:8.1}   {}   {waited:8.1}", parts.join(" "));
        }
    }
}

/// The weights of a decoder layer.
struct Layer {
    qkv: Weight,
    output: Weight,
    gate_up: Weight,
    down: Weight,
    norm: Buffer,
}

impl Layer {
    fn new(gpu: &dyn Backend, scheme: Scheme, seed: usize) -> Self {
        let upload = |shape, part| upload(gpu, shape, Some(scheme), seed * 4 + part, part == 2);
        Self {
            qkv: upload([HEADS.qkv_width(), HIDDEN], 0),
            output: upload([HIDDEN, HEADS.q_width()], 1),
            gate_up: upload([2 * INTERMEDIATE, HIDDEN], 2),
            down: upload([HIDDEN, INTERMEDIATE], 3),
            norm: {
                let mut norm = gpu.alloc(Dtype::F32, HIDDEN, Component::Unquantized).expect("memory");
                gpu.write_f32(&mut norm, 0, &vec![1.0; HIDDEN]);
                norm
            },
        }
    }
}

/// Inputs, activations and cache of a step of `rows` sequences.
struct Step<'a> {
    gpu: &'a dyn Backend,
    rows: usize,
    sequences: usize,
    context: usize,
    slots: Buffer,
    starts: Vec<u32>,
    contexts: Vec<u32>,
    query_start: Buffer,
    context_lens: Buffer,
    block_tables: Buffer,
    caches: Vec<PagedKv>,
    rope: Buffer,
    residual: Buffer,
    normed: Buffer,
    delta: Buffer,
    qkv: Buffer,
    attention: Buffer,
    gate_up: Buffer,
    activated: Buffer,
}

impl<'a> Step<'a> {
    fn new(gpu: &'a dyn Backend, [sequences, each, context]: [usize; 3]) -> Self {
        let (rows, blocks) = (sequences * each, context / KV_BLOCK_TOKENS);
        let integers = |values: Vec<u32>| {
            let mut buffer = gpu.alloc(Dtype::U32, values.len(), Component::Workspace).expect("memory");
            gpu.write_u32(&mut buffer, 0, &values);
            buffer
        };
        let floats = |dtype, width: usize| {
            let mut buffer = gpu.alloc(dtype, rows * width, Component::Workspace).expect("memory");
            gpu.write_f32(&mut buffer, 0, &noise(rows * width, 1.0, 3));
            buffer
        };
        // The last ones of the sequence's context.
        let slot = |row: usize| ((row / each + 1) * context - each + row % each) as u32;
        let starts: Vec<u32> = (0..=sequences).map(|sequence| (sequence * each) as u32).collect();
        let contexts = vec![context as u32; sequences];
        let cache = |_| gpu.alloc_kv(sequences * blocks, HEADS, KvCacheDtype::Bf16).expect("memory");
        Self {
            gpu,
            rows,
            sequences,
            context,
            slots: integers((0..rows).map(slot).collect()),
            query_start: integers(starts.clone()),
            context_lens: integers(contexts.clone()),
            starts,
            contexts,
            block_tables: integers((0..(sequences * blocks) as u32).collect()),
            caches: (0..LAYERS).map(cache).collect(),
            rope: floats(Dtype::F32, HEADS.dim),
            residual: floats(Dtype::F32, HIDDEN),
            normed: floats(Dtype::Bf16, HIDDEN),
            delta: floats(Dtype::Bf16, HIDDEN),
            qkv: floats(Dtype::Bf16, HEADS.qkv_width()),
            attention: floats(Dtype::Bf16, HEADS.q_width()),
            gate_up: floats(Dtype::Bf16, 2 * INTERMEDIATE),
            activated: floats(Dtype::Bf16, INTERMEDIATE),
        }
    }

    /// The operators of one layer that are of `parts`.
    fn layer(&mut self, layer: &Layer, index: usize, parts: &[Part]) {
        let Self { gpu, rows, sequences, context, .. } = *self;
        let has = |part| parts.contains(&part);
        let form = |weight| gpu.input_form(&mut once(weight), rows);
        let norm = |step: &mut Self, form| {
            gpu.add_rms_norm(
                &step.delta,
                &mut step.residual,
                &layer.norm,
                1e-5,
                rows,
                form,
                &mut step.normed,
            );
        };
        if has(Part::Norms) {
            norm(self, form(&layer.qkv));
        }
        if has(Part::Products) {
            gpu.linear(&self.normed, rows, &layer.qkv, &mut self.qkv, HEADS.qkv_width(), 0);
        }
        let cache = &mut self.caches[index];
        if has(Part::Rope) {
            gpu.rope_and_cache(&mut self.qkv, HEADS, &self.rope, None, &self.slots, rows, cache);
        }
        if has(Part::Attention) {
            let inputs = AttentionInputs {
                rows,
                sequences,
                query_start: &self.query_start,
                context_lens: &self.context_lens,
                block_tables: &self.block_tables,
                max_blocks: context / KV_BLOCK_TOKENS,
                host: HostSpans { query_start: &self.starts, context_lens: &self.contexts },
            };
            let form = form(&layer.output);
            gpu.paged_attention(&self.qkv, HEADS, 0.088, None, &inputs, cache, form, &mut self.attention);
        }
        if has(Part::Products) {
            gpu.linear(&self.attention, rows, &layer.output, &mut self.delta, HIDDEN, 0);
        }
        if has(Part::Norms) {
            norm(self, form(&layer.gate_up));
        }
        if has(Part::Products) {
            let Self { normed, gate_up, activated, .. } = self;
            gpu.gated_linear(normed, rows, &layer.gate_up, gate_up, form(&layer.down), activated);
            gpu.linear(&self.activated, rows, &layer.down, &mut self.delta, HIDDEN, 0);
        }
    }

    /// Median microseconds of a layer: in replays one after the other, and in replays that are each waited for.
    fn time(&mut self, layers: &[Layer], parts: &[Part]) -> (f64, f64) {
        let gpu = self.gpu;
        let mut all = || (0..LAYERS).for_each(|index| self.layer(&layers[index], index, parts));
        all();
        let graph = gpu.capture(&mut all);
        let marker = gpu.alloc(Dtype::U32, 1, Component::Workspace).expect("memory");
        let wait = || gpu.read_u32(&marker, 0, &mut [0]);
        let sample = |replays: usize| {
            wait();
            let start = Instant::now();
            (0..replays).for_each(|_| gpu.replay(&graph));
            wait();
            start.elapsed().as_secs_f64() / (replays * LAYERS) as f64 * 1e6
        };
        let median = |replays: usize| {
            sample(replays);
            let mut times: Vec<f64> = (0..SAMPLES).map(|_| sample(replays)).collect();
            times.sort_by(f64::total_cmp);
            times[SAMPLES / 2]
        };
        (median(REPLAYS[usize::from(self.rows > self.sequences)]), median(1))
    }
}

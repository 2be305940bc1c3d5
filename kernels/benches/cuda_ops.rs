//! Every operator but weight products on a GPU, alone in a recorded step: time, and bytes or operations per second.
//!
//! Attention takes caches in turn that do not fit in the L2 cache together; the small row operators find their inputs there,
//! as they do in a model. The median of several replays.
//!
//! `cargo bench -p kernels --features cuda --bench cuda_ops [-- FAMILY|KV_CACHE_DTYPE…]`

#![allow(clippy::print_stdout, reason = "a benchmark prints its results")]

mod synthetic;

use std::time::Instant;

use kernels::{
    AttentionInputs, Backend, Buffer, Component, Device, Dtype, Heads, HostSpans, InputForm, KV_BLOCK_TOKENS,
    KvCacheDtype, PagedKv, SampleParams, open,
};

use synthetic::noise;

/// Llama-3.1-8B.
const HEADS: Heads = Heads { q: 32, kv: 8, dim: 128 };
const HIDDEN: usize = 4096;
const INTERMEDIATE: usize = 14_336;
const VOCABULARY: usize = 128_256;

/// Bytes of a cache that no L2 holds.
const UNCACHED_BYTES: usize = 256 << 20;

/// Times that are taken, replays between two looks at the clock, and operators in a replay.
const SAMPLES: usize = 9;
const REPLAYS: usize = 10;
const LAUNCHES: usize = 16;

/// Measures the operators of one family.
type Family = fn(&dyn Backend, KvCacheDtype);

fn main() {
    let device = Device::Cuda { ordinal: 0, strict: false };
    if let Err(error) = device.check() {
        println!("SKIPPED: {error}");
        return;
    }
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let gpu = open(device).expect("the device opens");
    let (dtypes, wanted): (Vec<_>, Vec<_>) =
        wanted.into_iter().partition(|w| w.parse::<KvCacheDtype>().is_ok());
    let mut dtypes: Vec<KvCacheDtype> = dtypes.iter().filter_map(|name| name.parse().ok()).collect();
    if dtypes.is_empty() {
        dtypes.push(KvCacheDtype::Bf16);
    }
    println!("{}", gpu.description());
    let families: [(&str, Family); 4] =
        [("decode", decode), ("prefill", prefill), ("rows", rows), ("sample", sample)];
    for (name, family) in families {
        if wanted.is_empty() || wanted.iter().any(|w| w == name) {
            for &dtype in &dtypes {
                println!("{name}, {dtype} cache");
                family(gpu.as_ref(), dtype);
            }
        }
    }
}

/// Attention of one new row per sequence.
fn decode(gpu: &dyn Backend, dtype: KvCacheDtype) {
    let same = |sequences: usize, context: usize| vec![context; sequences];
    let mut ragged = same(63, 1024);
    ragged.push(32_768);
    for contexts in [
        same(1, 128),
        same(1, 1024),
        same(1, 8192),
        same(1, 32_768),
        same(8, 1024),
        same(16, 1024),
        same(64, 1024),
        same(256, 512),
        same(64, 8192),
        ragged,
    ] {
        let token_bytes = gpu.kv_block_bytes(HEADS, dtype).expect("a supported cache") / KV_BLOCK_TOKENS;
        let bytes = contexts.iter().sum::<usize>() * token_bytes;
        let rows = vec![1; contexts.len()];
        let secs = attention(gpu, dtype, &rows, &contexts, UNCACHED_BYTES.div_ceil(bytes).clamp(1, LAUNCHES));
        let longest = contexts.iter().max().unwrap_or(&0);
        let label = format!("decode {} x {longest}", contexts.len());
        println!("{label:24} {:9.2} us {:8.0} GB/s", secs * 1e6, bytes as f64 / secs / 1e9);
    }
}

/// Attention of whole prompts.
fn prefill(gpu: &dyn Backend, dtype: KvCacheDtype) {
    for (sequences, len) in [(1, 1024), (1, 4096), (8, 512), (8, 4000), (1, 16_384)] {
        let lens = vec![len; sequences];
        let secs = attention(gpu, dtype, &lens, &lens, 1);
        let operations = 2.0 * (sequences * len * len * HEADS.q_width()) as f64;
        let label = format!("prefill {sequences} x {len}");
        println!("{label:24} {:9.2} us {:8.1} TFLOP/s", secs * 1e6, operations / secs / 1e12);
    }
}

/// Seconds of attention of `rows[s]` rows at the ends of contexts, over `caches` caches in turn.
fn attention(
    gpu: &dyn Backend,
    dtype: KvCacheDtype,
    rows: &[usize],
    contexts: &[usize],
    caches: usize,
) -> f64 {
    let blocks: Vec<usize> = contexts.iter().map(|c| c.div_ceil(KV_BLOCK_TOKENS)).collect();
    let max_blocks = blocks.iter().copied().max().unwrap_or(1);
    let total: usize = blocks.iter().sum();
    let (mut tables, mut next) = (Vec::new(), 0);
    for &count in &blocks {
        // Neighbours in a sequence are not neighbours in the cache.
        tables.extend((0..count).map(|i| ((next + i) * 7919 % total) as u32));
        tables.resize(tables.len().next_multiple_of(max_blocks), 0);
        next += count;
    }
    let mut starts = vec![0];
    starts.extend(rows.iter().scan(0, |sum, &rows| {
        *sum += rows as u32;
        Some(*sum)
    }));
    let contexts: Vec<u32> = contexts.iter().map(|&c| c as u32).collect();
    let all: usize = rows.iter().sum();
    let caches: Vec<PagedKv> =
        (0..caches).map(|_| gpu.alloc_kv(total, HEADS, dtype).expect("memory")).collect();
    let qkv = activations(gpu, all * HEADS.qkv_width());
    let mut out = activations(gpu, all * HEADS.q_width());
    let inputs = AttentionInputs {
        rows: all,
        sequences: rows.len(),
        query_start: &integers(gpu, &starts),
        context_lens: &integers(gpu, &contexts),
        block_tables: &integers(gpu, &tables),
        max_blocks,
        host: HostSpans { query_start: &starts, context_lens: &contexts },
    };
    time(gpu, &mut |i| {
        gpu.paged_attention(
            &qkv,
            HEADS,
            0.088,
            None,
            &inputs,
            &caches[i % caches.len()],
            InputForm::Plain,
            &mut out,
        );
    })
}

/// Norm, RoPE, SwiGLU.
fn rows(gpu: &dyn Backend, dtype: KvCacheDtype) {
    let weight = gpu.alloc(Dtype::F32, HIDDEN, Component::Workspace).expect("memory");
    for rows in [1, 16, 64, 256, 1024, 8192] {
        let report = |label: &str, secs: f64, bytes: usize| {
            let label = format!("{label}, {rows} rows");
            println!("{label:24} {:9.2} us {:8.0} GB/s", secs * 1e6, bytes as f64 / secs / 1e9);
        };
        let delta = activations(gpu, rows * HIDDEN);
        let mut normed = activations(gpu, rows * HIDDEN);
        let mut residual = gpu.alloc(Dtype::F32, rows * HIDDEN, Component::Workspace).expect("memory");
        let secs = time(gpu, &mut |_| {
            gpu.add_rms_norm(&delta, &mut residual, &weight, 1e-5, rows, InputForm::Plain, &mut normed);
        });
        report("add_rms_norm", secs, rows * HIDDEN * 12);

        let mut qkv = activations(gpu, rows * HEADS.qkv_width());
        let rope = gpu.alloc(Dtype::F32, rows * HEADS.dim, Component::Workspace).expect("memory");
        let slots = integers(gpu, &(0..rows as u32).collect::<Vec<_>>());
        let blocks = rows.div_ceil(KV_BLOCK_TOKENS);
        let mut cache = gpu.alloc_kv(blocks, HEADS, dtype).expect("memory");
        let secs = time(gpu, &mut |_| {
            gpu.rope_and_cache(&mut qkv, HEADS, &rope, None, &slots, rows, &mut cache);
        });
        report("rope_and_cache", secs, rows * HEADS.qkv_width() * 4);

        let gate_up = activations(gpu, rows * 2 * INTERMEDIATE);
        let mut activated = activations(gpu, rows * INTERMEDIATE);
        let secs = time(gpu, &mut |_| gpu.silu_mul(&gate_up, rows, INTERMEDIATE, &mut activated));
        report("silu_mul", secs, rows * INTERMEDIATE * 6);
    }
}

/// Drawing tokens.
fn sample(gpu: &dyn Backend, _: KvCacheDtype) {
    let greedy = SampleParams { temperature: 0.0, top_k: None, top_p: 1.0, min_p: 0.0, seed: 1, draw: 0 };
    let warm = SampleParams { temperature: 1.0, ..greedy };
    let kinds = [
        ("greedy", greedy),
        ("temperature", warm),
        ("top-k 50", SampleParams { top_k: Some(50), ..warm }),
        ("top-p 0.95", SampleParams { top_p: 0.95, ..warm }),
    ];
    for rows in [1, 16, 64] {
        let mut logits = gpu.alloc(Dtype::F32, rows * VOCABULARY, Component::Workspace).expect("memory");
        gpu.write_f32(&mut logits, 0, &noise(rows * VOCABULARY, 5.0, 1));
        let mut out = gpu.alloc(Dtype::U32, rows, Component::Workspace).expect("memory");
        for (name, params) in kinds {
            // Parameters come from the host: not recorded.
            let params = vec![params; rows];
            let step = &mut |_| gpu.sample(&logits, VOCABULARY, &params, &mut out);
            let secs = median(gpu, || (0..LAUNCHES * REPLAYS).for_each(&mut *step)) / LAUNCHES as f64;
            let label = format!("{name}, {rows} rows");
            println!("{label:24} {:9.2} us", secs * 1e6);
        }
    }
}

/// Median seconds of one of the operators that `step` launches, recorded.
fn time(gpu: &dyn Backend, step: &mut dyn FnMut(usize)) -> f64 {
    let mut all = || (0..LAUNCHES).for_each(&mut *step);
    all();
    let graph = gpu.capture(&mut all);
    median(gpu, || (0..REPLAYS).for_each(|_| gpu.replay(&graph))) / LAUNCHES as f64
}

/// Median seconds of a replay, of which `run` starts [`REPLAYS`].
fn median(gpu: &dyn Backend, mut run: impl FnMut()) -> f64 {
    let marker = integers(gpu, &[1]);
    let mut sample = || {
        gpu.read_u32(&marker, 0, &mut [0]);
        let start = Instant::now();
        run();
        gpu.read_u32(&marker, 0, &mut [0]);
        start.elapsed().as_secs_f64() / REPLAYS as f64
    };
    sample();
    let mut secs: Vec<f64> = (0..SAMPLES).map(|_| sample()).collect();
    secs.sort_by(f64::total_cmp);
    secs[SAMPLES / 2]
}

fn activations(gpu: &dyn Backend, len: usize) -> Buffer {
    let mut buffer = gpu.alloc(Dtype::Bf16, len, Component::Workspace).expect("memory");
    // Enough random numbers that no operator finds shortcuts; the rest stays zero.
    gpu.write_f32(&mut buffer, 0, &noise(len.min(1 << 22), 0.6, 1));
    buffer
}

fn integers(gpu: &dyn Backend, values: &[u32]) -> Buffer {
    let mut buffer = gpu.alloc(Dtype::U32, values.len(), Component::Workspace).expect("memory");
    gpu.write_u32(&mut buffer, 0, values);
    buffer
}

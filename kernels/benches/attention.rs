//! Attention on the CPU: a table of times, cache bytes per second and multiply-adds per second, with their shares of
//! what this machine reads and multiplies when it does nothing else.
//!
//! `cargo bench -p kernels --bench attention -- FILTER`; MXSERVE_BENCH_THREADS sets the threads (default 1).

#![allow(clippy::print_stdout, reason = "a table for people")]

use std::hint::black_box;
use std::time::Instant;

use kernels::{
    AttentionInputs, Backend, Buffer, Component, Device, Dtype, Heads, HostSpans, InputForm, KvCacheDtype,
    PagedKv,
};

/// Heads of SmolLM2-135M and of Llama-3.2-1B.
const HEADS: [Heads; 2] = [Heads { q: 9, kv: 3, dim: 64 }, Heads { q: 32, kv: 8, dim: 64 }];

/// (sequences, new tokens of each, positions of each after the step).
const STEPS: [(usize, usize, usize); 7] =
    [(1, 512, 512), (1, 512, 4096), (1, 1, 128), (1, 1, 512), (1, 1, 4096), (1, 1, 32768), (16, 1, 512)];

/// Caches in use by turns, as the layers of a model.
const LAYERS: usize = 30;

/// Bytes of all layers that a measurement takes at most.
const MAX_BYTES: usize = 1 << 30;

/// Seconds of one call, the least of many short batches.
fn seconds(mut body: impl FnMut()) -> f64 {
    let start = Instant::now();
    body();
    let count = (0.005 / start.elapsed().as_secs_f64()).ceil().max(1.0) as usize;
    let batch = |body: &mut dyn FnMut()| {
        let start = Instant::now();
        (0..count).for_each(|_| body());
        start.elapsed().as_secs_f64() / count as f64
    };
    (0..50).map(|_| batch(&mut body)).fold(f64::INFINITY, f64::min)
}

/// Bytes per second that `threads` threads read from memory, each its own.
fn read_bytes_per_second(threads: usize) -> f64 {
    const BYTES: usize = 256 << 20;
    let pages: Vec<Vec<u64>> = (0..threads).map(|t| vec![t as u64 + 1; BYTES / 8]).collect();
    let pass = || {
        std::thread::scope(|scope| {
            for page in &pages {
                scope.spawn(|| black_box(page.iter().fold(0, |sum: u64, x| sum.wrapping_add(*x))));
            }
        });
    };
    (threads * BYTES) as f64 / seconds(pass)
}

struct Measured {
    seconds: f64,
    /// Bytes of keys and values that are read once.
    bytes: f64,
    /// Multiply-adds of scores and sums.
    multiply_adds: f64,
}

fn u32s(backend: &dyn Backend, values: &[u32]) -> Buffer {
    let mut buffer = backend.alloc(Dtype::U32, values.len(), Component::Workspace).expect("memory");
    backend.write_u32(&mut buffer, 0, values);
    buffer
}

fn measure(
    backend: &dyn Backend,
    heads: Heads,
    dtype: KvCacheDtype,
    (sequences, tokens, context): (usize, usize, usize),
) -> Measured {
    let blocks = context.div_ceil(kernels::KV_BLOCK_TOKENS);
    let rows = sequences * tokens;
    let width = heads.qkv_width();
    let block_bytes = backend.kv_block_bytes(heads, dtype).expect("a dtype for these heads");
    let layers = (MAX_BYTES / (block_bytes * blocks * sequences)).clamp(1, LAYERS);
    let values: Vec<f32> = (0..sequences * context * width)
        .map(|i| ((i as u32).wrapping_mul(2_654_435_769) >> 8) as f32 / (1 << 23) as f32 - 1.0)
        .collect();
    let float = |len: usize| backend.alloc(Dtype::F32, len, Component::Workspace).expect("memory");
    // All positions are written once, then the last `tokens` of each sequence attend.
    let mut qkv = float(values.len());
    backend.write_f32(&mut qkv, 0, &values);
    let all = sequences * context;
    let mut rope = float(all * heads.dim);
    backend.write_f32(
        &mut rope,
        0,
        &[vec![1.0; heads.dim / 2], vec![0.0; heads.dim / 2]].concat().repeat(all),
    );
    let slots: Vec<u32> = (0..all)
        .map(|i| {
            let (sequence, position) = (i / context, i % context);
            ((sequence * blocks) * kernels::KV_BLOCK_TOKENS + position) as u32
        })
        .collect();
    let slots = u32s(backend, &slots);
    let mut caches: Vec<PagedKv> =
        (0..layers).map(|_| backend.alloc_kv(blocks * sequences, heads, dtype).expect("memory")).collect();
    for cache in &mut caches {
        backend.rope_and_cache(&mut qkv, heads, &rope, None, &slots, all, cache);
    }
    let query_start: Vec<u32> = (0..=sequences).map(|s| (s * tokens) as u32).collect();
    let contexts = vec![context as u32; sequences];
    let tables: Vec<u32> = (0..(blocks * sequences) as u32).collect();
    let inputs = AttentionInputs {
        rows,
        sequences,
        query_start: &u32s(backend, &query_start),
        context_lens: &u32s(backend, &contexts),
        block_tables: &u32s(backend, &tables),
        max_blocks: blocks,
        host: HostSpans { query_start: &query_start, context_lens: &contexts },
    };
    let mut out = float(rows * heads.q_width());
    let mut next = 0;
    let seconds = seconds(|| {
        let cache = &caches[next % layers];
        backend.paged_attention(&qkv, heads, 0.125, None, &inputs, cache, InputForm::Plain, &mut out);
        next += 1;
    });
    // Token i of the last `tokens` sees context - tokens + 1 + i positions.
    let seen = tokens * (context - tokens) + tokens * (tokens + 1) / 2;
    Measured {
        seconds,
        bytes: (sequences * blocks * block_bytes) as f64,
        multiply_adds: (sequences * seen * heads.q * heads.dim * 2) as f64,
    }
}

fn main() {
    let filter = std::env::args().skip(1).find(|argument| !argument.starts_with('-')).unwrap_or_default();
    let threads = std::env::var("MXSERVE_BENCH_THREADS").ok().and_then(|t| t.parse().ok()).unwrap_or(1);
    let backend = kernels::open(Device::Cpu { threads }).expect("the CPU is there");
    let read = read_bytes_per_second(threads);
    println!("{}; reads {:.1} GB/s from memory", backend.description(), read / 1e9);
    println!(
        "{:34} {:>12} {:>10} {:>12} {:>12}",
        "q/kv/dim, sequences x new @ context", "us/layer", "GB/s", "% of read", "G MAC/s"
    );
    for heads in HEADS {
        for step in STEPS {
            for dtype in KvCacheDtype::ALL {
                let Heads { q, kv, dim } = heads;
                let (sequences, tokens, context) = step;
                let name = format!("{q}/{kv}/{dim} {sequences} x {tokens} @ {context} {dtype}");
                if !name.contains(&filter) {
                    continue;
                }
                let Measured { seconds, bytes, multiply_adds } = measure(&*backend, heads, dtype, step);
                println!(
                    "{name:34} {:12.1} {:10.2} {:12.0} {:12.1}",
                    seconds * 1e6,
                    bytes / seconds / 1e9,
                    100.0 * bytes / seconds / read,
                    multiply_adds / seconds / 1e9,
                );
            }
        }
    }
}

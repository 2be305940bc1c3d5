//! Weight products on a GPU, alone in a recorded step: time, bytes and operations per second, and how far from the time
//! that reading the weights once takes at the H200's bandwidth.
//!
//! Weights are taken in turn from as many copies as do not fit in the L2 cache together. The time of a product is that
//! of a replay over the number of products in it; the median of the replays.
//!
//! `cargo bench -p kernels --features cuda --bench cuda [-- SHAPE… SCHEME… ROWS…]`

#![allow(clippy::print_stdout, reason = "a benchmark prints its results")]

mod synthetic;

use std::time::Instant;

use kernels::mx::Scheme;
use kernels::{Backend, Component, Device, Dtype};

use synthetic::{noise, upload};

/// Linear layers of Llama-3.1-8B: name, `[N, K]`.
const SHAPES: [(&str, [usize; 2]); 5] = [
    ("o", [4096, 4096]),
    ("qkv", [6144, 4096]),
    ("down", [4096, 14_336]),
    ("gate_up", [28_672, 4096]),
    ("head", [128_256, 4096]),
];

/// `bf16` is a dense weight.
const SCHEMES: [&str; 9] =
    ["bf16", "mxfp4", "mxfp6", "mxfp8", "mxint8", "w4a8", "w4a6", "mxfp6:mxfp6", "mxfp8:mxfp8"];

/// Most elements of a result: a head of all prompt rows is never asked for.
const MAX_RESULT: usize = 1 << 28;

/// Rows of the input.
const ROWS: [usize; 14] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192];

/// Bytes that an H200 reads per second, measured with a kernel that does nothing else.
const READ_BYTES_PER_SEC: f64 = 4.458e12;

/// Bytes of weights that no cache holds.
const UNCACHED_BYTES: usize = 256 << 20;

/// Times that are taken.
const SAMPLES: usize = 9;

/// Seconds of replays between two looks at the clock, so that waiting for the device is no part of the result.
const SAMPLE_SECS: f64 = 0.005;

fn main() {
    let gpu = Device::Cuda { ordinal: 0, strict: false };
    if let Err(error) = gpu.check() {
        println!("SKIPPED: {error}");
        return;
    }
    let wanted: Vec<String> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let backend = kernels::open(gpu).expect("the device opens");
    println!("{}", backend.description());
    println!("shape    scheme          M        us     GB/s  TFLOP/s  of floor");
    let shapes = of(&wanted, SHAPES.to_vec(), |&(name, _)| name.to_owned());
    let schemes = of(&wanted, SCHEMES.to_vec(), |&label| label.to_owned());
    let rows = of(&wanted, ROWS.to_vec(), usize::to_string);
    for &(name, shape) in &shapes {
        for &label in &schemes {
            let scheme = (label != "bf16").then(|| label.parse().expect("a scheme"));
            measure(backend.as_ref(), &format!("{name:8} {label:12}"), shape, scheme, &rows);
        }
    }
}

/// Those of `all` whose names are `wanted`; all of them if none is.
fn of<T: Clone>(wanted: &[String], all: Vec<T>, name: impl Fn(&T) -> String) -> Vec<T> {
    let some: Vec<T> = all.iter().filter(|item| wanted.contains(&name(item))).cloned().collect();
    if some.is_empty() { all } else { some }
}

/// Measures one weight with `rows`.
fn measure(backend: &dyn Backend, label: &str, shape: [usize; 2], scheme: Option<Scheme>, rows: &[usize]) {
    let [n, k] = shape;
    let mut weights = vec![upload(backend, shape, scheme, 0, false)];
    let bytes = weights[0].bytes();
    weights
        .extend((1..UNCACHED_BYTES.div_ceil(bytes)).map(|copy| upload(backend, shape, scheme, copy, false)));
    for &rows in rows.iter().filter(|&&rows| rows * n <= MAX_RESULT) {
        let alloc = |len| backend.alloc(Dtype::Bf16, len, Component::Workspace).expect("memory");
        let (mut x, mut out) = (alloc(rows * k), alloc(rows * n));
        backend.write_f32(&mut x, 0, &noise(rows * k, 1.0, 7));
        let secs = time(backend, || {
            for weight in &weights {
                backend.linear(&x, rows, weight, &mut out, n, 0);
            }
        });
        let secs = secs / weights.len() as f64;
        println!(
            "{label} {rows:4} {:9.2} {:8.0} {:8.1} {:9.2}",
            secs * 1e6,
            bytes as f64 / secs / 1e9,
            2.0 * (rows * n * k) as f64 / secs / 1e12,
            secs * READ_BYTES_PER_SEC / bytes as f64,
        );
    }
}

/// Median seconds of a replay of `step`.
fn time(backend: &dyn Backend, mut step: impl FnMut()) -> f64 {
    let mut marker = backend.alloc(Dtype::U32, 1, Component::Workspace).expect("memory");
    backend.write_u32(&mut marker, 0, &[1]);
    let wait = || backend.read_u32(&marker, 0, &mut [0]);
    step();
    let graph = backend.capture(&mut step);
    let sample = |replays: usize| {
        let start = Instant::now();
        (0..replays).for_each(|_| backend.replay(&graph));
        wait();
        start.elapsed().as_secs_f64() / replays as f64
    };
    sample(1);
    let replays = (SAMPLE_SECS / sample(1)).ceil() as usize;
    let mut secs: Vec<f64> = (0..SAMPLES).map(|_| sample(replays)).collect();
    secs.sort_by(f64::total_cmp);
    secs[SAMPLES / 2]
}

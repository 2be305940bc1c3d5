//! Matrix products on the CPU beside what the processor can do at most.
//!
//! `cargo bench -p kernels --bench linear -- [--threads 1,2] [--shapes 4096x4096] [--rows 1,16,512] [SCHEME...]`
//!
//! With few rows a product is as fast as its weights come from memory: GB/s, and the share of a plain read's. With many it
//! is as fast as it multiplies: 10^9 multiply-adds per second, and the share of the peak of the instructions it is made
//! of. Weights of one size are used in turn, more than caches hold.

#![allow(clippy::print_stdout, reason = "a benchmark's result")]

mod ceilings;

use std::time::{Duration, Instant};

use ceilings::Ceilings;
use clap::Parser;
use kernels::mx::{ElementRounding, MxTensor, Scheme, Values, quantize_rows};
use kernels::{Backend, Component, DenseDtype, Device, Dtype, Weight, WeightSource};

/// Bytes of weights used in turn.
const ROTATED_BYTES: usize = 256 << 20;
/// Rows up to which a product is held to the memory's ceiling.
const FEW_ROWS: usize = 8;

#[derive(Parser)]
struct Args {
    /// Schemes; `bf16` is a dense weight.
    #[arg(default_values = ["bf16", "mxint8", "mxfp8", "mxfp8_e5m2", "mxfp6", "mxfp6_e3m2", "mxfp4", "mxint8:mxint8",
        "mxfp6:mxint8", "mxfp4:mxint8", "w4a6"])]
    schemes: Vec<String>,
    /// Numbers of threads.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    threads: Vec<usize>,
    /// Weights, N x K.
    #[arg(long, value_delimiter = ',', value_parser = shape, default_value = "4096x4096")]
    shapes: Vec<[usize; 2]>,
    /// Rows of activations, M.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 4, 16, 512])]
    rows: Vec<usize>,
    /// Measuring time of each, in milliseconds.
    #[arg(long, default_value_t = 600)]
    millis: u64,
    /// What cargo passes.
    #[arg(long, hide = true)]
    bench: bool,
}

fn shape(text: &str) -> Result<[usize; 2], String> {
    let parts: Option<Vec<usize>> = text.split('x').map(|part| part.parse().ok()).collect();
    parts.and_then(|parts| parts.try_into().ok()).ok_or_else(|| "a shape is NxK, as 4096x4096".to_owned())
}

fn weight(backend: &dyn Backend, scheme: &str, shape: [usize; 2]) -> Weight {
    let mut random = fastrand::Rng::with_seed(1);
    let bytes: Vec<u8> = (0..shape[0] * shape[1])
        .flat_map(|_| half::bf16::from_f32(random.f32() * 2.0 - 1.0).to_le_bytes())
        .collect();
    if scheme == "bf16" {
        let source = WeightSource::Dense { dtype: DenseDtype::Bf16, shape, bytes: &bytes };
        return backend.upload(&[source], None).expect("upload");
    }
    let Scheme { weight, activation, rotation } = scheme.parse().expect("a scheme");
    let format = weight.format;
    let mut codes = vec![0; shape[0] * format.code_bytes(shape[1])];
    let mut scales = vec![0; shape[0] * format.scale_bytes(shape[1])];
    quantize_rows(weight, ElementRounding::NearestEven, Values::Bf16(&bytes), 0, &mut codes, &mut scales)
        .expect("finite");
    let tensor = MxTensor::new(format, shape, &codes, &scales).expect("sizes");
    let source = WeightSource::Mx { tensor, scale_rounding: weight.scale_rounding, activation, rotation };
    backend.upload(&[source], None).expect("upload")
}

/// Median seconds of a product of `rows` rows with each of `weights` in turn.
fn seconds(backend: &dyn Backend, weights: &[Weight], shape: [usize; 2], rows: usize, time: Duration) -> f64 {
    let mut x = backend.alloc(Dtype::F32, rows * shape[1], Component::Workspace).expect("memory");
    let mut random = fastrand::Rng::with_seed(2);
    let values: Vec<f32> = (0..rows * shape[1]).map(|_| random.f32() * 2.0 - 1.0).collect();
    backend.write_f32(&mut x, 0, &values);
    let mut out = backend.alloc(Dtype::F32, rows * shape[0], Component::Workspace).expect("memory");
    let mut times = Vec::new();
    let begin = Instant::now();
    for weight in weights.iter().cycle() {
        let start = Instant::now();
        backend.linear(&x, rows, weight, &mut out, shape[0], 0);
        times.push(start.elapsed().as_secs_f64());
        if begin.elapsed() > time && times.len() >= 5 {
            break;
        }
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    let args = Args::parse();
    for &threads in &args.threads {
        let backend = kernels::open(Device::Cpu { threads }).expect("the CPU is there");
        let ceilings = Ceilings::measure(threads);
        println!(
            "\n{}: reads {:.1} GB/s, multiplies {:.0} x 10^9 int8 and {:.0} x 10^9 F32 per second",
            backend.description(),
            ceilings.read,
            ceilings.int8,
            ceilings.f32
        );
        for &shape in &args.shapes {
            println!("\n| {} x {} | M | us | | of ceiling |\n|---|---|---|---|---|", shape[0], shape[1]);
            for name in &args.schemes {
                let first = weight(&*backend, name, shape);
                let count = (ROTATED_BYTES / first.bytes()).clamp(2, 64);
                let kernel = backend.linear_kernel(first.scheme()).name;
                // Weight-only products of integers are made of two int8 products.
                let peak = match kernel.rsplit('_').next() {
                    Some("int8") => ceilings.int8,
                    Some("int16") => ceilings.int8 / 2.0,
                    _ => ceilings.f32,
                };
                let mut weights = vec![first];
                weights.extend((1..count).map(|_| weight(&*backend, name, shape)));
                for &rows in &args.rows {
                    let seconds =
                        seconds(&*backend, &weights, shape, rows, Duration::from_millis(args.millis));
                    let (speed, unit, ceiling) = if rows <= FEW_ROWS {
                        (weights[0].bytes() as f64 / seconds / 1e9, "GB/s", ceilings.read)
                    } else {
                        let products = (rows * shape[0] * shape[1]) as f64;
                        (products / seconds / 1e9, "GMAC/s", peak)
                    };
                    println!(
                        "| {name} | {rows} | {:.0} | {speed:.1} {unit} | {:.0} % |",
                        seconds * 1e6,
                        100.0 * speed / ceiling
                    );
                }
            }
        }
    }
}

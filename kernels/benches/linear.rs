//! Matrix products on the CPU: weight bytes per second when streaming (M = 1), multiply-adds per second when blocked
//! (M = 512). `cargo bench -p kernels --bench linear -- FILTER`; MXSERVE_BENCH_THREADS sets the threads (default 1).

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kernels::mx::{ElementRounding, MxTensor, Scheme, Values, quantize_rows};
use kernels::{Backend, Component, DenseDtype, Device, Dtype, Weight, WeightSource};

/// Matrices of one size are used in turn, so that weights come from memory as in a model.
const ROTATED_BYTES: usize = 256 << 20;

/// Schemes to measure; `bf16` is a dense weight.
const SCHEMES: [&str; 11] = [
    "bf16",
    "mxint8",
    "mxfp8",
    "mxfp8_e5m2",
    "mxfp6",
    "mxfp6_e3m2",
    "mxfp4",
    "mxint8:mxint8",
    "mxfp6:mxint8",
    "mxfp4:mxint8",
    "w4a6",
];

fn weight(backend: &dyn Backend, scheme: &str, shape: [usize; 2]) -> Weight {
    let mut state = 1_u32;
    let bytes: Vec<u8> = (0..shape[0] * shape[1])
        .flat_map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let value = (state >> 8) as f32 / (1 << 23) as f32 - 1.0;
            half::bf16::from_f32(value).to_le_bytes()
        })
        .collect();
    if scheme == "bf16" {
        let source = WeightSource::Dense { dtype: DenseDtype::Bf16, shape, bytes: &bytes };
        return backend.upload(&[source], None).expect("upload");
    }
    let Scheme { weight, activation } = scheme.parse().expect("a scheme");
    let format = weight.format;
    let mut codes = vec![0; shape[0] * format.code_bytes(shape[1])];
    let mut scales = vec![0; shape[0] * format.scale_bytes(shape[1])];
    quantize_rows(weight, ElementRounding::NearestEven, Values::Bf16(&bytes), 0, &mut codes, &mut scales)
        .expect("finite");
    let tensor = MxTensor::new(format, shape, &codes, &scales).expect("sizes");
    let source = WeightSource::Mx { tensor, scale_rounding: weight.scale_rounding, activation };
    backend.upload(&[source], None).expect("upload")
}

fn linear(c: &mut Criterion) {
    let threads = std::env::var("MXSERVE_BENCH_THREADS").ok().and_then(|t| t.parse().ok()).unwrap_or(1);
    let backend = kernels::open(Device::Cpu { threads }).expect("the CPU is there");
    for shape in [[1536, 576], [4096, 4096]] {
        for name in SCHEMES {
            let one = weight(&*backend, name, shape);
            let count = (ROTATED_BYTES / one.bytes()).clamp(1, 32);
            let weights: Vec<Weight> =
                std::iter::once(one).chain((1..count).map(|_| weight(&*backend, name, shape))).collect();
            for rows in [1, 4, 16, 512] {
                if rows > 16 && shape[0] > 2048 {
                    continue;
                }
                let mut x = backend.alloc(Dtype::F32, rows * shape[1], Component::Workspace).expect("memory");
                let values: Vec<f32> = (0..rows * shape[1]).map(|i| (i % 17) as f32 * 0.1 - 0.8).collect();
                backend.write_f32(&mut x, 0, &values);
                let mut out =
                    backend.alloc(Dtype::F32, rows * shape[0], Component::Workspace).expect("memory");
                let mut group = c.benchmark_group(format!("linear/{}x{}/M{rows}", shape[0], shape[1]));
                group.throughput(if rows == 1 {
                    Throughput::Bytes(weights[0].bytes() as u64)
                } else {
                    Throughput::Elements((rows * shape[0] * shape[1]) as u64)
                });
                let mut next = 0;
                group.bench_function(BenchmarkId::from_parameter(name), |b| {
                    b.iter(|| {
                        backend.linear(&x, rows, &weights[next], &mut out, shape[0], 0);
                        next = (next + 1) % weights.len();
                    });
                });
                group.finish();
            }
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(std::time::Duration::from_millis(600))
        .warm_up_time(std::time::Duration::from_millis(200));
    targets = linear
}
criterion_main!(benches);

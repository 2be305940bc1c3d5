//! Throughput of direct cast, in bytes of BF16 input (`elem` formats x scale rules), on one thread.
//!
//! `taskset -c 0 cargo bench -p kernels --bench quantize`

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kernels::mx::{
    Cast, ElementRounding, ElementType, MxFormat, MxTensor, ScaleRounding, Values, quantize_dequantize,
    quantize_rows,
};

/// 2 MiB of BF16: larger than the first-level caches, as a weight matrix is.
const VALUES: usize = 1 << 20;
const ROW: usize = 4096;

/// Values with the bell shape of trained weights (a sum of uniforms), from a linear congruential generator.
fn weights() -> Vec<f32> {
    let mut state = 1_u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..VALUES).map(|_| (0..6).map(|_| uniform()).sum::<f32>() * 0.03).collect()
}

fn benches(c: &mut Criterion) {
    let x = weights();
    let bf16: Vec<u8> = x.iter().flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes()).collect();
    let casts = || {
        ElementType::ALL.into_iter().flat_map(|element| {
            ScaleRounding::ALL.map(|scale_rounding| Cast { format: MxFormat::new(element), scale_rounding })
        })
    };

    let mut group = c.benchmark_group("quantize_rows");
    group.throughput(Throughput::Bytes(bf16.len() as u64));
    for cast in casts() {
        let mut codes = vec![0; cast.format.code_bytes(VALUES)];
        let mut scales = vec![0; cast.format.scale_bytes(VALUES)];
        group.bench_function(BenchmarkId::new(cast.format.to_string(), cast.scale_rounding), |b| {
            b.iter(|| {
                let values = Values::Bf16(&bf16);
                quantize_rows(cast, ElementRounding::NearestEven, values, 0, &mut codes, &mut scales)
            });
        });
    }
    group.finish();

    let mut group = c.benchmark_group("quantize_rows_stochastic");
    group.throughput(Throughput::Bytes(bf16.len() as u64));
    for cast in casts().filter(|cast| cast.scale_rounding == ScaleRounding::Rceil) {
        let mut codes = vec![0; cast.format.code_bytes(VALUES)];
        let mut scales = vec![0; cast.format.scale_bytes(VALUES)];
        group.bench_function(BenchmarkId::new(cast.format.to_string(), cast.scale_rounding), |b| {
            b.iter(|| {
                let values = Values::Bf16(&bf16);
                quantize_rows(
                    cast,
                    ElementRounding::Stochastic { seed: 1 },
                    values,
                    0,
                    &mut codes,
                    &mut scales,
                )
            });
        });
    }
    group.finish();

    // Per BF16 byte of the row as well, so that the numbers compare; the rows are F32.
    let mut group = c.benchmark_group("quantize_dequantize");
    group.throughput(Throughput::Bytes(2 * ROW as u64));
    for cast in casts() {
        let mut out = vec![0.0; ROW];
        group.bench_function(BenchmarkId::new(cast.format.to_string(), cast.scale_rounding), |b| {
            b.iter(|| quantize_dequantize(cast, &x[..ROW], &mut out));
        });
    }
    group.finish();

    let mut group = c.benchmark_group("dequantize_row");
    group.throughput(Throughput::Bytes(2 * ROW as u64));
    for cast in casts().filter(|cast| cast.scale_rounding == ScaleRounding::Even) {
        let mut codes = vec![0; cast.format.code_bytes(ROW)];
        let mut scales = vec![0; cast.format.scale_bytes(ROW)];
        let values = Values::Bf16(&bf16[..2 * ROW]);
        quantize_rows(cast, ElementRounding::NearestEven, values, 0, &mut codes, &mut scales)
            .expect("finite weights");
        let tensor = MxTensor::new(cast.format, [1, ROW], &codes, &scales).expect("sizes of the format");
        let mut out = vec![0.0; ROW];
        group.bench_function(cast.format.to_string(), |b| b.iter(|| tensor.dequantize_row(0, &mut out)));
    }
    group.finish();
}

criterion_group!(quantize, benches);
criterion_main!(quantize);

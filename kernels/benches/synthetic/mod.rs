//! Inputs of benchmarks on a GPU: seeded numbers, and weights that are made quickly and are as slow to read as any.

#![allow(dead_code, reason = "each benchmark takes what it needs")]

use kernels::mx::{ElementRounding, MxTensor, Scheme, Values, quantize_rows};
use kernels::{Backend, DenseDtype, Weight, WeightSource};

/// Rows of a weight that are random; the others repeat them.
const PERIOD: usize = 64;

/// Uniform numbers of standard deviation `deviation`.
pub(crate) fn noise(len: usize, deviation: f32, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as f32 / u32::MAX as f32 - 0.5
    };
    (0..len).map(|_| next() * deviation * 12_f32.sqrt()).collect()
}

/// A random weight `[rows, cols]`, BF16 without a scheme; `is_gated` is for `Backend::gated_linear`.
pub(crate) fn upload(
    gpu: &dyn Backend,
    [rows, cols]: [usize; 2],
    scheme: Option<Scheme>,
    seed: usize,
    is_gated: bool,
) -> Weight {
    let period = PERIOD.min(rows);
    let values: Vec<u8> = noise(period * cols, 0.02, seed as u32 + 1)
        .into_iter()
        .flat_map(|x| half::bf16::from_f32(x).to_le_bytes())
        .collect();
    let repeat =
        |bytes: &[u8]| bytes.iter().copied().cycle().take(bytes.len() / period * rows).collect::<Vec<u8>>();
    let upload = |source: WeightSource<'_>| {
        let parts = [source];
        let weight = if is_gated { gpu.upload_gated(&parts, None) } else { gpu.upload(&parts, None) };
        weight.expect("memory")
    };
    let Some(scheme) = scheme else {
        let bytes = repeat(&values);
        return upload(WeightSource::Dense { dtype: DenseDtype::Bf16, shape: [rows, cols], bytes: &bytes });
    };
    let format = scheme.weight.format;
    let mut codes = vec![0; format.code_bytes(period * cols)];
    let mut scales = vec![0; format.scale_bytes(period * cols)];
    let (rounding, values) = (ElementRounding::NearestEven, Values::Bf16(&values));
    quantize_rows(scheme.weight, rounding, values, 0, &mut codes, &mut scales).expect("finite weights");
    let (codes, scales) = (repeat(&codes), repeat(&scales));
    let tensor = MxTensor::new(format, [rows, cols], &codes, &scales).expect("sizes of the format");
    let (scale_rounding, Scheme { activation, rotation, .. }) = (scheme.weight.scale_rounding, scheme);
    upload(WeightSource::Mx { tensor, scale_rounding, activation, rotation })
}

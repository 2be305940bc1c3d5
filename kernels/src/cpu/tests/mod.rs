//! The CPU operators against their defining loops, on every instruction set of this processor.

mod attention;
mod linear;
mod rows;
mod sampling;
mod weights;

use super::*;
use crate::isa::Isa;
use crate::mx::{Cast, ElementType, MxFormat, MxTensor, ScaleRounding, Specials};
use crate::reference::{self, BlockSum};

/// Seeded numbers in [-1, 1), with some structure in their magnitudes.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn next(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn vec(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.next()).collect()
    }
}

fn backends() -> Vec<CpuBackend> {
    let pairs = |isa| PairIsa::available(isa).into_iter().map(move |pairs| (isa, pairs));
    let isas = Isa::ALL.iter().copied().filter(|isa| isa.is_available()).flat_map(pairs);
    isas.flat_map(|(isa, pairs)| [1, 3].map(|t| CpuBackend::with_isa(t, isa, pairs))).collect()
}

fn upload_f32(backend: &CpuBackend, values: &[f32]) -> Buffer {
    let mut buffer = backend.alloc(Dtype::F32, values.len(), Component::Workspace).unwrap();
    backend.write_f32(&mut buffer, 0, values);
    buffer
}

fn upload_u32(backend: &CpuBackend, values: &[u32]) -> Buffer {
    let mut buffer = backend.alloc(Dtype::U32, values.len(), Component::Workspace).unwrap();
    backend.write_u32(&mut buffer, 0, values);
    buffer
}

fn read(backend: &CpuBackend, buffer: &Buffer) -> Vec<f32> {
    let mut out = vec![0.0; buffer.len()];
    backend.read_f32(buffer, 0, &mut out);
    out
}

/// Poisoned output: an element that an operator forgets is NaN.
fn poison(backend: &CpuBackend, len: usize) -> Buffer {
    upload_f32(backend, &vec![f32::NAN; len])
}

#[track_caller]
fn assert_bits(actual: &[f32], expected: &[f32], what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        assert!(a.to_bits() == e.to_bits() || (a.is_nan() && e.is_nan()), "{what}: [{i}] is {a}, not {e}");
    }
}

#[track_caller]
fn assert_close(actual: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        assert!((a - e).abs() <= tolerance * (1.0 + e.abs()), "{what}: [{i}] is {a}, not {e}");
    }
}

/// A weight in both forms: packed on disk, and as element values and scales.
struct TestWeight {
    format: MxFormat,
    shape: [usize; 2],
    codes: Vec<u8>,
    scales: Vec<u8>,
}

impl TestWeight {
    fn random(format: MxFormat, shape: [usize; 2], seed: u64) -> Self {
        let mut random = Random(seed);
        let mut codes = vec![0; shape[0] * format.code_bytes(shape[1])];
        let mut scales = vec![0; shape[0] * format.scale_bytes(shape[1])];
        // Every code and many scales, not only those that quantization makes; no specials.
        let spec = format.element.spec();
        codes.iter_mut().for_each(|c| {
            *c = random.bits() as u8;
            if spec.specials != Specials::None && !format.element.decode(*c).is_finite() {
                *c = 1;
            }
        });
        scales.iter_mut().for_each(|s| *s = 110 + (random.bits() % 24) as u8);
        scales[0] = 0;
        Self { format, shape, codes, scales }
    }

    fn tensor(&self) -> MxTensor<'_> {
        MxTensor::new(self.format, self.shape, &self.codes, &self.scales).unwrap()
    }

    fn source(&self, activation: Option<Cast>) -> WeightSource<'_> {
        WeightSource::Mx {
            tensor: self.tensor(),
            scale_rounding: ScaleRounding::Floor,
            activation,
            rotation: None,
        }
    }

    /// How its products are summed.
    fn sum(&self) -> BlockSum {
        let integers = self.format.element.spec().int8_factor().is_some();
        if integers { BlockSum::Exact } else { BlockSum::Chained }
    }

    /// Element values and scales.
    fn parts(&self) -> (Vec<f32>, Vec<f32>) {
        let spec = self.format.element.spec();
        let mut codes = vec![0; self.shape[0] * self.shape[1]];
        crate::mx::unpack(&self.codes, spec.bits, &mut codes);
        let elements = codes.iter().map(|&c| self.format.element.decode(c)).collect();
        let scales = self.scales.iter().map(|&s| crate::mx::E8m0(s).to_f32()).collect();
        (elements, scales)
    }
}

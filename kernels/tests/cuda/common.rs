//! Both backends, and seeded inputs that are the same on both.

use kernels::{Backend, Buffer, Component, Device, Dtype, open};

/// A GPU, and the CPU that it is held to.
pub(crate) struct Devices {
    pub(crate) gpu: Box<dyn Backend>,
    pub(crate) cpu: Box<dyn Backend>,
}

impl Devices {
    /// `None`, said aloud, where there is no GPU.
    pub(crate) fn open() -> Option<Self> {
        let cpu = || open(Device::Cpu { threads: 8 }).expect("there is always a processor");
        crate::gpu().map(|gpu| Self { gpu, cpu: cpu() })
    }
}

/// Seeded numbers (SplitMix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Less than `n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// Uniform in [-1, 1).
    pub(crate) fn next(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// `len` BF16 numbers in [-scale, scale].
    pub(crate) fn bf16(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| to_bf16(self.next() * scale)).collect()
    }

    /// `len` numbers in [-scale, scale).
    pub(crate) fn f32(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.next() * scale).collect()
    }
}

pub(crate) fn to_bf16(x: f32) -> f32 {
    half::bf16::from_f32(x).to_f32()
}

pub(crate) fn floats(backend: &dyn Backend, dtype: Dtype, values: &[f32]) -> Buffer {
    let mut buffer = backend.alloc(dtype, values.len(), Component::Workspace).expect("memory");
    backend.write_f32(&mut buffer, 0, values);
    buffer
}

pub(crate) fn activations(backend: &dyn Backend, values: &[f32]) -> Buffer {
    floats(backend, backend.activation_dtype(), values)
}

pub(crate) fn integers(backend: &dyn Backend, values: &[u32]) -> Buffer {
    let mut buffer = backend.alloc(Dtype::U32, values.len(), Component::Workspace).expect("memory");
    backend.write_u32(&mut buffer, 0, values);
    buffer
}

/// An output of `len` activations that all start as NaN: an element that an operator forgets is seen.
pub(crate) fn poisoned(backend: &dyn Backend, len: usize) -> Buffer {
    activations(backend, &vec![f32::NAN; len])
}

pub(crate) fn read(backend: &dyn Backend, buffer: &Buffer) -> Vec<f32> {
    let mut values = vec![0.0; buffer.len()];
    backend.read_f32(buffer, 0, &mut values);
    values
}

/// Asserts that `actual` is within `relative * |expected| + absolute`, and NaN where `expected` is.
#[track_caller]
pub(crate) fn assert_close(actual: &[f32], expected: &[f32], relative: f32, absolute: f32, what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        let close = (a - e).abs() <= relative * e.abs() + absolute || (a.is_nan() && e.is_nan());
        assert!(close, "{what}: [{i}] is {a}, not {e}");
    }
}

/// Asserts that the bits are equal.
#[track_caller]
pub(crate) fn assert_same(actual: &[f32], expected: &[f32], what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        assert!(a.to_bits() == e.to_bits(), "{what}: [{i}] is {a}, not {e}");
    }
}

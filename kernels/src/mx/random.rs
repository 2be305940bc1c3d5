//! Random bits by position: the same for an element however its tensor is cut into chunks.

/// A stream of random numbers, one per index (SplitMix64 evaluated at any of its steps).
#[derive(Debug, Clone, Copy)]
pub(super) struct Stream {
    key: u64,
}

/// Step of SplitMix64: 2^64 divided by the golden ratio.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

impl Stream {
    /// The stream of `seed`. The seed is mixed first, so that neighbouring seeds do not give shifted copies.
    pub(super) fn new(seed: u64) -> Self {
        Self { key: mix(seed.wrapping_add(GOLDEN)) }
    }

    /// 32 uniform bits for element `index`.
    #[inline(always)]
    pub(super) fn bits(self, index: u64) -> u32 {
        (mix(self.key.wrapping_add(index.wrapping_mul(GOLDEN))) >> 32) as u32
    }
}

/// The finalizer of SplitMix64 (Steele, Lea, Flood 2014; Stafford's variant 13).
#[inline(always)]
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

//! The loops of quantization on every instruction set.

use super::Cast;
use super::block::{BlockLoop, specialize};
use crate::isa::Isa;

impl Isa {
    /// Runs `work` compiled for this instruction set.
    ///
    /// # Panics
    /// The processor does not have it.
    pub(super) fn quantize<L: BlockLoop>(self, cast: Cast, work: L) -> L::Output {
        assert!(self.is_available(), "this processor has no {self:?}");
        match self {
            Self::Portable => specialize(cast, work),
            // Part of the target.
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot | Self::Neon => specialize(cast, work),
            // SAFETY: the processor has the features, asserted above.
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni | Self::Avx2 => unsafe { avx2(cast, work) },
            // SAFETY: the processor has the features, asserted above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni | Self::Avx512 => unsafe { avx512(cast, work) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2<L: BlockLoop>(cast: Cast, work: L) -> L::Output {
    specialize(cast, work)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl,avx512dq")]
fn avx512<L: BlockLoop>(cast: Cast, work: L) -> L::Output {
    specialize(cast, work)
}

//! Instruction sets, and the choice of one at run time.

use super::Cast;
use super::block::{BlockLoop, specialize};

/// What the loops are compiled for. All give the same bits; only speed differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Isa {
    /// The target's baseline.
    Portable,
    /// 256-bit vectors.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// 512-bit vectors, with masks.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// Every instruction set compiled in, widest first.
    pub(super) const ALL: &[Self] = &[
        #[cfg(target_arch = "x86_64")]
        Self::Avx512,
        #[cfg(target_arch = "x86_64")]
        Self::Avx2,
        Self::Portable,
    ];

    /// Whether this processor has it. (The standard library asks the processor once and keeps the answer.)
    pub(super) fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
            }
        }
    }

    /// The widest that this processor has.
    pub(super) fn detect() -> Self {
        Self::ALL.iter().copied().find(|isa| isa.is_available()).unwrap_or(Self::Portable)
    }

    /// Runs `work` compiled for this instruction set.
    ///
    /// # Panics
    /// The processor does not have it.
    pub(super) fn run<L: BlockLoop>(self, cast: Cast, work: L) -> L::Output {
        assert!(self.is_available(), "this processor has no {self:?}");
        match self {
            Self::Portable => specialize(cast, work),
            // SAFETY: the processor has the features, asserted above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { avx2(cast, work) },
            // SAFETY: the processor has the features, asserted above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { avx512(cast, work) },
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

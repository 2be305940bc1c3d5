//! Quantization methods: one file each.

mod nearest;

use kernels::mx::{Cast, Energy, NonFinite, Values};

pub use nearest::DirectCast;

/// Rows of one weight, on their way to an MX format.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// Name of the weight, unique in the checkpoint.
    pub tensor: &'a str,
    /// Whole rows `[_, K]`.
    pub values: Values<'a>,
    /// Index in the tensor of the first value.
    pub first_index: u64,
}

/// A method that needs no more than the rows themselves.
pub trait Quantizer: Sync {
    /// Name in records and reports.
    fn name(&self) -> &'static str;

    /// Writes the packed codes and scales of `rows`; returns what was lost.
    ///
    /// # Errors
    /// The first NaN or Inf.
    fn quantize(
        &self,
        cast: Cast,
        rows: Rows<'_>,
        codes: &mut [u8],
        scales: &mut [u8],
    ) -> Result<Energy, NonFinite>;
}

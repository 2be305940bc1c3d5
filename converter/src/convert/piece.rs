//! One piece of a tensor: read, converted, written.

use std::ops::Range;

use half::bf16;
use kernels::DenseDtype;
use kernels::mx::{Energy, Scheme, Values};
use models::checkpoint::{dense_dtype, to_f32};
use safetensors::Dtype;

use super::job::Job;
use crate::error::ConvertError;
use crate::finite::{self, first_non_finite};
use crate::output::Target;
use crate::plan::Action;
use crate::quantize::{QuantizeError, Quantizer, Rows};
use crate::source::Source;

/// A worker's buffers, reused from piece to piece.
#[derive(Default)]
pub(super) struct Scratch {
    values: Vec<u8>,
    codes: Vec<u8>,
    scales: Vec<u8>,
}

impl Job<'_> {
    /// Reads, converts and writes one piece.
    pub(super) fn piece(
        &self,
        tensor: usize,
        range: &Range<u64>,
        s: &mut Scratch,
    ) -> Result<Energy, ConvertError> {
        let planned = &self.plan.tensors[tensor];
        self.source.read(planned.source, range, &mut s.values)?;
        let energy = match (planned.action, self.output.targets[tensor]) {
            (Action::Quantize(scheme), Target::Mx { codes, scales }) => {
                let first_index = self.quantize(planned.source, &planned.name, scheme, range, s)?;
                let format = scheme.weight.format;
                let bits = u64::from(format.element.spec().bits);
                self.sink.write(codes, first_index.index * bits / 8, &s.codes)?;
                self.sink.write(scales, first_index.index / format.block.size() as u64, &s.scales)?;
                first_index.energy
            }
            (Action::ToBf16, Target::Dense(slot)) => {
                s.codes.clear();
                s.codes.extend(s.values.chunks_exact(4).flat_map(|b| {
                    bf16::from_f32(f32::from_le_bytes([b[0], b[1], b[2], b[3]])).to_le_bytes()
                }));
                // After rounding, which can overflow.
                self.check_finite(planned.source, Dtype::BF16, range.start / 4, &s.codes)?;
                self.sink.write(slot, range.start / 2, &s.codes)?;
                Energy::default()
            }
            (Action::Copy, Target::Dense(slot)) => {
                let dtype = self.source.tensors()[planned.source].dtype;
                let first_index = range.start * 8 / dtype.bitsize() as u64;
                self.check_finite(planned.source, dtype, first_index, &s.values)?;
                self.sink.write(slot, range.start, &s.values)?;
                Energy::default()
            }
            (Action::Quantize(_), Target::Dense(_)) | (Action::Copy | Action::ToBf16, Target::Mx { .. }) => {
                unreachable!("the output has codes and scales for what is quantized, and for nothing else")
            }
        };
        self.progress.advance(range.end - range.start);
        Ok(energy)
    }

    /// Quantizes `s.values`, whole rows that start at byte `range.start` of the tensor, into `s.codes`, `s.scales`.
    fn quantize(
        &self,
        source: usize,
        name: &str,
        scheme: Scheme,
        range: &Range<u64>,
        s: &mut Scratch,
    ) -> Result<Quantized, ConvertError> {
        let cast = scheme.weight;
        let tensor = &self.source.tensors()[source];
        let dtype = dense_dtype(tensor.dtype).expect("the plan quantizes BF16, F16 and F32 only");
        let first_index = range.start / dtype.size_bytes() as u64;
        let elements = s.values.len() / dtype.size_bytes();
        let dtype = if scheme.rotation.is_some() {
            // Before one NaN makes a whole block NaN.
            self.check_finite(source, tensor.dtype, first_index, &s.values)?;
            let mut rows = to_f32(dtype, &s.values);
            scheme.rotate(&mut rows);
            s.values.clear();
            s.values.extend(rows.iter().flat_map(|value| value.to_le_bytes()));
            DenseDtype::F32
        } else {
            dtype
        };
        let values = match dtype {
            DenseDtype::Bf16 => Values::Bf16(&s.values),
            DenseDtype::F16 => Values::F16(&s.values),
            DenseDtype::F32 => Values::F32(&s.values),
        };
        s.codes.resize(cast.format.code_bytes(elements), 0);
        s.scales.resize(cast.format.scale_bytes(elements), 0);
        let rows = Rows { tensor: name, values, first_index };
        let quantizer: &dyn Quantizer = match self.calibrated {
            Some(calibrated) if calibrated.contains(name) => calibrated,
            _ => self.direct,
        };
        let energy = quantizer
            .quantize(cast, rows, &mut s.codes, &mut s.scales)
            .map_err(|error| quantize_error(self.source, source, error))?;
        Ok(Quantized { index: first_index, energy })
    }

    /// Refuses NaN and Inf in values that are written as they are; `first_index` is the first one's in the tensor.
    fn check_finite(
        &self,
        source: usize,
        dtype: Dtype,
        first_index: u64,
        bytes: &[u8],
    ) -> Result<(), ConvertError> {
        match first_non_finite(dtype, bytes) {
            None => Ok(()),
            Some((index, value)) => Err(finite::error(self.source, source, first_index + index, value)),
        }
    }
}

fn quantize_error(source: &Source, tensor: usize, error: QuantizeError) -> ConvertError {
    match error {
        QuantizeError::NonFinite(bad) => finite::error(source, tensor, bad.index as u64, bad.value),
        QuantizeError::Io { path, error } => ConvertError::Io { path, error },
    }
}

/// A quantized piece.
struct Quantized {
    /// Index in the tensor of its first element.
    index: u64,
    energy: Energy,
}

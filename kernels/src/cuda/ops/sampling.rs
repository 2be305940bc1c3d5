//! Launchers of `sampling.cu` and `logprobs.cu`.

use std::sync::Arc;

use super::{address, int};
use crate::backend::{SampleParams, TokenLogprobs};
use crate::buffer::{Buffer, Dtype};
use crate::cuda::{Context, DeviceBuffer, DevicePtr, Function, Launch};
use crate::error::Result;

/// `ROW_CTAS` and `ROW_THREADS` of `vocabulary.cuh`.
const ROW_BLOCKS: usize = 8;
const ROW_THREADS: u32 = 512;

/// Largest vocabulary whose weights the blocks of a row hold in shared memory.
const MAX_VOCABULARY: usize = ROW_BLOCKS * 48 * 1024;

/// Drawing tokens.
#[derive(Debug)]
pub(crate) struct SampleOperator {
    context: Arc<Context>,
    kernel: Function,
}

/// `SampleRow` of `sampling.cu`, as bytes: four words and two double words.
const SAMPLE_ROW_BYTES: usize = 32;

impl SampleOperator {
    pub(crate) fn new(context: &Arc<Context>) -> Self {
        Self { kernel: context.function("ops_sample"), context: Arc::clone(context) }
    }

    /// Bytes of the parameters of `rows` rows.
    pub(crate) const fn parameter_bytes(rows: usize) -> usize {
        rows * SAMPLE_ROW_BYTES
    }

    /// Writes parameters as the kernel reads them; `bytes` has [`parameter_bytes`](Self::parameter_bytes).
    pub(crate) fn write_parameters(params: &[SampleParams], bytes: &mut [u8]) {
        assert_eq!(bytes.len(), Self::parameter_bytes(params.len()), "bytes of the parameters");
        for (row, out) in params.iter().zip(bytes.chunks_exact_mut(SAMPLE_ROW_BYTES)) {
            let SampleParams { temperature, top_k, top_p, min_p, seed, draw } = *row;
            let fields = [
                &temperature.to_ne_bytes()[..],
                &top_p.to_ne_bytes(),
                &min_p.to_ne_bytes(),
                &top_k.unwrap_or(u32::MAX).to_ne_bytes(),
                &seed.to_ne_bytes(),
                &draw.to_ne_bytes(),
            ];
            let mut rest = out;
            for field in fields {
                let (head, tail) = rest.split_at_mut(field.len());
                head.copy_from_slice(field);
                rest = tail;
            }
        }
    }

    /// Draws one token for each of `rows` rows of `logits` F32 `[rows, width]` into `out` U32; `parameters` is what
    /// [`write_parameters`](Self::write_parameters) wrote, where the device can read it.
    pub(crate) fn sample(
        &self,
        logits: &Buffer,
        width: usize,
        rows: usize,
        parameters: DevicePtr,
        out: &mut Buffer,
    ) {
        if rows == 0 {
            return;
        }
        assert!(width <= MAX_VOCABULARY, "{width} tokens; the sampling kernel takes {MAX_VOCABULARY}");
        let logits = address(logits, Dtype::F32, rows * width);
        let out = address(out, Dtype::U32, rows);
        let launch = Launch::new((rows * ROW_BLOCKS) as u32, ROW_THREADS)
            .cluster(ROW_BLOCKS as u32)
            .shared((width.div_ceil(ROW_BLOCKS) * 4) as u32);
        // SAFETY: logits and tokens have the elements checked above, parameters those of `rows` rows, as the caller
        // promises.
        unsafe { self.context.launch(&self.kernel, &launch, &[&logits, &parameters, &out, &int(width)]) };
    }
}

/// Log-probabilities.
#[derive(Debug)]
pub(crate) struct LogprobsOperator {
    context: Arc<Context>,
    kernel: Function,
}

impl LogprobsOperator {
    pub(crate) fn new(context: &Arc<Context>) -> Self {
        Self { kernel: context.function("ops_logprobs"), context: Arc::clone(context) }
    }

    /// Log-probabilities of `targets[i]` in row `rows[i]` of `logits` F32 `[_, width]`, with the `top` best tokens. Waits
    /// for them.
    ///
    /// # Errors
    /// Out of memory.
    pub(crate) fn logprobs(
        &self,
        logits: &Buffer,
        width: usize,
        rows: &[usize],
        targets: &[u32],
        top: usize,
    ) -> Result<Vec<TokenLogprobs>> {
        assert_eq!(rows.len(), targets.len(), "one target per row");
        assert!(targets.iter().all(|&target| (target as usize) < width), "targets are tokens");
        let Some(&last) = rows.iter().max() else { return Ok(Vec::new()) };
        let (count, top) = (rows.len(), top.min(width));
        let logits = address(logits, Dtype::F32, (last + 1) * width);
        let inputs: Vec<u8> = rows
            .iter()
            .map(|&row| row as u32)
            .chain(targets.iter().copied())
            .flat_map(u32::to_ne_bytes)
            .collect();
        let results = count * (1 + top) * 4;
        let mut memory =
            DeviceBuffer::uninitialized(&self.context, inputs.len() + 2 * results, "log-probabilities")?;
        memory.write(0, &inputs);
        let (row_ids, target_ids) = (memory.ptr(), memory.ptr() + count as u64 * 4);
        let values = memory.ptr() + inputs.len() as u64;
        let ids = values + results as u64;
        let launch = Launch::new((count * ROW_BLOCKS) as u32, ROW_THREADS)
            .cluster(ROW_BLOCKS as u32)
            .after_everything();
        // SAFETY: rows and targets are inside the logits, as checked above; the memory has room for inputs and results.
        unsafe {
            self.context.launch(
                &self.kernel,
                &launch,
                &[&logits, &row_ids, &target_ids, &values, &ids, &int(width), &int(top)],
            );
        }
        let mut bytes = vec![0; 2 * results];
        memory.read(inputs.len(), &mut bytes);
        let (words, _) = bytes.as_chunks::<4>();
        let (values, ids) = words.split_at(count * (1 + top));
        let per_row = values.chunks_exact(1 + top).zip(ids.chunks_exact(1 + top));
        Ok(per_row
            .map(|(values, ids)| TokenLogprobs {
                logprob: f32::from_ne_bytes(values[0]),
                rank: u32::from_ne_bytes(ids[0]),
                top: (ids[1..].iter().map(|&id| u32::from_ne_bytes(id)))
                    .zip(values[1..].iter().map(|&value| f32::from_ne_bytes(value)))
                    .collect(),
            })
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_laid_out_as_the_kernel_reads_them() {
        let params =
            SampleParams { temperature: 0.5, top_k: None, top_p: 0.25, min_p: 0.125, seed: 7, draw: 9 };
        let mut bytes = [0; SAMPLE_ROW_BYTES];
        SampleOperator::write_parameters(&[params], &mut bytes);
        let word = |i: usize| u32::from_ne_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        assert_eq!([word(0), word(4), word(8)].map(f32::from_bits), [0.5, 0.25, 0.125]);
        assert_eq!(word(12), u32::MAX);
        assert_eq!((bytes[16], bytes[24]), (7, 9), "little-endian double words");
    }
}

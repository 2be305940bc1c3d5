//! Decode steps that the device has recorded, one for each of a ladder of batch sizes: a batch in between is padded.

use kernels::{Backend, Graph};
use models::{KvCache, Model, OutputRows, StepInputs, StepSequence, Workspace};

/// Recorded steps of one token per sequence, from the inputs to the logits; none on a device that records nothing.
#[derive(Debug)]
pub(super) struct DecodeGraphs {
    /// Ascending by batch size.
    graphs: Vec<(usize, Graph)>,
    /// The block that sequences of padding write to.
    scratch_block: [u32; 1],
}

/// What the recorded steps work on; what comes later to its memory, they see.
pub(super) struct DecodeStep<'a> {
    pub(super) backend: &'a dyn Backend,
    pub(super) model: &'a dyn Model,
    pub(super) inputs: &'a mut StepInputs,
    pub(super) kv_cache: &'a mut KvCache,
    pub(super) workspace: &'a mut Workspace,
}

impl DecodeGraphs {
    /// Records steps of up to `max_sequences` sequences. Their padding uses block `scratch_block` of the cache, which
    /// no sequence has.
    pub(super) fn record(step: DecodeStep<'_>, max_sequences: usize, scratch_block: u32) -> Self {
        let DecodeStep { backend, model, inputs, kv_cache, workspace } = step;
        let mut this = Self { graphs: Vec::new(), scratch_block: [scratch_block] };
        if !backend.captures() {
            return this;
        }
        let max_sequences = max_sequences.min(workspace.max_logit_rows());
        let rows: Vec<u32> = (0..max_sequences as u32).collect();
        // The largest first, so that no scratch memory grows later.
        for size in batch_sizes(max_sequences).into_iter().rev() {
            inputs.fill(backend, &this.padding(size), OutputRows::All);
            let mut step = || {
                model.forward(backend, inputs, kv_cache, workspace);
                model.logits(backend, &rows[..size], workspace);
            };
            step();
            this.graphs.push((size, backend.capture(&mut step)));
        }
        this.graphs.reverse();
        this
    }

    /// The smallest recorded step that holds `sequences` sequences, and how many it has.
    pub(super) fn for_sequences(&self, sequences: usize) -> Option<(usize, &Graph)> {
        let at = self.graphs.partition_point(|&(size, _)| size < sequences);
        self.graphs.get(at).map(|(size, graph)| (*size, graph))
    }

    /// `count` sequences that nobody asked for.
    pub(super) fn padding(&self, count: usize) -> Vec<StepSequence<'_>> {
        let one = StepSequence { tokens: &[0], first_position: 0, block_table: &self.scratch_block };
        vec![one; count]
    }
}

/// 1, 2, 4, then in steps of 8, of 16 from 64 on, of 32 from 128 on, of 64 from 256 on, and `max` itself: padding
/// costs little where the batch hardly changes the time of a step, and at most a fifth of the rows beyond.
fn batch_sizes(max: usize) -> Vec<usize> {
    let mut sizes = Vec::new();
    let mut size = 1;
    while size < max {
        sizes.push(size);
        size += match size {
            0..4 => size,
            4 => 4,
            5..64 => 8,
            64..128 => 16,
            128..256 => 32,
            _ => 64,
        };
    }
    sizes.push(max);
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ladder_ends_at_the_largest_batch() {
        assert_eq!(batch_sizes(1), [1]);
        assert_eq!(batch_sizes(3), [1, 2, 3]);
        assert_eq!(batch_sizes(20), [1, 2, 4, 8, 16, 20]);
        let sizes = batch_sizes(256);
        assert_eq!(sizes[..12], [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80]);
        assert_eq!(sizes[12..], [96, 112, 128, 160, 192, 224, 256]);
        assert_eq!(batch_sizes(300).last(), Some(&300));
    }
}

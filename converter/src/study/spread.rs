//! How far the magnitudes that share a scale lie apart.

use serde::Serialize;

use super::design::{BLOCKS, Organisation};
use super::measure::{Operand, Sample};

/// The ratios that are counted.
pub(super) const RATIOS: [f32; 3] = [2.0, 10.0, 100.0];

/// Of the blocks of some tensors, those whose largest magnitude is many times their smallest, zeros left out.
#[derive(Debug, Clone, Serialize)]
pub struct Spread {
    /// Weights or activations.
    pub operand: Operand,
    /// Modules: `q_proj`; of activations, those that read them.
    pub modules: String,
    /// Block shape.
    pub organisation: Organisation,
    /// Block size k.
    pub block: usize,
    /// Share of blocks above 2, 10 and 100 times.
    pub share_above: [f64; 3],
    /// The middle one of the ratios.
    pub median: f64,
}

/// Spreads by kind of tensor, for every block size and shape.
pub(super) fn spreads(samples: &[Sample<'_>]) -> Vec<Spread> {
    let mut kinds: Vec<(Operand, &str)> = Vec::new();
    for sample in samples {
        if !kinds.contains(&(sample.operand, &sample.kind)) {
            kinds.push((sample.operand, &sample.kind));
        }
    }
    let mut all = Vec::new();
    for (operand, modules) in kinds {
        for organisation in Organisation::ALL {
            for block in BLOCKS {
                let of_kind = samples.iter().filter(|s| (s.operand, s.kind.as_str()) == (operand, modules));
                let mut ratios: Vec<f32> = of_kind
                    .flat_map(|sample| sample.matrix.block_spreads(organisation.shape(block)))
                    .collect();
                ratios.sort_by(f32::total_cmp);
                let above = |limit| ratios.len() - ratios.partition_point(|&ratio| ratio <= limit);
                let share = |limit| above(limit) as f64 / ratios.len().max(1) as f64;
                all.push(Spread {
                    operand,
                    modules: modules.to_owned(),
                    organisation,
                    block,
                    share_above: RATIOS.map(share),
                    median: ratios.get(ratios.len() / 2).map_or(1.0, |&ratio| f64::from(ratio)),
                });
            }
        }
    }
    all
}

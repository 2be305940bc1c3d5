//! Which kernel computes a product of many rows, chosen by what each is expected to take.

use super::prefill::expanded_bytes;
use crate::tile::{TILE_ROWS, TileLayout};

/// Tokens that a block of a kernel computes at a time: one kernel each.
pub(super) const TOKENS: [u32; 3] = [64, 128, 256];

/// Blocks of a cluster, for each of [`TOKENS`] with BF16. With E4M3 sharing x gains nothing.
const CLUSTERS: [u32; TOKENS.len()] = [1, 1, 2];

/// Rows of the weight that a block computes at a time.
pub(super) const BLOCK_ROWS: usize = 128;

/// Blocks of 256 tokens whose rows of x stay in L2 while the weight streams past them.
const GROUP_TOKENS: u32 = 4 * 256;

/// Most bytes of expanded weights at a time. Parts that fit in L2 gained nothing (measured), and end in partly filled
/// waves.
const EXPANDED_BYTES: usize = 128 << 20;

/// Clock cycles of a block for each of [`TOKENS`] and 64 of K with BF16, measured, and what it takes besides.
const BF16_CYCLES: [f64; TOKENS.len()] = [580.0, 740.0, 1160.0];
/// As above with E4M3 and the largest of [`TOKENS`].
const E4M3_CYCLES: f64 = 665.0;
const BLOCK_CYCLES: f64 = 5000.0;
/// Bytes that an expansion reads and writes in a cycle, and what its launch takes.
const EXPAND_BYTES_PER_CYCLE: f64 = 2000.0;
const LAUNCH_CYCLES: f64 = 3000.0;

/// What the tensor core multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operand {
    /// BF16: holds every value of every MX format.
    Bf16,
    /// E4M3, with a power of two per row and token.
    E4m3,
}

/// How a product is computed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Plan {
    pub(super) operand: Operand,
    /// Which of [`TOKENS`].
    pub(super) tokens: usize,
    /// Blocks of tokens between which x stays in L2.
    pub(super) group: u32,
    /// Row tiles that are expanded and multiplied at a time; all of them if nothing is expanded.
    pub(super) chunk_row_tiles: usize,
}

impl Plan {
    /// The plan for `rows` rows and weights of `layout`. `e4m3` allows E4M3.
    pub(super) fn new(rows: usize, layout: &TileLayout, e4m3: bool, sm_count: u32) -> Self {
        let row_tiles = layout.row_tiles();
        let waves = |tokens: usize, cluster: u32, row_tiles: usize| {
            let cluster = cluster as usize;
            let row_blocks = (row_tiles * TILE_ROWS).div_ceil(BLOCK_ROWS * cluster);
            (row_blocks * rows.div_ceil(TOKENS[tokens] as usize)).div_ceil(sm_count as usize / cluster) as f64
        };
        let k_tiles = layout.k_tiles() as f64;
        let (tokens, cycles) = (0..TOKENS.len())
            .map(|i| (i, waves(i, CLUSTERS[i], row_tiles) * (BLOCK_CYCLES + k_tiles * BF16_CYCLES[i])))
            .min_by(|a, b| a.1.total_cmp(&b.1))
            .expect("there are kernels");
        let group = |tokens: usize| GROUP_TOKENS / TOKENS[tokens];
        let bf16 = Self { operand: Operand::Bf16, tokens, group: group(tokens), chunk_row_tiles: row_tiles };
        if !e4m3 {
            return bf16;
        }
        let tokens = TOKENS.len() - 1;
        let (chunk, chunks) = chunk(layout);
        let expand_bytes = layout.bytes() + expanded_bytes(row_tiles, layout.k_tiles());
        let e4m3_cycles = chunks as f64
            * (waves(tokens, 1, chunk) * (BLOCK_CYCLES + k_tiles * E4M3_CYCLES) + 2.0 * LAUNCH_CYCLES)
            + expand_bytes as f64 / EXPAND_BYTES_PER_CYCLE;
        if e4m3_cycles < cycles {
            Self { operand: Operand::E4m3, tokens, group: group(tokens), chunk_row_tiles: chunk }
        } else {
            bf16
        }
    }

    /// Tokens that a block computes at a time.
    fn block_tokens(&self) -> u32 {
        TOKENS[self.tokens]
    }

    /// Blocks of the kernel's cluster, which load a part of x each.
    pub(super) fn cluster(&self) -> u32 {
        match self.operand {
            Operand::Bf16 => CLUSTERS[self.tokens],
            Operand::E4m3 => 1,
        }
    }

    /// Rows of x that one copy brings.
    pub(super) fn box_rows(&self) -> u32 {
        self.block_tokens() / self.cluster()
    }
}

/// Row tiles that are expanded at a time, whole blocks of the kernel, and how often that is.
fn chunk(layout: &TileLayout) -> (usize, usize) {
    let per_block = BLOCK_ROWS / TILE_ROWS;
    let blocks = layout.row_tiles().div_ceil(per_block);
    let bytes_per_block = expanded_bytes(per_block, layout.k_tiles());
    let chunks = (blocks * bytes_per_block).div_ceil(EXPANDED_BYTES).min(blocks);
    let chunk = blocks.div_ceil(chunks) * per_block;
    (chunk, layout.row_tiles().div_ceil(chunk))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tile::{RowOrder, TileFormat};

    fn layout(shape: [usize; 2]) -> TileLayout {
        TileLayout { format: TileFormat::E2m1, shape, order: RowOrder::Stacked }
    }

    #[test]
    fn large_products_take_the_largest_blocks() {
        let plan = Plan::new(4096, &layout([28672, 4096]), false, 132);
        assert_eq!((plan.operand, plan.block_tokens()), (Operand::Bf16, 256));
        let plan = Plan::new(4096, &layout([28672, 4096]), true, 132);
        assert_eq!((plan.operand, plan.block_tokens()), (Operand::E4m3, 256));
    }

    #[test]
    fn few_rows_are_not_worth_an_expansion() {
        let plan = Plan::new(65, &layout([4096, 4096]), true, 132);
        assert_eq!((plan.operand, plan.block_tokens()), (Operand::Bf16, 64));
    }

    #[test]
    fn chunks_are_whole_blocks_and_cover_the_weight() {
        for shape in [[1, 32], [4096, 4096], [28672, 4096], [130, 1 << 20], [128_256, 8192]] {
            let layout = layout(shape);
            let (chunk, chunks) = chunk(&layout);
            assert!(chunk.is_multiple_of(BLOCK_ROWS / TILE_ROWS) && chunk > 0, "{shape:?}");
            assert!(
                chunk * chunks >= layout.row_tiles() && chunk * (chunks - 1) < layout.row_tiles(),
                "{shape:?}"
            );
            let one_block = expanded_bytes(1, layout.k_tiles());
            let bytes = expanded_bytes(chunk, layout.k_tiles());
            assert!(bytes <= EXPANDED_BYTES.max(one_block), "{shape:?}: {bytes}");
        }
    }
}

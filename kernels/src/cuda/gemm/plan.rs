//! Which kernel computes a product of many rows, chosen by what each is expected to take.

use super::prefill::expanded_bytes;
use crate::tile::{TILE_ROWS, TileLayout};

/// Tokens that a block of a kernel computes at a time: one kernel each.
pub(super) const TOKENS: [u32; 3] = [64, 128, 256];

/// Blocks of a cluster, for each of [`TOKENS`] with BF16. With E4M3 sharing x gains nothing.
const CLUSTERS: [u32; TOKENS.len()] = [1, 1, 2];

/// Warpgroups of a block that multiply 64 rows of the weight each, for each of [`TOKENS`]. Few tokens leave registers for
/// four, which hide each other's waits.
const GROUPS: [u32; TOKENS.len()] = [4, 2, 2];
/// Those of the kernel for E4M3.
const E4M3_GROUPS: u32 = 2;
const GROUP_ROWS: usize = 64;

/// Tokens that a block of the kernel for E4M3 computes at a time: as many as its two sets of accumulators have registers.
const E4M3_TOKENS: u32 = 192;

/// Rows of the weight that are expanded as a block of E4M3.
pub(super) const EXPANDED_ROWS: usize = 128;

/// Most bytes of a block's results in F32.
pub(super) const MOST_RESULT_BYTES: usize = 128 << 10;

/// Parts of K that there are kernels for.
const PARTS: [usize; 4] = [1, 2, 4, 8];
/// Tiles along K of a part, at least.
const LEAST_PART_TILES: usize = 2;

/// Tokens whose rows of x stay in L2 while the weight streams past them: in BF16, and in E4M3, where they take half of it.
const GROUP_TOKENS: u32 = 4 * 256;
const E4M3_GROUP_TOKENS: u32 = 10 * E4M3_TOKENS;

/// Most bytes of expanded weights at a time. Parts that fit in L2 gained nothing (measured), and end in partly filled
/// waves.
const EXPANDED_BYTES: usize = 128 << 20;

/// Clock cycles of a block for each of [`TOKENS`] and 64 of K with BF16, measured, and what it takes besides.
const BF16_CYCLES: [f64; TOKENS.len()] = [1060.0, 740.0, 1160.0];
/// As above with E4M3.
const E4M3_CYCLES: f64 = 480.0;
const BLOCK_CYCLES: f64 = 5000.0;
/// What adding up parts of K takes, and bytes of a result that a block writes and reads for it in a cycle.
const EXCHANGE_CYCLES: f64 = 3000.0;
const EXCHANGE_BYTES_PER_CYCLE: f64 = 32.0;
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
    /// Which of [`TOKENS`], with BF16.
    pub(super) tokens: usize,
    /// Blocks of tokens between which x stays in L2.
    pub(super) group: u32,
    /// Row tiles that are expanded and multiplied at a time; all of them if nothing is expanded.
    pub(super) chunk_row_tiles: usize,
    /// Parts that K is cut into, so that there are blocks for all multiprocessors. With more than one, no multiprocessor
    /// has more than one block. Sums are added in the order of K.
    pub(super) parts: u32,
}

impl Plan {
    /// The plan for `rows` rows and weights of `layout`. `e4m3` allows E4M3.
    pub(super) fn new(rows: usize, layout: &TileLayout, e4m3: bool, sm_count: u32) -> Self {
        let row_tiles = layout.row_tiles();
        let (bf16_cycles, tokens, parts) = (0..TOKENS.len())
            .map(|tokens| {
                let block = [GROUPS[tokens], TOKENS[tokens]];
                let blocks = Blocks::new(block, CLUSTERS[tokens], rows, row_tiles, sm_count);
                let (cycles, parts) = blocks.cut(layout.k_tiles(), BF16_CYCLES[tokens]);
                (cycles, tokens, parts)
            })
            .min_by(|a, b| a.0.total_cmp(&b.0))
            .expect("there are kernels");
        let group = GROUP_TOKENS / TOKENS[tokens];
        let bf16 = Self { operand: Operand::Bf16, tokens, group, chunk_row_tiles: row_tiles, parts };
        if !e4m3 {
            return bf16;
        }
        let (chunk, chunks) = chunk(layout);
        let expand_bytes = layout.bytes() + expanded_bytes(row_tiles, layout.k_tiles());
        let (chunk_cycles, parts) = Blocks::new([E4M3_GROUPS, E4M3_TOKENS], 1, rows, chunk, sm_count)
            .cut(layout.k_tiles(), E4M3_CYCLES);
        let e4m3_cycles = chunks as f64 * (chunk_cycles + 2.0 * LAUNCH_CYCLES)
            + expand_bytes as f64 / EXPAND_BYTES_PER_CYCLE;
        if e4m3_cycles < bf16_cycles {
            let group = E4M3_GROUP_TOKENS / E4M3_TOKENS;
            Self { operand: Operand::E4m3, tokens, group, chunk_row_tiles: chunk, parts }
        } else {
            bf16
        }
    }

    /// Tokens that a block computes at a time.
    fn block_tokens(&self) -> u32 {
        match self.operand {
            Operand::Bf16 => TOKENS[self.tokens],
            Operand::E4m3 => E4M3_TOKENS,
        }
    }

    /// Warpgroups of a block that multiply.
    pub(super) fn groups(&self) -> u32 {
        match self.operand {
            Operand::Bf16 => GROUPS[self.tokens],
            Operand::E4m3 => E4M3_GROUPS,
        }
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

/// The blocks that a result is computed in.
struct Blocks {
    /// Clusters of blocks, and how many run at a time.
    count: usize,
    at_a_time: usize,
    result_bytes: usize,
}

impl Blocks {
    /// Those of `groups` warpgroups and `tokens` tokens.
    fn new([groups, tokens]: [u32; 2], cluster: u32, rows: usize, row_tiles: usize, sm_count: u32) -> Self {
        let (block_rows, block_tokens) = (groups as usize * GROUP_ROWS, tokens as usize);
        let row_blocks = (row_tiles * TILE_ROWS).div_ceil(block_rows * cluster as usize);
        Self {
            count: row_blocks * rows.div_ceil(block_tokens),
            at_a_time: (sm_count / cluster) as usize,
            result_bytes: block_rows * block_tokens * size_of::<f32>(),
        }
    }

    /// Cycles of a product over `k_tiles` tiles that take `tile_cycles` each, with K in as many parts as make them the
    /// least.
    fn cut(&self, k_tiles: usize, tile_cycles: f64) -> (f64, u32) {
        let most = (self.at_a_time / self.count).min(k_tiles / LEAST_PART_TILES).max(1);
        PARTS
            .into_iter()
            .filter(|&parts| parts <= most)
            .map(|parts| {
                let waves = (self.count * parts).div_ceil(self.at_a_time) as f64;
                let tiles = k_tiles.div_ceil(parts) as f64;
                let exchange = EXCHANGE_CYCLES + self.result_bytes as f64 / EXCHANGE_BYTES_PER_CYCLE;
                let exchange = if parts > 1 { exchange } else { 0.0 };
                (waves * (BLOCK_CYCLES + tiles * tile_cycles) + exchange, parts as u32)
            })
            .min_by(|a, b| a.0.total_cmp(&b.0))
            .expect("there is one part at least")
    }
}

/// Row tiles that are expanded at a time, whole blocks of the kernel, and how often that is.
fn chunk(layout: &TileLayout) -> (usize, usize) {
    let per_block = EXPANDED_ROWS / TILE_ROWS;
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
        assert_eq!((plan.operand, plan.block_tokens()), (Operand::E4m3, 192));
    }

    #[test]
    fn few_blocks_cut_k_so_that_every_multiprocessor_has_one() {
        for (shape, parts) in [([4096, 4096], 8), ([6144, 4096], 4), ([28_672, 4096], 1)] {
            let plan = Plan::new(64, &layout(shape), false, 132);
            assert_eq!((plan.block_tokens(), plan.parts), (64, parts), "{shape:?}");
        }
        for rows in [33, 64, 100, 256, 300, 1024, 5000] {
            for shape in [[16, 64], [1000, 192], [4096, 14_336], [6144, 4096], [128_256, 4096]] {
                for e4m3 in [false, true] {
                    let plan = Plan::new(rows, &layout(shape), e4m3, 132);
                    let block_rows = plan.groups() as usize * GROUP_ROWS * plan.cluster() as usize;
                    let blocks = shape[0].div_ceil(block_rows) * rows.div_ceil(plan.block_tokens() as usize);
                    let running = blocks * (plan.cluster() * plan.parts) as usize;
                    assert!(plan.parts == 1 || running <= 132, "{rows} rows, {shape:?}: {plan:?}");
                    assert!(
                        plan.parts as usize <= shape[1].div_ceil(128),
                        "{rows} rows, {shape:?}: {plan:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn few_rows_are_not_worth_an_expansion() {
        let plan = Plan::new(40, &layout([4096, 4096]), true, 132);
        assert_eq!((plan.operand, plan.block_tokens()), (Operand::Bf16, 64));
    }

    #[test]
    fn chunks_are_whole_blocks_and_cover_the_weight() {
        for shape in [[1, 32], [4096, 4096], [28672, 4096], [130, 1 << 20], [128_256, 8192]] {
            let layout = layout(shape);
            let (chunk, chunks) = chunk(&layout);
            assert!(chunk.is_multiple_of(EXPANDED_ROWS / TILE_ROWS) && chunk > 0, "{shape:?}");
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

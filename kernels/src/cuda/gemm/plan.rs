//! Which kernel computes a product of many rows, chosen by what each is expected to take.

use super::prefill::expanded_bytes;
use crate::tile::{TILE_ROWS, TileFormat, TileLayout};

/// A kernel: what its blocks are.
#[derive(Debug)]
pub(super) struct Kernel {
    /// Tokens that a block computes at a time.
    pub(super) tokens: u32,
    /// Warpgroups of a block that multiply 64 rows of the weight each.
    pub(super) groups: u32,
    /// Blocks of a cluster, which load a part of x each.
    pub(super) cluster: u32,
    /// Clock cycles of a block for 64 of K, measured.
    tile_cycles: f64,
}

/// Kernels for packed weights in BF16. Few tokens leave registers for four warpgroups, which hide each other's waits.
pub(super) const BF16: [Kernel; 3] = [
    Kernel { tokens: 64, groups: 4, cluster: 1, tile_cycles: 860.0 },
    Kernel { tokens: 128, groups: 2, cluster: 1, tile_cycles: 660.0 },
    Kernel { tokens: 256, groups: 2, cluster: 2, tile_cycles: 1170.0 },
];
/// The kernel for packed FP4 in E4M3. With fewer tokens it is no faster than BF16: decoding takes as long.
const E4M3: [Kernel; 1] = [Kernel { tokens: 256, groups: 2, cluster: 1, tile_cycles: 940.0 }];
/// The kernel for expanded weights: as many tokens as its two sets of accumulators have registers.
const EXPANDED: [Kernel; 1] = [Kernel { tokens: 192, groups: 2, cluster: 1, tile_cycles: 540.0 }];

/// Rows of the weight that a warpgroup multiplies.
const GROUP_ROWS: usize = 64;

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
const E4M3_GROUP_TOKENS: u32 = 10 * 192;

/// Most bytes of expanded weights at a time. Parts that fit in L2 gained nothing (measured), and end in partly filled
/// waves.
const EXPANDED_BYTES: usize = 128 << 20;

/// Clock cycles of a block besides those of its tiles.
const BLOCK_CYCLES: f64 = 5000.0;
/// What adding up parts of K takes, and bytes of a result that a block writes and reads for it in a cycle.
const EXCHANGE_CYCLES: f64 = 5500.0;
const EXCHANGE_BYTES_PER_CYCLE: f64 = 20.0;
/// Bytes that an expansion reads and writes in a cycle, and what its launch takes.
const EXPAND_BYTES_PER_CYCLE: f64 = 2000.0;
const LAUNCH_CYCLES: f64 = 3000.0;

/// How weights get to the tensor core, and as what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    /// Packed, to become BF16 in registers: holds every value of every MX format.
    Bf16,
    /// Packed, to become E4M3 in registers, with a power of two per row and token.
    E4m3,
    /// Expanded to E4M3 in memory before.
    Expanded,
}

impl Path {
    /// Its kernels.
    const fn kernels(self) -> &'static [Kernel] {
        match self {
            Self::Bf16 => &BF16,
            Self::E4m3 => &E4M3,
            Self::Expanded => &EXPANDED,
        }
    }

    /// Whether the activations are to be E4M3.
    pub(super) const fn is_e4m3(self) -> bool {
        !matches!(self, Self::Bf16)
    }
}

/// How a product is computed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Plan {
    pub(super) path: Path,
    /// Which of the path's kernels.
    pub(super) kernel: usize,
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
        let paths: &[Path] = match layout.format {
            _ if !e4m3 => &[Path::Bf16],
            TileFormat::E2m1 => &[Path::Bf16, Path::E4m3, Path::Expanded],
            _ => &[Path::Bf16, Path::Expanded],
        };
        let kernels =
            paths.iter().flat_map(|&path| (0..path.kernels().len()).map(move |kernel| (path, kernel)));
        let plans = kernels.map(|(path, kernel)| Self::with(path, kernel, rows, layout, sm_count));
        let (_, plan) = plans.min_by(|a, b| a.0.total_cmp(&b.0)).expect("there are kernels");
        plan
    }

    /// The plan with a kernel of `path`, and the clock cycles that it takes.
    fn with(path: Path, kernel: usize, rows: usize, layout: &TileLayout, sm_count: u32) -> (f64, Self) {
        let block = &path.kernels()[kernel];
        let group_tokens = if path.is_e4m3() { E4M3_GROUP_TOKENS } else { GROUP_TOKENS };
        let (row_tiles, k_tiles) = (layout.row_tiles(), layout.k_tiles());
        let (chunk_row_tiles, chunks) = if path == Path::Expanded { chunk(layout) } else { (row_tiles, 1) };
        let (mut cycles, parts) =
            Blocks::new(block, rows, chunk_row_tiles, sm_count).cut(k_tiles, block.tile_cycles);
        if path == Path::Expanded {
            let bytes = layout.bytes() + expanded_bytes(row_tiles, k_tiles);
            cycles = chunks as f64 * (cycles + 2.0 * LAUNCH_CYCLES) + bytes as f64 / EXPAND_BYTES_PER_CYCLE;
        }
        (cycles, Self { path, kernel, group: group_tokens / block.tokens, chunk_row_tiles, parts })
    }

    /// The kernel's blocks.
    pub(super) fn kernel(&self) -> &'static Kernel {
        &self.path.kernels()[self.kernel]
    }

    /// Rows of x that one copy brings.
    pub(super) fn box_rows(&self) -> u32 {
        self.kernel().tokens / self.kernel().cluster
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
    /// Those of `kernel`.
    fn new(kernel: &Kernel, rows: usize, row_tiles: usize, sm_count: u32) -> Self {
        let (block_rows, block_tokens) = (kernel.groups as usize * GROUP_ROWS, kernel.tokens as usize);
        let cluster = kernel.cluster;
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
    use crate::tile::RowOrder;

    fn layout(shape: [usize; 2]) -> TileLayout {
        TileLayout { format: TileFormat::E2m1, shape, order: RowOrder::Stacked }
    }

    #[test]
    fn large_products_take_the_largest_blocks() {
        let plan = Plan::new(4096, &layout([28672, 4096]), false, 132);
        assert_eq!((plan.path, plan.kernel().tokens), (Path::Bf16, 256));
        let plan = Plan::new(4096, &layout([28672, 4096]), true, 132);
        assert_eq!((plan.path, plan.kernel().tokens), (Path::Expanded, 192));
    }

    #[test]
    fn few_blocks_cut_k_so_that_every_multiprocessor_has_one() {
        for (shape, parts) in [([4096, 4096], 8), ([6144, 4096], 4), ([28_672, 4096], 1)] {
            let plan = Plan::new(64, &layout(shape), false, 132);
            assert_eq!((plan.kernel().tokens, plan.parts), (64, parts), "{shape:?}");
        }
        for rows in [33, 64, 100, 256, 300, 1024, 5000] {
            for shape in [[16, 64], [1000, 192], [4096, 14_336], [6144, 4096], [128_256, 4096]] {
                for e4m3 in [false, true] {
                    let plan = Plan::new(rows, &layout(shape), e4m3, 132);
                    let block_rows =
                        plan.kernel().groups as usize * GROUP_ROWS * plan.kernel().cluster as usize;
                    let blocks = shape[0].div_ceil(block_rows) * rows.div_ceil(plan.kernel().tokens as usize);
                    let running = blocks * (plan.kernel().cluster * plan.parts) as usize;
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
    fn few_rows_are_worth_no_e4m3_and_some_no_expansion() {
        for (rows, path, tokens) in [(40, Path::Bf16, 64), (128, Path::Bf16, 128), (256, Path::E4m3, 256)] {
            let plan = Plan::new(rows, &layout([28_672, 4096]), true, 132);
            assert_eq!((plan.path, plan.kernel().tokens), (path, tokens), "{rows} rows");
        }
        let fp6 = TileLayout { format: TileFormat::E2m3, ..layout([28_672, 4096]) };
        assert_eq!(Plan::new(256, &fp6, true, 132).path, Path::Bf16, "only FP4 is decoded to E4M3");
    }

    /// The shapes of `packed_weights_multiply_in_e4m3` in `tests/cuda/prefill.rs`.
    #[test]
    fn packed_e4m3_is_tested_on_a_gpu() {
        for ([rows, n, k], parts) in
            [([256, 20_000, 256], 1), ([250, 20_008, 352], 1), ([200, 4096, 8256], 4)]
        {
            let plan = Plan::new(rows, &layout([n, k]), true, 132);
            assert_eq!((plan.path, plan.parts), (Path::E4m3, parts), "{rows} x {n} x {k}");
        }
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

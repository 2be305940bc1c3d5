//! Products of few rows with tiled weights: launcher of `cuda/gemm/decode.cuh` and `decode_one.cuh`.

use std::sync::Arc;

use super::Product;
use crate::buffer::Dtype;
use crate::cuda::{Argument, Context, DevicePtr, Function, Launch, TiledWeight};
use crate::tile::{RowOrder, TILE_COLS, TILE_ROWS, TileFormat};

/// Warps of a CTA, as in the kernel.
const WARPS: u32 = 16;

/// CTAs of a cluster: they share the work along K.
const CLUSTERS: [usize; 4] = [1, 2, 4, 8];

/// Rows of x that a kernel computes at once: one kernel each, and one for a single row.
const M_TILES: [usize; 2] = [8, 16];

/// Most rows of x that leave room for a deep ring.
const FEW_ROWS: usize = 8;

/// Tiles that a warp takes together: it may read as much of x beyond the end.
const GROUP_TILES: usize = 4;

/// Kernels of a format: for one row, and for [`M_TILES`].
type Kernels<Kernel> = (Kernel, [Kernel; M_TILES.len()]);

macro_rules! kernels {
    ($($format:literal $segments:literal),* $(,)?) => {
        [$((
            concat!("decode_", $format, "_one_k", $segments),
            [
                concat!("decode_", $format, "_m8_k", $segments),
                concat!("decode_", $format, "_m16_k", $segments),
            ],
        )),*]
    };
}

/// Kernels, in the order of [`TileFormat::ALL`]; the last for [`FEW_SEGMENTS`].
const KERNELS: [Kernels<&str>; TileFormat::ALL.len() + 1] =
    kernels!("e2m1" 8, "e2m3" 8, "e3m2" 8, "e4m3" 8, "e5m2" 8, "int8" 8, "bf16" 8, "e2m1" 4);

/// Parts that K is split into.
const SEGMENTS: usize = 8;

/// Parts of K of an FP4 weight of at least [`MANY_ROW_TILES`]: its tiles are read so fast that adding up parts shows.
const FEW_SEGMENTS: usize = 4;
const MANY_ROW_TILES: usize = 384;

/// Least shared memory of a block: more than half of a multiprocessor's. A kernel whose blocks start while those before it
/// still run would otherwise get two on one multiprocessor and none on another.
const LEAST_SHARED_BYTES: usize = 116 * 1024;

/// Tiles of a stage of a warp's ring, and stages, as `decode.cu` instantiates them for one row.
const fn one_row_ring(format: TileFormat) -> [usize; 2] {
    match format {
        TileFormat::E2m1 | TileFormat::E2m3 | TileFormat::E3m2 => [4, 2],
        TileFormat::E4m3 | TileFormat::E5m2 | TileFormat::Int8 => [2, 2],
        TileFormat::Bf16 => [1, 4],
    }
}

/// The same for several rows.
const fn ring(format: TileFormat, rows: usize) -> [usize; 2] {
    let few = rows <= FEW_ROWS;
    match format {
        TileFormat::E2m1 if few => [4, 3],
        TileFormat::E2m1 => [2, 3],
        TileFormat::E2m3 | TileFormat::E3m2 if few => [4, 2],
        TileFormat::E2m3 | TileFormat::E3m2 => [2, 2],
        TileFormat::E4m3 | TileFormat::E5m2 | TileFormat::Int8 if few => [2, 3],
        TileFormat::E4m3 | TileFormat::E5m2 | TileFormat::Int8 => [1, 3],
        TileFormat::Bf16 if few => [1, 4],
        TileFormat::Bf16 => [1, 2],
    }
}

/// The kernel's parameter (`Params` in `decode.cuh`).
#[derive(Debug)]
#[repr(C)]
struct Params {
    tiles: DevicePtr,
    factors: DevicePtr,
    bias: DevicePtr,
    x: DevicePtr,
    out: DevicePtr,
    m: i32,
    n: i32,
    k: i32,
    row_tiles: i32,
    k_tiles: i32,
    cluster: i32,
    out_width: i32,
    column: i32,
    out_is_f32: i32,
    is_gated: i32,
}

// SAFETY: numbers and addresses in the order of the kernel's structure.
unsafe impl Argument for Params {}

/// How a product is computed.
#[derive(Debug, Clone, Copy)]
struct Plan {
    /// Launches, which share the rows.
    passes: usize,
    /// CTAs of a cluster.
    cluster: usize,
    /// Which of [`M_TILES`]; none for the kernel for one row.
    tile: Option<usize>,
    /// Dynamic shared memory of the pass with the most rows.
    shared_bytes: usize,
}

/// The kernels for few rows.
#[derive(Debug)]
pub(crate) struct DecodeGemm {
    context: Arc<Context>,
    kernels: Vec<Kernels<Function>>,
    /// Clusters of each size of [`CLUSTERS`] that run at once; 0 where the device has no room for one.
    clusters: [usize; CLUSTERS.len()],
}

impl DecodeGemm {
    pub(crate) fn new(context: &Arc<Context>) -> Self {
        let function = |name| context.function(name);
        let kernels: Vec<Kernels<Function>> =
            KERNELS.iter().map(|&(one, several)| (function(one), several.map(function))).collect();
        let shared = context.properties().max_shared_bytes;
        let clusters = CLUSTERS.map(|cluster| {
            let launch = Launch::new(cluster as u32, 32 * WARPS).shared(shared).cluster(cluster as u32);
            context.most_clusters(&kernels[0].1[0], &launch)
        });
        Self { context: Arc::clone(context), kernels, clusters }
    }

    /// Computes `product`, streaming the weight as few times as shared memory allows. A row's result depends neither on
    /// the other rows nor on their number.
    ///
    /// # Safety
    /// The addresses have the elements that `product` says, 16-byte aligned at `x`; K is a multiple of 8.
    ///
    /// # Panics
    /// K is so large that not even one row fits in shared memory.
    pub(crate) unsafe fn linear(&self, weight: &TiledWeight, product: &Product) {
        let layout = weight.layout();
        assert!(
            (layout.order == RowOrder::Paired) == product.is_gated,
            "pairs of rows are for gated products"
        );
        let [n, k] = layout.shape;
        let few = layout.format == TileFormat::E2m1 && layout.row_tiles() >= MANY_ROW_TILES;
        let (kernels, segments) = if few {
            (&self.kernels[TileFormat::ALL.len()], FEW_SEGMENTS)
        } else {
            (&self.kernels[layout.format as usize], SEGMENTS)
        };
        let Plan { passes, cluster, tile, shared_bytes } =
            self.plan(layout.format, segments, layout.k_tiles(), product.rows);
        let int = |value: usize| i32::try_from(value).expect("dimensions fit 31 bits");
        let clusters =
            self.clusters[cluster.ilog2() as usize].min(layout.row_tiles().div_ceil(cluster)).max(1);
        let kernel = tile.map_or(&kernels.0, |tile| &kernels.1[tile]);
        let shared = shared_bytes.max(LEAST_SHARED_BYTES) as u32;
        let mut first = 0;
        for pass in 0..passes {
            let rows = (product.rows - first).div_ceil(passes - pass);
            let launch = Launch::new((clusters * cluster) as u32, 32 * WARPS).cluster(cluster as u32);
            let params = Params {
                tiles: weight.tiles(),
                factors: weight.factors(),
                bias: weight.bias(),
                x: product.x + (first * k * size_of::<u16>()) as u64,
                out: product.out + (first * product.out_width * product.out_dtype.size_bytes()) as u64,
                m: int(rows),
                n: int(n),
                k: int(k),
                row_tiles: int(layout.row_tiles()),
                k_tiles: int(layout.k_tiles()),
                cluster: int(cluster),
                out_width: int(product.out_width),
                column: int(product.column),
                out_is_f32: i32::from(product.out_dtype == Dtype::F32),
                is_gated: i32::from(product.is_gated),
            };
            // SAFETY: the caller's promise; the weight's addresses have what its layout says.
            unsafe { self.context.launch(kernel, &launch.shared(shared), &[&params]) };
            first += rows;
        }
    }

    /// What takes the least time for `rows` rows.
    fn plan(&self, format: TileFormat, segments: usize, k_tiles: usize, rows: usize) -> Plan {
        let limit = self.context.properties().max_shared_bytes as usize;
        if rows == 1 {
            let shared_bytes = one_row_shared_bytes(format, segments, k_tiles);
            if shared_bytes <= limit {
                return Plan { passes: 1, cluster: 1, tile: None, shared_bytes };
            }
        }
        let most = M_TILES[M_TILES.len() - 1];
        let fits = |rows, cluster| shared_bytes(format, segments, rows, k_tiles, cluster) <= limit;
        let plans = CLUSTERS
            .into_iter()
            // A block of a cluster has one part of K at least.
            .filter(|&cluster| cluster <= segments && self.clusters[cluster.ilog2() as usize] > 0)
            .filter_map(|cluster| {
                let rows_per_pass = (1..=most.min(rows)).rev().find(|&rows| fits(rows, cluster))?;
                let passes = rows.div_ceil(rows_per_pass);
                // Multiprocessors that no cluster reaches, and barriers among its CTAs.
                let reached = (cluster * self.clusters[cluster.ilog2() as usize]) as f64;
                let cost = passes as f64 / reached * (1.0 + 0.02 * f64::from(cluster.ilog2()));
                Some((cost, [passes, cluster]))
            });
        let best = plans.min_by(|(a, _), (b, _)| a.total_cmp(b));
        let [passes, cluster] =
            best.unwrap_or_else(|| panic!("no shared memory for a row of {k_tiles} x 64 elements")).1;
        // The first pass has the most rows; the others use its kernel, which is known to fit.
        let most = rows.div_ceil(passes);
        let tile = M_TILES.iter().position(|&tile| most <= tile).expect("a tile for every plan");
        let shared_bytes = shared_bytes(format, segments, most, k_tiles, cluster);
        Plan { passes, cluster, tile: Some(tile), shared_bytes }
    }
}

/// Dynamic shared memory of a kernel for one row: rings, barriers, two buffers of sums and of factors, x and a margin
/// (`OneShape` in `decode_one.cuh`).
fn one_row_shared_bytes(format: TileFormat, segments: usize, k_tiles: usize) -> usize {
    let [stage_tiles, stages] = one_row_ring(format);
    let (warps, groups) = (WARPS as usize, WARPS as usize / segments);
    let rings = warps * stages * stage_tiles * format.tile_bytes();
    let barriers = (warps * stages + 2 * groups) * 8;
    let sums_and_factors = 2 * (warps + groups) * TILE_ROWS * size_of::<f32>();
    let x = (k_tiles + GROUP_TILES) * TILE_COLS * size_of::<u16>();
    (rings + barriers).next_multiple_of(16) + sums_and_factors + x
}

/// Dynamic shared memory of a kernel for several rows: rings, barriers, two buffers of sums, x and a margin (`Shape` in
/// `decode.cuh`).
fn shared_bytes(format: TileFormat, segments: usize, rows: usize, k_tiles: usize, cluster: usize) -> usize {
    let [stage_tiles, stages] = ring(format, rows);
    let warps = WARPS as usize;
    let ring = warps * stages * stage_tiles * format.tile_bytes();
    let barriers = (warps * stages + 2 * warps / segments) * 8;
    let sums = 2 * warps * TILE_ROWS * (rows.next_multiple_of(2) + 2) * size_of::<f32>();
    let x = rows * (k_tiles.div_ceil(cluster) * TILE_COLS * size_of::<u16>() + 16);
    (ring + barriers).next_multiple_of(16) + sums + x + GROUP_TILES * TILE_COLS * size_of::<u16>()
}

//! Launcher of `embed.cu`.

use std::sync::Arc;

use super::{address, int};
use crate::buffer::{Buffer, Dtype};
use crate::cuda::{Context, DevicePtr, Function, Launch};
use crate::tile::{RowOrder, TileFormat, TileLayout};

/// Reads rows of weights in tiles.
#[derive(Debug)]
pub(crate) struct EmbedOperator {
    context: Arc<Context>,
    /// For each of [`TileFormat::ALL`]: to F32, to BF16.
    kernels: [[Function; 2]; TileFormat::ALL.len()],
}

/// A table in tiles.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Table<'a> {
    /// `[rows, cols]` and how they are stored; rows in order.
    pub(crate) layout: &'a TileLayout,
    /// The tiles.
    pub(crate) tiles: DevicePtr,
    /// F32, one per row.
    pub(crate) factors: DevicePtr,
}

impl EmbedOperator {
    pub(crate) fn new(context: &Arc<Context>) -> Self {
        let kernels = TileFormat::ALL.map(|format| {
            let [f32, bf16] = match format {
                TileFormat::E2m1 => ["ops_embed_e2m1_f32", "ops_embed_e2m1_bf16"],
                TileFormat::E2m3 => ["ops_embed_e2m3_f32", "ops_embed_e2m3_bf16"],
                TileFormat::E3m2 => ["ops_embed_e3m2_f32", "ops_embed_e3m2_bf16"],
                TileFormat::E4m3 => ["ops_embed_e4m3_f32", "ops_embed_e4m3_bf16"],
                TileFormat::E5m2 => ["ops_embed_e5m2_f32", "ops_embed_e5m2_bf16"],
                TileFormat::Int8 => ["ops_embed_int8_f32", "ops_embed_int8_bf16"],
                TileFormat::Bf16 => ["ops_embed_bf16_f32", "ops_embed_bf16_bf16"],
            };
            [context.function(f32), context.function(bf16)]
        });
        Self { context: Arc::clone(context), kernels }
    }

    /// `out[m] = table[tokens[m]]`; `out` is F32 or BF16 `[rows, cols]`.
    pub(crate) fn embed(&self, table: Table<'_>, tokens: &Buffer, rows: usize, out: &mut Buffer) {
        let Table { layout, tiles, factors } = table;
        assert!(layout.order == RowOrder::Stacked, "rows of a table are in order");
        if rows == 0 {
            return;
        }
        let [table_rows, cols] = layout.shape;
        let format =
            TileFormat::ALL.iter().position(|&f| f == layout.format).expect("every format is listed");
        let dtype = out.dtype();
        let kernel = &self.kernels[format][usize::from(dtype == Dtype::Bf16)];
        let tokens = address(tokens, Dtype::U32, rows);
        let out = address(out, dtype, rows * cols);
        let threads = (layout.k_tiles() * 4).next_multiple_of(32).min(256);
        // SAFETY: tokens and results have the sizes checked above; the table is as its layout says, and tokens outside
        // it are not read.
        unsafe {
            self.context.launch(
                kernel,
                &Launch::new(rows as u32, threads as u32),
                &[&tiles, &factors, &tokens, &out, &(table_rows as u32), &int(cols)],
            );
        }
    }
}

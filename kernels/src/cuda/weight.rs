//! Weights on the device: packed into tiles by all cores, piece by piece into pinned memory, while the pieces before
//! are on their way.

use std::ptr::null_mut;
use std::sync::Arc;
use std::thread;

use cudarc::driver::sys;

use super::context::{Context, check};
use super::memory::{DeviceBuffer, DevicePtr, PinnedBuffer, bytes_of};
use crate::backend::WeightSource;
use crate::error::Result;
use crate::tile::{self, TILE_ROWS, TileLayout};

/// Bytes that are packed, then copied, at a time.
const PIECE_BYTES: usize = 32 << 20;

/// Pieces that are packed and copied in turn.
const PIECES: usize = 2;

/// Bytes of tiles below which another thread is not worth starting.
const BYTES_PER_THREAD: usize = 1 << 20;

/// A weight `[N, K]` in tiles.
#[derive(Debug)]
pub(crate) struct TiledWeight {
    layout: TileLayout,
    tiles: DeviceBuffer,
    /// F32 `[layout.padded_rows()]`: what finished sums are multiplied with, in the order of the tiles' rows.
    factors: DeviceBuffer,
    /// F32 `[N]`.
    bias: Option<DeviceBuffer>,
    spread: u8,
}

impl TiledWeight {
    /// Sizes and order.
    pub(crate) fn layout(&self) -> &TileLayout {
        &self.layout
    }

    /// Address of the first tile.
    pub(crate) fn tiles(&self) -> DevicePtr {
        self.tiles.ptr()
    }

    /// Address of the row factors.
    pub(crate) fn factors(&self) -> DevicePtr {
        self.factors.ptr()
    }

    /// Address of the bias; 0 if there is none.
    pub(crate) fn bias(&self) -> DevicePtr {
        self.bias.as_ref().map_or(0, DeviceBuffer::ptr)
    }

    /// The largest distance of a block that is not all zeros from its row's largest scale, in binades, over all rows.
    pub(crate) fn spread(&self) -> u8 {
        self.spread
    }

    /// Bytes held, without the bias.
    pub(crate) fn bytes(&self) -> usize {
        self.tiles.bytes() + self.factors.bytes()
    }

    /// Bytes of these that hold scales: those of tiles, and the row factors.
    pub(crate) fn scale_bytes(&self) -> usize {
        let format = self.layout.format;
        let tiles = self.tiles.bytes() / format.tile_bytes();
        tiles * (format.tile_bytes() - format.code_bytes()) + self.factors.bytes()
    }
}

/// Packs and copies weights.
#[derive(Debug)]
pub(crate) struct Uploader {
    context: Arc<Context>,
    threads: usize,
    pieces: [Piece; PIECES],
    next: usize,
}

/// Pinned memory on its way to the device.
#[derive(Debug)]
struct Piece {
    memory: PinnedBuffer,
    copied: sys::CUevent,
}

impl Uploader {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self> {
        let piece = || {
            let mut copied = null_mut();
            let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
            // SAFETY: writes to a local variable.
            check(unsafe { sys::cuEventCreate(&raw mut copied, flags) }, "create an event");
            Ok(Piece { memory: PinnedBuffer::new(context, PIECE_BYTES)?, copied })
        };
        let threads = thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Ok(Self { context: Arc::clone(context), threads, pieces: [piece()?, piece()?], next: 0 })
    }

    /// Packs the stacked `parts`; `bias` has one element per row.
    pub(crate) fn upload(
        &mut self,
        layout: TileLayout,
        parts: &[WeightSource<'_>],
        bias: Option<&[f32]>,
    ) -> Result<TiledWeight> {
        let mut tiles = DeviceBuffer::uninitialized(&self.context, layout.bytes(), "a weight")?;
        let mut factors = vec![0.0; layout.padded_rows()];
        let mut spreads = vec![0; layout.padded_rows()];
        let row_tiles = (PIECE_BYTES / layout.row_tile_bytes()).max(1);
        for first in (0..layout.row_tiles()).step_by(row_tiles) {
            let count = row_tiles.min(layout.row_tiles() - first);
            let bytes = count * layout.row_tile_bytes();
            let piece = &mut self.pieces[self.next];
            self.next = (self.next + 1) % PIECES;
            // SAFETY: the event is the piece's own; one that was never recorded has happened.
            check(unsafe { sys::cuEventSynchronize(piece.copied) }, "wait for an event");
            if piece.memory.bytes() < bytes {
                piece.memory = PinnedBuffer::new(&self.context, bytes)?;
            }
            let rows = first * TILE_ROWS..(first + count) * TILE_ROWS;
            let rows = (&mut factors[rows.clone()], &mut spreads[rows]);
            pack_parallel(
                self.threads,
                &layout,
                parts,
                first,
                &mut piece.memory.as_mut_slice()[..bytes],
                rows,
            );
            // SAFETY: the piece is not written before its event, which is recorded after the copy.
            unsafe {
                tiles.write_pinned(first * layout.row_tile_bytes(), &piece.memory, bytes);
                check(sys::cuEventRecord(piece.copied, self.context.stream()), "record an event");
            }
        }
        let floats = |values: &[f32]| {
            let mut buffer = DeviceBuffer::uninitialized(&self.context, size_of_val(values), "a weight")?;
            buffer.write(0, bytes_of(values));
            Ok::<_, crate::Error>(buffer)
        };
        let factors = floats(&factors)?;
        let bias = bias.map(floats).transpose()?;
        let spread = spreads.into_iter().max().unwrap_or(0);
        Ok(TiledWeight { layout, tiles, factors, bias, spread })
    }
}

impl Drop for Uploader {
    fn drop(&mut self) {
        self.context.synchronize();
        for piece in &self.pieces {
            // SAFETY: created in `new`, and nothing waits for it any more.
            check(unsafe { sys::cuEventDestroy_v2(piece.copied) }, "destroy an event");
        }
    }
}

/// Packs row tiles from `first` on into `tiles`, by up to `threads` threads.
fn pack_parallel(
    threads: usize,
    layout: &TileLayout,
    parts: &[WeightSource<'_>],
    first: usize,
    tiles: &mut [u8],
    (factors, spreads): (&mut [f32], &mut [u8]),
) {
    let count = tiles.len() / layout.row_tile_bytes();
    let threads = threads.min(tiles.len().div_ceil(BYTES_PER_THREAD)).clamp(1, count.max(1));
    let each = count.div_ceil(threads).max(1);
    thread::scope(|scope| {
        let pieces = tiles
            .chunks_mut(each * layout.row_tile_bytes())
            .zip(factors.chunks_mut(each * TILE_ROWS))
            .zip(spreads.chunks_mut(each * TILE_ROWS));
        for (index, ((tiles, factors), spreads)) in pieces.enumerate() {
            let mut pack = move || tile::pack(layout, parts, first + index * each, tiles, factors, spreads);
            if threads == 1 {
                pack();
            } else {
                scope.spawn(pack);
            }
        }
    });
}

//! Weights on their way to the device: rows are gathered piece by piece into pinned memory by all cores, copied as they
//! are while the next piece is gathered, and packed into tiles there.

#[cfg(test)]
mod tests;

use std::ptr::null_mut;
use std::sync::Arc;
use std::thread;

use cudarc::driver::sys;

use super::context::{Context, check};
use super::memory::{DeviceBuffer, PinnedBuffer, bytes_of};
use super::pack::{PackedPiece, Packer};
use super::weight::TiledWeight;
use crate::backend::WeightSource;
use crate::buffer::{Charge, Component, MemoryAccount};
use crate::error::Result;
use crate::tile::{TILE_ROWS, TileLayout, find_row};

/// Bytes of rows that are gathered, then copied, at a time.
const PIECE_BYTES: usize = 32 << 20;

/// Pieces that are gathered and copied in turn.
const PIECES: usize = 2;

/// Bytes of rows below which another thread is not worth starting.
const BYTES_PER_THREAD: usize = 1 << 20;

/// Where what follows others in a piece may start.
const ALIGNMENT: usize = 256;

/// Copies and packs weights.
#[derive(Debug)]
pub(crate) struct Uploader {
    context: Arc<Context>,
    account: Arc<MemoryAccount>,
    packer: Packer,
    threads: usize,
    pieces: [Piece; PIECES],
    next: usize,
    /// A piece as it arrives.
    arrived: DeviceBuffer,
    /// U32: the largest spread of the weight that is being packed.
    spread: DeviceBuffer,
    _charge: Charge,
}

/// Pinned memory on its way to the device.
#[derive(Debug)]
struct Piece {
    memory: PinnedBuffer,
    copied: sys::CUevent,
}

impl Uploader {
    pub(crate) fn new(context: &Arc<Context>, account: &Arc<MemoryAccount>) -> Result<Self> {
        let piece = || {
            let mut copied = null_mut();
            let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
            // SAFETY: writes to a local variable.
            check(unsafe { sys::cuEventCreate(&raw mut copied, flags) }, "create an event");
            Ok(Piece { memory: PinnedBuffer::new(context, PIECE_BYTES)?, copied })
        };
        let threads = thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let arrived = DeviceBuffer::uninitialized(context, PIECE_BYTES, "weights that arrive")?;
        Ok(Self {
            packer: Packer::new(context),
            threads,
            pieces: [piece()?, piece()?],
            next: 0,
            spread: DeviceBuffer::zeroed(context, size_of::<u32>(), "a counter")?,
            _charge: account.charge(Component::Workspace, arrived.bytes()),
            arrived,
            account: Arc::clone(account),
            context: Arc::clone(context),
        })
    }

    /// Packs the stacked `parts`; `bias` has one element per row.
    pub(crate) fn upload(
        &mut self,
        layout: TileLayout,
        parts: &[WeightSource<'_>],
        bias: Option<&[f32]>,
    ) -> Result<TiledWeight> {
        let tiles = DeviceBuffer::uninitialized(&self.context, layout.bytes(), "a weight")?;
        let factor_bytes = layout.padded_rows() * size_of::<f32>();
        let factors = DeviceBuffer::uninitialized(&self.context, factor_bytes, "a weight")?;
        let row = RowBytes::of(&parts[0]);
        self.spread.write(0, &[0; size_of::<u32>()]);
        let row_tiles = (PIECE_BYTES / row.of_tiles(1).total()).max(1);
        for first in (0..layout.row_tiles()).step_by(row_tiles) {
            let count = row_tiles.min(layout.row_tiles() - first);
            let sizes = row.of_tiles(count);
            let piece = &mut self.pieces[self.next];
            self.next = (self.next + 1) % PIECES;
            // SAFETY: the event is the piece's own; one that was never recorded has happened.
            check(unsafe { sys::cuEventSynchronize(piece.copied) }, "wait for an event");
            if piece.memory.bytes() < sizes.total() {
                piece.memory = PinnedBuffer::new(&self.context, sizes.total())?;
            }
            if self.arrived.bytes() < sizes.total() {
                self.arrived =
                    DeviceBuffer::uninitialized(&self.context, sizes.total(), "weights that arrive")?;
                self._charge = self.account.charge(Component::Workspace, sizes.total());
            }
            let (rows, scales) = piece.memory.as_mut_slice()[..sizes.total()].split_at_mut(sizes.scales_at);
            gather(self.threads, &layout, parts, first, [rows, &mut scales[..sizes.scales]], row);
            let arrived = self.arrived.ptr();
            let place = PackedPiece {
                rows: arrived,
                scales: arrived + sizes.scales_at as u64,
                first,
                count,
                tiles: tiles.ptr() + (first * layout.row_tile_bytes()) as u64,
                factors: factors.ptr() + (first * TILE_ROWS * size_of::<f32>()) as u64,
                spread: self.spread.ptr(),
            };
            // SAFETY: the piece is not written before its event, which is recorded after the copy. What arrived has the
            // rows of `count` tiles and their scales, and the weight has room for these tiles.
            unsafe {
                self.arrived.write_pinned(0, &piece.memory, sizes.total());
                check(sys::cuEventRecord(piece.copied, self.context.stream()), "record an event");
                self.packer.pack(&self.context, &layout, &parts[0], place);
            }
        }
        let bias = bias.map(|bias| {
            let mut buffer = DeviceBuffer::uninitialized(&self.context, size_of_val(bias), "a weight")?;
            buffer.write(0, bytes_of(bias));
            Ok::<_, crate::Error>(buffer)
        });
        let mut spread = [0; size_of::<u32>()];
        self.spread.read(0, &mut spread);
        let spread = u8::try_from(u32::from_le_bytes(spread)).expect("a spread is a difference of bytes");
        Ok(TiledWeight::new(layout, tiles, factors, bias.transpose()?, spread))
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

/// Bytes of a row: codes or values, and scales.
#[derive(Debug, Clone, Copy)]
struct RowBytes {
    values: usize,
    scales: usize,
}

/// Bytes of a piece.
struct PieceSizes {
    scales_at: usize,
    scales: usize,
}

impl RowBytes {
    fn of(source: &WeightSource<'_>) -> Self {
        let cols = source.shape()[1];
        match source {
            WeightSource::Mx { tensor, .. } => {
                let format = tensor.format();
                Self { values: format.code_bytes(cols), scales: format.scale_bytes(cols) }
            }
            WeightSource::Dense { dtype, .. } => Self { values: cols * dtype.size_bytes(), scales: 0 },
        }
    }

    fn of_tiles(self, count: usize) -> PieceSizes {
        let rows = count * TILE_ROWS;
        PieceSizes { scales_at: (rows * self.values).next_multiple_of(ALIGNMENT), scales: rows * self.scales }
    }
}

impl PieceSizes {
    fn total(&self) -> usize {
        self.scales_at + self.scales
    }
}

/// Copies the rows of the tiles from `first` on into `values` and `scales`, by up to `threads` threads. Those of padding
/// stay what they were.
fn gather(
    threads: usize,
    layout: &TileLayout,
    parts: &[WeightSource<'_>],
    first: usize,
    [values, scales]: [&mut [u8]; 2],
    row_bytes: RowBytes,
) {
    let tile_values = TILE_ROWS * row_bytes.values;
    let count = values.len() / tile_values;
    let threads = threads.min(values.len().div_ceil(BYTES_PER_THREAD)).clamp(1, count.max(1));
    let each = count.div_ceil(threads).max(1);
    // As many chunks as of values where there are no scales.
    let mut scale_chunks = scales.chunks_mut((each * TILE_ROWS * row_bytes.scales).max(1));
    let copy = |first: usize, values: &mut [u8], scales: &mut [u8]| {
        for (index, row) in values.chunks_exact_mut(row_bytes.values).enumerate() {
            let place = layout.source_row(first + index / TILE_ROWS, index % TILE_ROWS);
            match place.and_then(|row| find_row(parts, row)) {
                Some((WeightSource::Mx { tensor, .. }, from)) => {
                    row.copy_from_slice(tensor.row_codes(from));
                    scales[index * row_bytes.scales..][..row_bytes.scales]
                        .copy_from_slice(tensor.row_scales(from));
                }
                Some((WeightSource::Dense { bytes, .. }, from)) => {
                    row.copy_from_slice(&bytes[from * row_bytes.values..][..row_bytes.values]);
                }
                None => {}
            }
        }
    };
    thread::scope(|scope| {
        let chunks = values[..count * tile_values].chunks_mut(each * tile_values);
        for (index, values) in chunks.enumerate() {
            let (first, scales) = (first + index * each, scale_chunks.next().unwrap_or_default());
            if threads == 1 {
                copy(first, values, scales);
            } else {
                scope.spawn(move || copy(first, values, scales));
            }
        }
    });
}

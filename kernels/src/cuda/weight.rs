//! A weight on the device.

use super::memory::{DeviceBuffer, DevicePtr};
use crate::tile::TileLayout;

/// A weight `[N, K]` in tiles.
#[derive(Debug)]
pub(crate) struct TiledWeight {
    layout: TileLayout,
    tiles: DeviceBuffer,
    /// F32 `[layout.padded_rows()]`: what finished sums are multiplied with, in the order of the tiles' rows.
    factors: DeviceBuffer,
    /// F32 `[N]`.
    bias: Option<DeviceBuffer>,
    /// See [`Self::spread`].
    spread: u8,
}

impl TiledWeight {
    /// Of its parts, as the fields say.
    pub(super) fn new(
        layout: TileLayout,
        tiles: DeviceBuffer,
        factors: DeviceBuffer,
        bias: Option<DeviceBuffer>,
        spread: u8,
    ) -> Self {
        Self { layout, tiles, factors, bias, spread }
    }

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

    /// All tiles and row factors.
    #[cfg(test)]
    pub(super) fn read(&self) -> (Vec<u8>, Vec<f32>) {
        let (mut tiles, mut factors) = (vec![0; self.tiles.bytes()], vec![0.0; self.layout.padded_rows()]);
        self.tiles.read(0, &mut tiles);
        self.factors.read(0, super::memory::bytes_of_mut(&mut factors));
        (tiles, factors)
    }
}

//! Orders of channels, and tensors that are read in them.

use std::collections::BTreeMap;
use std::sync::Arc;

use safetensors::Dtype;
use sha2::{Digest, Sha256};

/// A permutation: channel `i` is the source's channel `source_of(i)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ChannelOrder(Arc<[u32]>);

impl ChannelOrder {
    /// By the source's channels, each once.
    pub(super) fn new(channels: impl IntoIterator<Item = u32>) -> Self {
        Self(channels.into_iter().collect())
    }

    /// The source's channel that has become channel `index`.
    pub(crate) fn source_of(&self, index: usize) -> usize {
        self.0[index] as usize
    }

    /// The source's channels.
    pub(super) fn channels(&self) -> &[u32] {
        &self.0
    }

    /// Rows of values `[_, channels]`, each in this order.
    pub(super) fn gather(&self, values: &[f32]) -> Vec<f32> {
        let rows = values.chunks_exact(self.0.len());
        rows.flat_map(|row| self.0.iter().map(|&channel| row[channel as usize])).collect()
    }

    /// The same of rows as they are stored.
    pub(crate) fn gather_columns(&self, dtype: Dtype, rows: &mut [u8]) {
        let width = dtype.bitsize() / 8;
        let mut row_before = Vec::new();
        for row in rows.chunks_exact_mut(self.0.len() * width) {
            row_before.clear();
            row_before.extend_from_slice(row);
            for (value, &channel) in row.chunks_exact_mut(width).zip(&*self.0) {
                value.copy_from_slice(&row_before[channel as usize * width..][..width]);
            }
        }
    }

    /// All rows of a tensor, of `row_bytes` each, in this order.
    pub(crate) fn gather_rows(&self, row_bytes: usize, tensor: &mut Vec<u8>) {
        let rows = self.0.iter().map(|&channel| &tensor[channel as usize * row_bytes..][..row_bytes]);
        *tensor = rows.flatten().copied().collect();
    }
}

/// Which of a tensor's dimensions is in another order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TensorOrder {
    /// The first: outputs of a module, or its bias.
    Rows(ChannelOrder),
    /// The last: inputs of a module.
    Columns(ChannelOrder),
}

/// The tensors that are read in another order than that of the files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ChannelOrders(BTreeMap<String, TensorOrder>);

impl ChannelOrders {
    /// The order of a tensor; `None` as in the file.
    pub(crate) fn of(&self, tensor: &str) -> Option<&TensorOrder> {
        self.0.get(tensor)
    }

    /// Adds a tensor.
    pub(super) fn insert(&mut self, tensor: String, order: TensorOrder) {
        self.0.insert(tensor, order);
    }

    /// Tells orders apart: SHA-256 in hexadecimal digits.
    pub(crate) fn digest(&self) -> String {
        let mut digest = Sha256::new();
        for (tensor, order) in &self.0 {
            let (dimension, order) = match order {
                TensorOrder::Rows(order) => (0_u8, order),
                TensorOrder::Columns(order) => (1, order),
            };
            digest.update(tensor);
            digest.update([0, dimension]);
            order.channels().iter().for_each(|channel| digest.update(channel.to_le_bytes()));
        }
        digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_and_stored_rows_are_gathered_alike() {
        let order = ChannelOrder::new([2, 0, 1]);
        assert_eq!(order.source_of(0), 2);
        assert_eq!(order.gather(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), [3.0, 1.0, 2.0, 6.0, 4.0, 5.0]);
        let mut columns = vec![10, 11, 20, 21, 30, 31, 40, 41, 50, 51, 60, 61];
        let mut rows = columns[..6].to_vec();
        order.gather_columns(Dtype::BF16, &mut columns);
        assert_eq!(columns, [30, 31, 10, 11, 20, 21, 60, 61, 40, 41, 50, 51]);
        order.gather_rows(2, &mut rows);
        assert_eq!(rows, [30, 31, 10, 11, 20, 21]);
    }

    #[test]
    fn digests_tell_orders_apart() {
        let orders = |order: TensorOrder| {
            let mut orders = ChannelOrders::default();
            orders.insert("a".to_owned(), order);
            orders.digest()
        };
        let (forth, back) = (ChannelOrder::new([0, 1]), ChannelOrder::new([1, 0]));
        let digests = [
            ChannelOrders::default().digest(),
            orders(TensorOrder::Rows(forth.clone())),
            orders(TensorOrder::Columns(forth)),
            orders(TensorOrder::Rows(back)),
        ];
        assert!((1..4).all(|i| !digests[..i].contains(&digests[i])), "{digests:?}");
    }
}

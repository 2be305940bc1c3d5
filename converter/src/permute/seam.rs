//! Where the channels between modules can change places and the model stays the same.

use models::ModelConfig;
use models::staged::{Parameters, Stage};

use super::orders::{ChannelOrder, ChannelOrders, TensorOrder};

/// Channels that the rows of some modules make and the columns of another take, with nothing between that tells one from
/// the other: gate and up to down, through an activation by element; v to o, through sums over tokens, within a head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seam {
    pub(super) producers: Vec<String>,
    pub(super) consumer: String,
    /// Groups whose channels stay together: the KV heads.
    groups: usize,
    /// Runs of columns that read a group: the query heads of a KV head.
    readers: usize,
    /// Channels of a group.
    channels: usize,
}

impl Seam {
    /// The seam before `stage` of layer `index`, if there is one.
    pub(super) fn before(stage: Stage, config: &ModelConfig, index: usize) -> Option<Self> {
        let names = |stage: Stage| stage.modules(config, index).0.into_iter().map(|(name, _)| name);
        let (groups, readers, channels, producers): (_, _, _, Vec<String>) = match stage {
            Stage::Qkv | Stage::GateUp => return None,
            Stage::AttentionOutput => {
                let heads = config.heads;
                (heads.kv, heads.q / heads.kv, heads.dim, names(Stage::Qkv).skip(2).collect())
            }
            Stage::Down => (1, 1, config.intermediate_size, names(Stage::GateUp).collect()),
        };
        let consumer = names(stage).next()?;
        (!producers.is_empty()).then_some(Self { producers, consumer, groups, readers, channels })
    }

    /// Rows of each producer.
    pub(super) fn rows(&self) -> usize {
        self.groups * self.channels
    }

    /// Columns of the consumer, K.
    pub(super) fn cols(&self) -> usize {
        self.groups * self.readers * self.channels
    }

    /// The first column of run `reader` of `group`.
    fn first_column(&self, group: usize, reader: usize) -> usize {
        (group * self.readers + reader) * self.channels
    }

    /// The producers' rows by `range`, the magnitude that each of the consumer's columns reaches: the largest of a
    /// group first.
    pub(super) fn by_range(&self, range: &[f32]) -> ChannelOrder {
        let order = (0..self.groups).flat_map(|group| {
            let reached = |channel: usize| {
                let columns = (0..self.readers).map(|reader| self.first_column(group, reader) + channel);
                columns.map(|column| range[column]).fold(0.0, f32::max)
            };
            let mut channels: Vec<usize> = (0..self.channels).collect();
            channels.sort_by(|a, b| reached(*b).total_cmp(&reached(*a)));
            channels.into_iter().map(move |channel| (group * self.channels + channel) as u32)
        });
        ChannelOrder::new(order)
    }

    /// The consumer's columns where the producers' rows are in `order`.
    pub(super) fn columns(&self, order: &ChannelOrder) -> ChannelOrder {
        let columns = (0..self.groups).flat_map(|group| {
            let channels = &order.channels()[group * self.channels..][..self.channels];
            (0..self.readers).flat_map(move |reader| {
                let shift = self.first_column(group, reader) - group * self.channels;
                channels.iter().map(move |channel| channel + shift as u32)
            })
        });
        ChannelOrder::new(columns)
    }

    /// Adds the tensors of the seam, with the biases that `parameters` have.
    pub(super) fn follow(&self, order: &ChannelOrder, parameters: &Parameters, orders: &mut ChannelOrders) {
        for producer in &self.producers {
            let bias = format!("{producer}.bias");
            if parameters.vectors.contains_key(&bias) {
                orders.insert(bias, TensorOrder::Rows(order.clone()));
            }
            orders.insert(format!("{producer}.weight"), TensorOrder::Rows(order.clone()));
        }
        orders.insert(format!("{}.weight", self.consumer), TensorOrder::Columns(self.columns(order)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two KV heads of three channels, each read by two query heads.
    fn heads() -> Seam {
        Seam { producers: vec!["v".to_owned()], consumer: "o".to_owned(), groups: 2, readers: 2, channels: 3 }
    }

    #[test]
    fn channels_stay_in_their_head_and_all_readers_follow() {
        let seam = heads();
        assert_eq!((seam.rows(), seam.cols()), (6, 12));
        // The second reader of a head decides where its range is larger.
        let order = seam.by_range(&[1.0, 2.0, 3.0, 9.0, 0.0, 0.0, 1.0, 1.0, 2.0, 0.0, 3.0, 0.0]);
        assert_eq!(order.channels(), [0, 2, 1, 4, 5, 3]);
        assert_eq!(seam.columns(&order).channels(), [0, 2, 1, 3, 5, 4, 7, 8, 6, 10, 11, 9]);
    }

    #[test]
    fn biases_follow_their_modules() {
        let (seam, mut orders) = (heads(), ChannelOrders::default());
        let order = seam.by_range(&[0.0; 12]);
        let mut parameters = Parameters::default();
        seam.follow(&order, &parameters, &mut orders);
        assert_eq!(orders.of("v.bias"), None);
        parameters.vectors.insert("v.bias".to_owned(), vec![0.0; 6]);
        seam.follow(&order, &parameters, &mut orders);
        assert_eq!(orders.of("v.bias"), Some(&TensorOrder::Rows(order.clone())));
        assert_eq!(orders.of("v.weight"), Some(&TensorOrder::Rows(order.clone())));
        assert_eq!(orders.of("o.weight"), Some(&TensorOrder::Columns(seam.columns(&order))));
    }
}

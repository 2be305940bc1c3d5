//! A small map that forgets what was not used for longest.

/// Holds the entries of the latest uses, the latest last. Small enough to be searched from end to end.
#[derive(Debug)]
pub(super) struct Cache<K, V> {
    capacity: usize,
    entries: Vec<(K, V)>,
}

impl<K: PartialEq, V> Cache<K, V> {
    /// An empty cache of up to `capacity` entries.
    pub(super) fn new(capacity: usize) -> Self {
        Self { capacity, entries: Vec::new() }
    }

    /// The value of `key`.
    pub(super) fn get(&mut self, key: &K) -> Option<&V> {
        let at = self.entries.iter().position(|(other, _)| other == key)?;
        self.entries[at..].rotate_left(1);
        self.entries.last().map(|(_, value)| value)
    }

    /// Adds an entry, in place of one with the same key, or of the oldest where there is no room.
    pub(super) fn insert(&mut self, key: K, value: V) {
        self.entries.retain(|(other, _)| *other != key);
        if self.entries.len() == self.capacity {
            self.entries.remove(0);
        }
        self.entries.push((key, value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_unused_goes_first() {
        let mut cache = Cache::new(2);
        cache.insert("a", 1);
        cache.insert("b", 2);
        assert_eq!(cache.get(&"a"), Some(&1));
        cache.insert("c", 3);
        assert_eq!(["b", "a", "c"].map(|key| cache.get(&key).copied()), [None, Some(1), Some(3)]);
        cache.insert("a", 4);
        assert_eq!(["a", "c"].map(|key| cache.get(&key).copied()), [Some(4), Some(3)]);
    }
}

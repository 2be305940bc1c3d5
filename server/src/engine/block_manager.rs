//! Which blocks of the paged KV cache are whose. Pure bookkeeping: the memory itself is the model's `KvCache`.

use kernels::KV_BLOCK_TOKENS;

/// The KV blocks of one sequence, in position order: token `p` is in block `p / KV_BLOCK_TOKENS`.
///
/// Only a [`BlockManager`] fills or empties a table, and it takes no copies: a table that is dropped while it holds
/// blocks leaks them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct BlockTable(Vec<u32>);

impl BlockTable {
    /// Block numbers, in position order.
    pub(super) fn blocks(&self) -> &[u32] {
        &self.0
    }
}

/// Blocks that hold `tokens` tokens.
pub(super) const fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(KV_BLOCK_TOKENS)
}

/// Hands out the blocks of one KV cache and counts who refers to each.
#[derive(Debug)]
pub(super) struct BlockManager {
    /// Free block numbers. A stack: what was used last is used next, so memory that was never needed is never touched.
    free: Vec<u32>,
    /// Tables that hold each block; 0 for a free one. A block goes back when its last holder lets go.
    references: Vec<u32>,
}

impl BlockManager {
    /// Manages `blocks` free blocks.
    ///
    /// # Panics
    /// If block numbers do not fit in 32 bits.
    pub(super) fn new(blocks: usize) -> Self {
        let count = u32::try_from(blocks).expect("block numbers have 32 bits");
        Self { free: (0..count).rev().collect(), references: vec![0; blocks] }
    }

    /// Number of blocks in the cache.
    pub(super) fn total(&self) -> usize {
        self.references.len()
    }

    /// Number of blocks nobody holds.
    pub(super) fn free(&self) -> usize {
        self.free.len()
    }

    /// Number of blocks in use.
    pub(super) fn used(&self) -> usize {
        self.total() - self.free()
    }

    /// Extends `table` until it holds `tokens` tokens. All or nothing: `false` leaves everything as it was.
    #[must_use]
    pub(super) fn grow(&mut self, table: &mut BlockTable, tokens: usize) -> bool {
        let missing = blocks_for(tokens).saturating_sub(table.0.len());
        let Some(rest) = self.free.len().checked_sub(missing) else { return false };
        for block in self.free.drain(rest..).rev() {
            self.references[block as usize] += 1;
            table.0.push(block);
        }
        true
    }

    /// Empties `table`; blocks that nobody else holds become free.
    pub(super) fn release(&mut self, table: &mut BlockTable) {
        // Backwards, so that the first blocks are on top of the stack again.
        for block in table.0.drain(..).rev() {
            let references = &mut self.references[block as usize];
            *references -= 1;
            if *references == 0 {
                self.free.push(block);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_grows_by_whole_blocks() {
        // (blocks in the cache, tokens asked for one after the other, expected table lengths or refusal)
        type Case = (usize, &'static [usize], &'static [Option<usize>]);
        const B: usize = KV_BLOCK_TOKENS;
        let cases: &[Case] = &[
            (4, &[0], &[Some(0)]),
            (4, &[1, B, B + 1], &[Some(1), Some(1), Some(2)]),
            (4, &[4 * B, 4 * B + 1], &[Some(4), None]),
            (4, &[5 * B, 3 * B], &[None, Some(3)]),
            (4, &[2 * B, 1], &[Some(2), Some(2)]),
            (0, &[0, 1], &[Some(0), None]),
        ];
        for (blocks, asked, expected) in cases {
            let mut manager = BlockManager::new(*blocks);
            let mut table = BlockTable::default();
            for (&tokens, &expected) in asked.iter().zip(*expected) {
                let before = table.blocks().len();
                let grown = manager.grow(&mut table, tokens);
                assert_eq!(grown, expected.is_some(), "{blocks} blocks, {tokens} tokens");
                assert_eq!(
                    table.blocks().len(),
                    expected.unwrap_or(before),
                    "{blocks} blocks, {tokens} tokens"
                );
                assert_eq!(manager.used(), table.blocks().len());
            }
        }
    }

    #[test]
    fn tables_never_share_a_block_unless_told_to() {
        let mut manager = BlockManager::new(8);
        let (mut a, mut b) = (BlockTable::default(), BlockTable::default());
        for tokens in [10, 40, 60] {
            assert!(manager.grow(&mut a, tokens) && manager.grow(&mut b, tokens));
            assert!(a.blocks().iter().all(|block| !b.blocks().contains(block)));
        }
        assert_eq!(manager.free(), 0);
        manager.release(&mut a);
        assert_eq!((manager.free(), a.blocks()), (4, &[][..]));
        manager.release(&mut b);
        assert_eq!(manager.free(), 8);
    }

    #[test]
    fn released_blocks_are_used_before_untouched_ones() {
        let mut manager = BlockManager::new(100);
        let mut table = BlockTable::default();
        assert!(manager.grow(&mut table, 3 * KV_BLOCK_TOKENS));
        let first = table.blocks().to_vec();
        assert_eq!(first, [0, 1, 2]);
        manager.release(&mut table);
        assert!(manager.grow(&mut table, 3 * KV_BLOCK_TOKENS));
        assert_eq!(table.blocks(), first);
    }
}

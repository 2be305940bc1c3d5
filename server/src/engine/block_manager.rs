//! Which blocks of the paged KV cache are whose. Pure bookkeeping: the memory itself is the model's `KvCache`.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};

use kernels::KV_BLOCK_TOKENS;

use super::prefix_cache::BlockHash;

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

/// Hands out the blocks of one KV cache, counts who refers to each, and finds blocks again by their content.
///
/// A block whose content has a name is not changed any more: tables share it, and it stays findable after its last
/// holder let go, until its memory is needed. What was let go first is given away first.
#[derive(Debug)]
pub(super) struct BlockManager {
    blocks: Vec<Block>,
    /// Free blocks whose content nobody can find. A stack: what was used last is used next, so memory that was never
    /// needed is never touched.
    blank: Vec<u32>,
    /// Free blocks whose content can be found, by when they were let go.
    idle: BTreeMap<u64, u32>,
    /// The blocks with named contents, held or idle.
    named: HashMap<BlockHash, u32>,
    /// Times that a block became idle.
    releases: u64,
}

/// One block's state.
#[derive(Debug, Clone, Default)]
struct Block {
    /// Tables that hold it; 0 for a free one.
    references: u32,
    /// The name of its content, under which `named` has it.
    name: Option<BlockHash>,
    /// While it is idle, its key there.
    idle_since: u64,
}

/// The beginning of a sequence that the cache holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Hit {
    /// Its blocks.
    pub(super) blocks: usize,
    /// How many of them are free: they count as such until a table takes them.
    pub(super) idle: usize,
}

impl BlockManager {
    /// Manages `blocks` free blocks.
    ///
    /// # Panics
    /// If block numbers do not fit in 32 bits.
    pub(super) fn new(blocks: usize) -> Self {
        let count = u32::try_from(blocks).expect("block numbers have 32 bits");
        Self {
            blocks: vec![Block::default(); blocks],
            blank: (0..count).rev().collect(),
            idle: BTreeMap::new(),
            named: HashMap::new(),
            releases: 0,
        }
    }

    /// Number of blocks in the cache.
    pub(super) fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Number of blocks nobody holds.
    pub(super) fn free(&self) -> usize {
        self.blank.len() + self.idle.len()
    }

    /// Number of blocks in use.
    pub(super) fn used(&self) -> usize {
        self.total() - self.free()
    }

    /// Extends `table` until it holds `tokens` tokens. All or nothing: `false` leaves everything as it was.
    #[must_use]
    pub(super) fn grow(&mut self, table: &mut BlockTable, tokens: usize) -> bool {
        let missing = blocks_for(tokens).saturating_sub(table.0.len());
        if missing > self.free() {
            return false;
        }
        for _ in 0..missing {
            let block = self.take_free().expect("free blocks were counted");
            self.blocks[block as usize].references = 1;
            table.0.push(block);
        }
        true
    }

    /// How many of `names`, from the first on, are in the cache.
    pub(super) fn find(&self, names: &[BlockHash]) -> Hit {
        let mut hit = Hit::default();
        for block in names.iter().map_while(|name| self.named.get(name)) {
            hit.blocks += 1;
            hit.idle += usize::from(self.blocks[*block as usize].references == 0);
        }
        hit
    }

    /// Appends the blocks of these contents to `table`.
    ///
    /// # Panics
    /// One of them is not in the cache: [`find`](Self::find) says how many are.
    pub(super) fn share(&mut self, table: &mut BlockTable, names: &[BlockHash]) {
        for name in names {
            let number = self.named[name];
            let block = &mut self.blocks[number as usize];
            if block.references == 0 {
                self.idle.remove(&block.idle_since);
            }
            block.references += 1;
            table.0.push(number);
        }
    }

    /// Names the content of a block that its holders will not change any more. Where another block has the same
    /// content, that one keeps the name.
    pub(super) fn name(&mut self, block: u32, name: BlockHash) {
        let state = &mut self.blocks[block as usize];
        debug_assert!(state.references > 0, "a free block has no new content");
        if state.name.is_none()
            && let Entry::Vacant(entry) = self.named.entry(name)
        {
            entry.insert(block);
            state.name = Some(name);
        }
    }

    /// Empties `table`; blocks that nobody else holds become free.
    pub(super) fn release(&mut self, table: &mut BlockTable) {
        // Backwards, so that the first blocks are on top of the stack again, and the last ones, which are of no use
        // without those before them, lose their content first.
        for number in table.0.drain(..).rev() {
            let block = &mut self.blocks[number as usize];
            block.references -= 1;
            if block.references > 0 {
                continue;
            }
            if block.name.is_some() {
                block.idle_since = self.releases;
                self.idle.insert(self.releases, number);
                self.releases += 1;
            } else {
                self.blank.push(number);
            }
        }
    }

    /// A free block, whose content is forgotten.
    fn take_free(&mut self) -> Option<u32> {
        self.blank.pop().or_else(|| {
            let (_, number) = self.idle.pop_first()?;
            let name = self.blocks[number as usize].name.take();
            if let Some(name) = name {
                self.named.remove(&name);
            }
            Some(number)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::prefix_cache::HashChain;

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

    fn names(count: usize) -> Vec<BlockHash> {
        let mut chain = HashChain::new(None);
        chain.extend(&vec![5; count * KV_BLOCK_TOKENS]);
        chain.blocks().to_vec()
    }

    /// A table of as many blocks as there are names, named.
    fn filled(manager: &mut BlockManager, names: &[BlockHash]) -> BlockTable {
        let mut table = BlockTable::default();
        assert!(manager.grow(&mut table, names.len() * KV_BLOCK_TOKENS));
        for (&block, &name) in table.blocks().iter().zip(names) {
            manager.name(block, name);
        }
        table
    }

    #[test]
    fn contents_are_found_while_held_and_after() {
        let (mut manager, names) = (BlockManager::new(8), names(4));
        let mut first = filled(&mut manager, &names[..3]);
        assert_eq!(manager.find(&names), Hit { blocks: 3, idle: 0 });
        assert_eq!(manager.find(&names[1..]), Hit { blocks: 2, idle: 0 });
        assert_eq!(manager.find(&names[3..]), Hit::default());

        let mut second = BlockTable::default();
        manager.share(&mut second, &names[..2]);
        assert_eq!((second.blocks(), manager.used()), (&first.blocks()[..2], 3));
        assert!(manager.grow(&mut second, 3 * KV_BLOCK_TOKENS), "and goes on with blocks of its own");
        assert_eq!(manager.used(), 4);
        let held = first.blocks().to_vec();
        manager.release(&mut first);
        assert_eq!(manager.used(), 3, "what is shared stays");
        assert_eq!(manager.find(&names), Hit { blocks: 3, idle: 1 });
        manager.release(&mut second);
        assert_eq!((manager.used(), manager.find(&names)), (0, Hit { blocks: 3, idle: 3 }));

        let mut third = BlockTable::default();
        manager.share(&mut third, &names[..3]);
        assert_eq!((third.blocks(), manager.used()), (&held[..], 3));
    }

    #[test]
    fn what_was_let_go_first_is_given_away_first_and_ends_before_beginnings() {
        let (mut manager, names) = (BlockManager::new(5), names(3));
        let mut old = filled(&mut manager, &names);
        manager.release(&mut old);
        let mut table = BlockTable::default();
        // Two blank blocks, then the last block of the old content, the one before, the first.
        for (blocks, left) in [(2, 3), (3, 2), (4, 1), (5, 0)] {
            assert!(manager.grow(&mut table, blocks * KV_BLOCK_TOKENS));
            assert_eq!(manager.find(&names).blocks, left);
        }
        assert!(!manager.grow(&mut table, 6 * KV_BLOCK_TOKENS));
        manager.release(&mut table);
        assert_eq!((manager.free(), manager.find(&names)), (5, Hit::default()));
    }

    #[test]
    fn being_used_again_makes_a_content_young() {
        let (mut manager, names) = (BlockManager::new(2), names(2));
        let mut first = filled(&mut manager, &names[..1]);
        let mut second = filled(&mut manager, &names[1..]);
        manager.release(&mut first);
        manager.release(&mut second);
        manager.share(&mut first, &names[..1]);
        manager.release(&mut first);
        assert!(manager.grow(&mut second, 1));
        assert_eq!((manager.find(&names[..1]).blocks, manager.find(&names[1..]).blocks), (1, 0));
    }

    #[test]
    fn of_equal_contents_one_has_the_name() {
        let (mut manager, names) = (BlockManager::new(4), names(1));
        let (mut first, mut second) = (filled(&mut manager, &names), filled(&mut manager, &names));
        let named = first.blocks().to_vec();
        manager.release(&mut second);
        let mut third = BlockTable::default();
        manager.share(&mut third, &names);
        assert_eq!(third.blocks(), named);
        manager.release(&mut first);
        manager.release(&mut third);
        assert_eq!((manager.blank.len(), manager.idle.len()), (3, 1));
    }
}

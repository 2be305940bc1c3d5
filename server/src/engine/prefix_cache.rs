//! Names for the contents of KV blocks. The keys and values of a block depend on its tokens and all before them, so a
//! block's name is a hash over the name of the block before it and its own tokens: equal names, equal contents.
//!
//! SHA-256, because a collision would show one client's cache to another, and prompts can be crafted.

use kernels::KV_BLOCK_TOKENS;
use sha2::{Digest, Sha256};

/// The name of a full block's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct BlockHash([u8; 32]);

/// The names of a sequence's full blocks, in position order, as far as its tokens are known.
#[derive(Debug)]
pub(super) struct HashChain {
    /// What the first block follows: nothing, or a salt.
    root: BlockHash,
    blocks: Vec<BlockHash>,
}

impl HashChain {
    /// The chain of a sequence without tokens. Chains with different salts have no names in common.
    pub(super) fn new(salt: Option<&str>) -> Self {
        let root = match salt {
            None => BlockHash([0; 32]),
            Some(salt) => BlockHash(Sha256::digest(salt.as_bytes()).into()),
        };
        Self { root, blocks: Vec::new() }
    }

    /// Names the full blocks of `tokens`, which begin with the tokens of the calls before.
    pub(super) fn extend(&mut self, tokens: &[u32]) {
        let known = self.blocks.len();
        let (full, _) = tokens.as_chunks::<KV_BLOCK_TOKENS>();
        for block in full.get(known..).unwrap_or_default() {
            let before = self.blocks.last().unwrap_or(&self.root);
            let mut hasher = Sha256::new_with_prefix(before.0);
            for token in block {
                hasher.update(token.to_le_bytes());
            }
            self.blocks.push(BlockHash(hasher.finalize().into()));
        }
    }

    /// The names so far.
    pub(super) fn blocks(&self) -> &[BlockHash] {
        &self.blocks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const B: usize = KV_BLOCK_TOKENS;

    fn chain(salt: Option<&str>, tokens: &[u32]) -> Vec<BlockHash> {
        let mut chain = HashChain::new(salt);
        chain.extend(tokens);
        chain.blocks().to_vec()
    }

    #[test]
    fn names_are_those_of_the_whole_beginning() {
        let tokens: Vec<u32> = (0..3 * B as u32 + 5).collect();
        let names = chain(None, &tokens);
        assert_eq!(names.len(), 3, "only full blocks have a name");
        assert_eq!(chain(None, &tokens[..2 * B]), names[..2]);

        let mut other = tokens.clone();
        other[B - 1] += 1;
        let others = chain(None, &other);
        assert!((0..3).all(|i| others[i] != names[i]), "what comes later depends on what was before");
        other = tokens.clone();
        other[B] += 1;
        let others = chain(None, &other);
        assert_eq!(others[0], names[0]);
        assert!(others[1] != names[1] && others[2] != names[2]);

        let repeated = chain(None, &[7; 3 * B]);
        assert_ne!(repeated[0], repeated[1], "the same tokens elsewhere are another content");
    }

    #[test]
    fn salts_separate() {
        let tokens = [7; B];
        let names = [None, Some("a"), Some("b"), Some("")].map(|salt| chain(salt, &tokens)[0]);
        for (i, name) in names.iter().enumerate() {
            assert!(!names[..i].contains(name));
        }
        assert_eq!(chain(Some("a"), &tokens), chain(Some("a"), &tokens));
    }

    #[test]
    fn a_chain_grows_with_its_tokens() {
        let tokens: Vec<u32> = (0..4 * B as u32).collect();
        let mut grown = HashChain::new(None);
        for end in 0..=tokens.len() {
            grown.extend(&tokens[..end]);
            assert_eq!(grown.blocks().len(), end / B);
        }
        assert_eq!(grown.blocks(), chain(None, &tokens));
    }
}

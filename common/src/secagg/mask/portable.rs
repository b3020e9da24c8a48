//! Key streams by the crate `aes`: the kernels' twin, which every processor runs.

use aes::cipher::{Array, BlockCipherEncrypt as _, KeyInit as _};
use aes::{Aes128, Block};
use zeroize::{Zeroize as _, ZeroizeOnDrop};

use super::super::keys::MaskKey;
use super::super::ring::Lane;
use super::{BLOCK, Operation};

/// Blocks that are encrypted at a time: the cipher interleaves them.
const TOGETHER: usize = 16;

/// A key's round keys and the first 12 bytes of its blocks.
#[derive(ZeroizeOnDrop)]
pub(super) struct Cipher {
    // Wipes itself.
    #[zeroize(skip)]
    cipher: Aes128,
    iv: [u8; 12],
}

impl Cipher {
    pub(super) fn new(key: &MaskKey) -> Self {
        Self { cipher: Aes128::new(&Array(key.key)), iv: key.iv }
    }

    /// Whole blocks from block `counter`.
    pub(super) fn blocks<L: Lane>(&self, operation: Operation, counter: u32, lanes: &mut [L]) {
        let mut blocks = [Block::default(); TOGETHER];
        let mut counter = counter;
        for lanes in lanes.chunks_mut(TOGETHER * BLOCK / L::BYTES) {
            let needed = lanes.len() * L::BYTES / BLOCK;
            let blocks = blocks.get_mut(..needed).unwrap_or_default();
            for block in &mut *blocks {
                let counted = self.iv.iter().copied().chain(counter.to_be_bytes());
                block.iter_mut().zip(counted).for_each(|(to, from)| *to = from);
                counter = counter.wrapping_add(1);
            }
            self.cipher.encrypt_blocks(blocks);
            let words = blocks.iter().flat_map(|block| block.chunks_exact(L::BYTES));
            for (lane, word) in lanes.iter_mut().zip(words) {
                let word = L::from_le_bytes(word);
                *lane = match operation {
                    Operation::Add => lane.wrapping_add(word),
                    Operation::Subtract => lane.wrapping_sub(word),
                    Operation::Set => word,
                };
            }
        }
        blocks.iter_mut().for_each(|block| block.zeroize());
    }
}

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
        match operation {
            Operation::Add => self.combine(counter, lanes, |lane, word| lane.wrapping_add(word)),
            Operation::Subtract => self.combine(counter, lanes, |lane, word| lane.wrapping_sub(word)),
            Operation::Set => self.combine(counter, lanes, |_, word| word),
        }
    }

    #[inline]
    fn combine<L: Lane>(&self, mut counter: u32, lanes: &mut [L], combine: impl Fn(L, L) -> L) {
        let mut blocks = [Block::default(); TOGETHER];
        for lanes in lanes.chunks_mut(TOGETHER * BLOCK / L::BYTES) {
            for Array(block) in &mut blocks {
                let (iv, count) = block.split_at_mut(self.iv.len());
                iv.copy_from_slice(&self.iv);
                count.copy_from_slice(&counter.to_be_bytes());
                counter = counter.wrapping_add(1);
            }
            self.cipher.encrypt_blocks(&mut blocks);
            for (lanes, Array(block)) in lanes.chunks_mut(BLOCK / L::BYTES).zip(&blocks) {
                for (lane, word) in lanes.iter_mut().zip(block.chunks_exact(L::BYTES)) {
                    *lane = combine(*lane, L::from_le_bytes(word));
                }
            }
        }
        blocks.iter_mut().for_each(|block| block.zeroize());
    }
}

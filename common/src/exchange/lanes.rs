//! stand-in until secagg::ring is there
use crate::secagg::keys::{MaskKey, Sign};
use aes::Aes128;
use aes::cipher::{BlockCipherEncrypt as _, KeyInit as _};

/// Integers modulo 2^b.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lanes {
    pub(super) width: u32,
    pub(super) values: Vec<u64>,
}

impl Lanes {
    pub(super) fn zeros(width: u32, length: usize) -> Self {
        Self { width, values: vec![0; length] }
    }
    fn mask(&self) -> u64 {
        if self.width == 64 { u64::MAX } else { (1 << self.width) - 1 }
    }
    pub(super) fn from_signed(width: u32, values: &[i64]) -> Self {
        let mut lanes = Self { width, values: values.iter().map(|v| *v as u64).collect() };
        let mask = lanes.mask();
        lanes.values.iter_mut().for_each(|v| *v &= mask);
        lanes
    }
    pub(super) fn packed_bytes(width: u32, length: usize) -> usize {
        (width as usize * length).div_ceil(8)
    }
    pub(super) fn pack(&self, out: &mut Vec<u8>) {
        let (mut word, mut bits) = (0u128, 0);
        for value in &self.values {
            word |= u128::from(*value) << bits;
            bits += self.width;
            while bits >= 8 {
                out.push(word as u8);
                word >>= 8;
                bits -= 8;
            }
        }
        if bits > 0 {
            out.push(word as u8);
        }
    }
    pub(super) fn add_packed(&mut self, bytes: &[u8]) {
        let (mut word, mut bits, mut input) = (0u128, 0, bytes.iter());
        let mask = self.mask();
        for value in &mut self.values {
            while bits < self.width {
                word |= u128::from(input.next().copied().unwrap_or(0)) << bits;
                bits += 8;
            }
            *value = value.wrapping_add(word as u64 & mask) & mask;
            word >>= self.width;
            bits -= self.width;
        }
    }
    pub(super) fn apply(&mut self, key: &MaskKey, sign: Sign) {
        let lane = match self.width {
            0..=16 => 2,
            17..=32 => 4,
            _ => 8,
        };
        let cipher = Aes128::new(&key.key.into());
        let mask = self.mask();
        for (counter, chunk) in self.values.chunks_mut(16 / lane).enumerate() {
            let mut block = [0u8; 16];
            block[..12].copy_from_slice(&key.iv);
            block[12..].copy_from_slice(&(counter as u32).to_be_bytes());
            let mut block = block.into();
            cipher.encrypt_block(&mut block);
            for (value, word) in chunk.iter_mut().zip(block.chunks(lane)) {
                let mut bytes = [0u8; 8];
                bytes[..lane].copy_from_slice(word);
                let word = u64::from_le_bytes(bytes);
                *value = match sign {
                    Sign::Add => value.wrapping_add(word),
                    Sign::Subtract => value.wrapping_sub(word),
                } & mask;
            }
        }
    }
    pub(super) fn signed(&self) -> impl Iterator<Item = i64> + '_ {
        let shift = 64 - self.width;
        self.values.iter().map(move |v| ((*v << shift) as i64) >> shift)
    }
}
impl Lanes {
    pub(super) fn packed_len(&self) -> usize {
        Self::packed_bytes(self.width, self.values.len())
    }
}

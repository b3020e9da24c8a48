//! Bits in and out of bytes, the lowest bit of a byte first.

/// Writes bits behind what a vector holds already.
pub(super) struct BitWriter<'a> {
    bytes: &'a mut Vec<u8>,
    held: u64,
    filled: u32,
}

impl<'a> BitWriter<'a> {
    pub(super) fn new(bytes: &'a mut Vec<u8>) -> Self {
        Self { bytes, held: 0, filled: 0 }
    }

    /// Writes the low `width` bits of `value`, at most 32; its other bits are zero.
    #[inline]
    pub(super) fn put(&mut self, value: u32, width: u32) {
        self.held |= u64::from(value) << self.filled;
        self.filled += width;
        if self.filled >= 32 {
            self.bytes.extend_from_slice(&(self.held as u32).to_le_bytes());
            self.held >>= 32;
            self.filled -= 32;
        }
    }

    /// Writes `value` in the Rice code of parameter `rice`, at most 31: value >> rice zeros, a one, and the low bits.
    #[inline]
    pub(super) fn put_rice(&mut self, value: u32, rice: u32) {
        let mut zeros = value >> rice;
        while zeros >= 32 {
            self.put(0, 32);
            zeros -= 32;
        }
        self.put(1 << zeros, zeros + 1);
        self.put(value & low_bits(rice), rice);
    }

    /// Fills the last byte with zeros.
    pub(super) fn finish(self) {
        let left = self.held.to_le_bytes();
        self.bytes.extend(left.iter().take(self.filled.div_ceil(8) as usize));
    }
}

/// A word whose low `width` bits are ones; `width` is at most 31.
fn low_bits(width: u32) -> u32 {
    (1 << width) - 1
}

/// Reads bits; beyond the end it reads zeros, and [`BitReader::end`] tells.
pub(super) struct BitReader<'a> {
    bytes: &'a [u8],
    /// Bits read.
    at: usize,
}

impl<'a> BitReader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// The next 57 bits or more.
    #[inline]
    fn window(&self) -> u64 {
        let rest = self.bytes.get(self.at / 8..).unwrap_or_default();
        let word = match rest.first_chunk::<8>() {
            Some(word) => u64::from_le_bytes(*word),
            None => rest.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)),
        };
        word >> (self.at % 8)
    }

    /// The next `width` bits, at most 31.
    #[inline]
    pub(super) fn take(&mut self, width: u32) -> u32 {
        let value = self.window() as u32 & low_bits(width);
        self.at += width as usize;
        value
    }

    /// The next value in the Rice code of parameter `rice`, at most 31; `None` if it is beyond `most`, or if the bits end
    /// within its run of zeros.
    #[inline]
    pub(super) fn take_rice(&mut self, rice: u32, most: u32) -> Option<u32> {
        let (longest, mut zeros) = (most >> rice, 0);
        loop {
            let window = self.window() as u32;
            if window != 0 {
                zeros += window.trailing_zeros();
                self.at += window.trailing_zeros() as usize + 1;
                break;
            }
            // A run of zeros is at most as long as the largest value makes it, however long the bytes are.
            zeros += 32;
            self.at += 32;
            if zeros > longest {
                return None;
            }
        }
        if zeros > longest {
            return None;
        }
        Some(zeros << rice | self.take(rice)).filter(|value| *value <= most)
    }

    /// Whether exactly all bytes are read, and the bits that fill the last one are zeros.
    pub(super) fn end(&self) -> bool {
        self.at.div_ceil(8) == self.bytes.len() && (self.at.is_multiple_of(8) || self.window() == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(words in prop::collection::vec((any::<u32>(), 0u32..32), 0..50), rice in 0u32..32) {
            let words: Vec<(u32, u32)> = words.into_iter().map(|(word, width)| (word & low_bits(width), width)).collect();
            let mut bytes = vec![7];
            let mut writer = BitWriter::new(&mut bytes);
            for (word, width) in &words {
                writer.put(*word, *width);
                // At most 2^9 zeros, so that rice = 0 ends.
                writer.put_rice(*word >> (23 - 23.min(rice)), rice);
            }
            writer.finish();
            let mut reader = BitReader::new(&bytes[1..]);
            for (word, width) in &words {
                prop_assert_eq!(reader.take(*width), *word);
                let value = *word >> (23 - 23.min(rice));
                prop_assert_eq!(reader.take_rice(rice, value), Some(value));
            }
            prop_assert!(reader.end());
        }
    }

    #[test]
    fn runs_of_zeros_end_where_the_largest_value_ends() {
        let zeros = vec![0; 1 << 20];
        let mut reader = BitReader::new(&zeros);
        assert_eq!(reader.take_rice(3, 800), None);
        assert!(reader.at <= 128);
        assert_eq!(BitReader::new(&[]).take_rice(0, u32::MAX >> 20), None);
        assert_eq!(BitReader::new(&[0b1000]).take_rice(0, 3), Some(3));
        assert_eq!(BitReader::new(&[0b1000]).take_rice(0, 2), None);
        let mut reader = BitReader::new(&[0b0001_0001, 0]);
        assert_eq!(reader.take(1), 1);
        assert!(!reader.end(), "a bit is left");
        assert_eq!(reader.take(9), 0b1000);
        assert!(reader.end());
        assert!(!BitReader::new(&[0]).end());
        assert!(BitReader::new(&[]).end());
    }
}

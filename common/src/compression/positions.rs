//! Where the sent coordinates are: gaps between them in Rice codes, in blocks that can be read on their own.
//!
//! Gaps of a random set of density p are geometric, for which a Rice code of the right parameter is within about 1 % of
//! the entropy: no arithmetic coder is worth its trouble.

use super::bits::{BitReader, BitWriter};
use super::container::DecodeError;

/// Coordinates of a block are 2 to the power of this, or more.
const LEAST_BLOCK_LOG2: u32 = 16;
/// A block is expected to hold at least this many positions, so that its entry in the table weighs little.
const LEAST_EXPECTED: u128 = 1024;
/// Bytes of a block's entry in the table: its number of positions and of bytes.
const ENTRY_BYTES: usize = 8;
/// ⌊2³²·√2 / ln 2⌋.
const ROUNDING: u128 = 8_762_931_120;

/// How `count` positions below `parameters` are coded: a function of these two numbers alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Plan {
    parameters: usize,
    count: usize,
    /// The parameter of the Rice code.
    pub(super) rice: u32,
    /// Coordinates of a block are 2 to the power of this.
    pub(super) block_log2: u32,
}

impl Plan {
    /// No positions: what a dense container's header says.
    pub(super) const NONE: Self = Self { parameters: 0, count: 0, rice: 0, block_log2: 0 };

    /// The plan for `count` positions below `parameters`, which is at most 2^32 - 1.
    ///
    /// The Rice parameter is max(0, round(log2(ln2/p))), p = count/parameters, in integers: the least r with
    /// count·2^r·√2/ln2 > parameters.
    pub(super) fn new(parameters: usize, count: usize) -> Self {
        let (wide, sought) = (parameters as u128, count as u128);
        let fits = |rice: &u32| sought * (ROUNDING << *rice) > wide << 32;
        let rice = (0..31).find(fits).unwrap_or(31);
        let holds = |log2: &u32| sought << *log2 >= LEAST_EXPECTED * wide;
        let block_log2 = (LEAST_BLOCK_LOG2..32).find(holds).unwrap_or(32);
        Self { parameters, count, rice, block_log2 }
    }

    fn blocks(&self) -> usize {
        if self.count == 0 { 0 } else { self.parameters.div_ceil(1 << self.block_log2) }
    }

    /// The most bytes that positions take: few where they are spread evenly, most where each gap wastes a bit.
    pub(super) fn most_bytes(&self) -> usize {
        let codes = self.count * (1 + self.rice as usize) + ((self.parameters - self.count) >> self.rice);
        self.blocks() * ENTRY_BYTES + (codes + 7 * self.blocks()).div_ceil(8)
    }

    /// Appends `indices`, which ascend below the plan's parameters and are as many as its count.
    pub(super) fn encode(&self, indices: &[u32], out: &mut Vec<u8>) {
        let mut rest = indices;
        let mut table = out.len();
        out.resize(table + self.blocks() * ENTRY_BYTES, 0);
        for block in 0..self.blocks() {
            let start = (block << self.block_log2) as u64;
            let end = start + (1 << self.block_log2);
            let (here, later) = rest.split_at(rest.partition_point(|index| u64::from(*index) < end));
            let before = out.len();
            let mut writer = BitWriter::new(out);
            let mut next = start as u32;
            for index in here {
                writer.put_rice(index.wrapping_sub(next), self.rice);
                next = index.wrapping_add(1);
            }
            writer.finish();
            let bytes = out.len() - before;
            for value in [here.len(), bytes] {
                if let Some(field) = out.get_mut(table..table + 4) {
                    field.copy_from_slice(&(value as u32).to_le_bytes());
                }
                table += 4;
            }
            rest = later;
        }
    }

    /// The positions that `bytes` hold, ascending.
    ///
    /// Nothing is allocated before the table fits the bytes, and never more than the plan's count.
    pub(super) fn decode(&self, bytes: &[u8]) -> Result<Vec<u32>, DecodeError> {
        let blocks = self.blocks();
        let length = |expected| DecodeError::Length { what: "positions", found: bytes.len(), expected };
        let (table, codes) = bytes
            .split_at_checked(blocks.saturating_mul(ENTRY_BYTES))
            .ok_or_else(|| length(blocks.saturating_mul(ENTRY_BYTES)))?;
        let entries = || {
            let (entries, _) = table.as_chunks::<ENTRY_BYTES>();
            entries.iter().map(|entry| {
                let entry = u64::from_le_bytes(*entry);
                (entry as u32 as usize, (entry >> 32) as usize)
            })
        };

        let (mut positions, mut coded) = (0usize, 0usize);
        for (block, (count, bytes)) in entries().enumerate() {
            let refuse = |reason| Err(DecodeError::Positions { block, reason });
            if count > self.coordinates(block) {
                return refuse("the table says more positions than the block has coordinates");
            }
            if count * (1 + self.rice as usize) > bytes.saturating_mul(8) {
                return refuse("the table says more positions than its bytes can hold");
            }
            positions = positions.saturating_add(count);
            coded = coded.saturating_add(bytes);
        }
        if coded != codes.len() {
            return Err(length(table.len().saturating_add(coded)));
        }
        if positions != self.count {
            let (found, expected) = (positions as u64, self.count as u64);
            return Err(DecodeError::Header { field: "positions in the table", found, expected });
        }

        let mut indices = Vec::with_capacity(self.count);
        let mut rest = codes;
        for (block, (count, bytes)) in entries().enumerate() {
            let refuse = |reason| DecodeError::Positions { block, reason };
            let (here, later) = rest.split_at_checked(bytes).ok_or_else(|| refuse("the bytes end early"))?;
            let end = (block << self.block_log2) + self.coordinates(block);
            let mut next = block << self.block_log2;
            let mut reader = BitReader::new(here);
            for _ in 0..count {
                let most =
                    (end - next).checked_sub(1).ok_or_else(|| refuse("a position is beyond the block"))?;
                let gap = reader
                    .take_rice(self.rice, most as u32)
                    .ok_or_else(|| refuse("a position is beyond the block"))?;
                indices.push((next + gap as usize) as u32);
                next += gap as usize + 1;
            }
            if !reader.end() {
                return Err(refuse(
                    "the codes do not end where the table says, or with other bits than zeros",
                ));
            }
            rest = later;
        }
        Ok(indices)
    }

    /// Coordinates of a block: the last may be shorter.
    fn coordinates(&self, block: usize) -> usize {
        self.parameters.saturating_sub(block << self.block_log2).min(1 << self.block_log2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(parameters: usize, indices: &[u32]) -> Vec<u8> {
        let mut bytes = Vec::new();
        Plan::new(parameters, indices.len()).encode(indices, &mut bytes);
        bytes
    }

    fn random(parameters: usize, density: f64, seed: u64) -> Vec<u32> {
        use rand::RngExt;
        let mut rng = crate::rng::Stream::new(seed, crate::rng::Purpose::Shuffle, 0, "");
        (0..parameters as u32).filter(|_| rng.random_bool(density)).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn positions_come_back(parameters in 1usize..300_000, density in 0.0f64..=1.0, steep in 1i32..12, seed: u64) {
            let indices = random(parameters, density.powi(steep), seed);
            let plan = Plan::new(parameters, indices.len());
            let bytes = bytes(parameters, &indices);
            prop_assert!(bytes.len() <= plan.most_bytes());
            prop_assert_eq!(plan.decode(&bytes).unwrap(), indices);
        }
    }

    #[test]
    fn extremes_come_back() {
        let all: Vec<u32> = (0..140_000).collect();
        let far = u32::MAX as usize;
        let cases: [(usize, &[u32]); 9] = [
            (0, &[]),
            (1, &[]),
            (1, &[0]),
            (140_000, &all),
            (140_000, &all[..70_000]),
            (140_000, &all[70_000..]),
            (65_536, &[65_535]),
            (far, &[0, u32::MAX - 1]),
            (far, &[u32::MAX - 1]),
        ];
        for (parameters, indices) in cases {
            let plan = Plan::new(parameters, indices.len());
            let bytes = bytes(parameters, indices);
            assert!(bytes.len() <= plan.most_bytes(), "{parameters} {}", indices.len());
            assert_eq!(plan.decode(&bytes).unwrap(), indices);
        }
    }

    /// The formula of the Rice parameter, against floating point.
    #[test]
    fn the_plan_follows_the_formula() {
        for parameters in [1usize, 28, 26_010, 1_663_370, 10_000_000, u32::MAX as usize] {
            for part in 0..60 {
                let count = ((parameters as f64 * 0.7f64.powi(part)) as usize).max(1);
                let p = count as f64 / parameters as f64;
                let formula = (std::f64::consts::LN_2 / p).log2().round().clamp(0.0, 31.0);
                assert_eq!(f64::from(Plan::new(parameters, count).rice), formula, "{parameters} {count}");
            }
        }
        let plan = |count| Plan::new(10_000_000, count);
        assert_eq!([10_000, 100_000, 500_000, 1_000_000].map(|count| plan(count).rice), [9, 6, 4, 3]);
        assert_eq!([10_000, 100_000, 1_000_000].map(|count| plan(count).block_log2), [20, 17, 16]);
    }

    /// Within 2 % of the entropy of a random set, table included.
    #[test]
    fn positions_are_close_to_their_entropy() {
        for (seed, density) in [0.001, 0.01, 0.05, 0.1].into_iter().enumerate() {
            let parameters = 4_000_000;
            let indices = random(parameters, density, seed as u64);
            let p = indices.len() as f64 / parameters as f64;
            let entropy = -(p * p.log2() + (1.0 - p) * (1.0 - p).log2()) * parameters as f64;
            let bits = 8.0 * bytes(parameters, &indices).len() as f64;
            assert!(bits < 1.02 * entropy, "{density}: {bits} bits, entropy {entropy}");
            assert!(bits > entropy, "{density}: {bits} bits, entropy {entropy}");
        }
    }

    #[test]
    fn lies_are_refused() {
        let parameters = 200_000;
        let indices: Vec<u32> = (0..2_000).map(|index| index * 100).collect();
        let plan = Plan::new(parameters, indices.len());
        assert_eq!(plan.blocks(), 2);
        let good = bytes(parameters, &indices);
        let mutated = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = good.clone();
            change(&mut bytes);
            plan.decode(&bytes).unwrap_err().to_string()
        };
        assert!(mutated(&|bytes| bytes.truncate(15)).contains("15 bytes, but 16"));
        assert!(mutated(&|bytes| bytes.push(0)).contains("are needed"));
        assert!(mutated(&|bytes| bytes[3] = 255).contains("more positions than the block"));
        assert!(mutated(&|bytes| bytes[1] = 255).contains("more positions than its bytes"));
        assert!(mutated(&|bytes| bytes[0] -= 1).contains("positions in the table"));
        // One position less in the first block, one more in the second: bits are left over.
        assert!(mutated(&|bytes| (bytes[0], bytes[8]) = (bytes[0] - 1, bytes[8] + 1)).contains("block 0"));
        assert!(mutated(&|bytes| bytes[16..1_000].fill(0)).contains("beyond the block"));
        let trailing = mutated(&|bytes| *bytes.last_mut().unwrap() |= 0x80);
        assert!(trailing.contains("other bits than zeros"), "{trailing}");
        // The table alone may not make the decoder allocate.
        let mut table = vec![255; 16];
        assert!(Plan::new(parameters, parameters).decode(&table).is_err());
        table.extend([0; 64]);
        assert!(Plan::new(parameters, parameters).decode(&table).is_err());
    }
}

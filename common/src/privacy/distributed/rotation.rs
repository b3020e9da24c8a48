//! Blockwise randomised Hadamard rotation: it spreads a vector evenly over its coordinates and keeps its norm.
//!
//! Each block of 4096 coordinates has its signs flipped by a public seed and is multiplied by the orthonormal Hadamard
//! matrix (Kairouz, Liu and Steinke 2021, arXiv 2102.06387, section 1.1). A coordinate of the result is at most a few
//! times the block's norm over √4096, whatever the vector, except with a small probability over the seed: so a small box
//! holds it. Nothing rests on that but accuracy, and on the seed no secret.

use chacha20::ChaCha12Rng;
use chacha20::rand_core::{Rng, SeedableRng};

/// Coordinates of a block.
pub const BLOCK: usize = 4096;
/// Fewest coordinates of a last block that follows others: a shorter one would spread too little.
const LEAST_LAST: usize = 64;

/// How many coordinates a vector of `dimension` has after padding with zeros: whole blocks, and a last one of a power of
/// two. A single block grows to at most twice its length; after others the last is at least 64.
pub fn padded(dimension: usize) -> usize {
    dimension / BLOCK * BLOCK + last_block(dimension)
}

/// Coordinates of the last, shorter block; 0 if there is none.
fn last_block(dimension: usize) -> usize {
    match (dimension / BLOCK, dimension % BLOCK) {
        (_, 0) => 0,
        (0, rest) => rest.next_power_of_two(),
        (_, rest) => rest.next_power_of_two().max(LEAST_LAST),
    }
}

/// Coordinates of the smallest block of a vector of `dimension`, from 1.
pub(super) fn smallest_block(dimension: usize) -> usize {
    match last_block(dimension) {
        0 => BLOCK,
        last => last,
    }
}

/// The signs of one rotation: one bit a coordinate, 1 for a flip, from the lowest bit of the first byte.
///
/// The bytes are ChaCha12's under the key that BLAKE3 derives from the public `seed`, so no other use of the seed has
/// them.
fn signs(seed: &[u8; 32], padded: usize) -> Vec<u8> {
    let mut bytes = vec![0; padded.div_ceil(8)];
    let key = blake3::derive_key("tributary 2026 hadamard rotation signs v1", seed);
    ChaCha12Rng::from_seed(key).fill_bytes(&mut bytes);
    bytes
}

fn flip(values: &mut [f64], signs: &[u8]) {
    for (eight, byte) in values.chunks_mut(8).zip(signs) {
        for (bit, value) in eight.iter_mut().enumerate() {
            *value = f64::from_bits(value.to_bits() ^ (u64::from(byte >> bit) << 63));
        }
    }
}

/// Rotates `values`, whose length is a [`padded`] one.
pub fn rotate(values: &mut [f64], seed: &[u8; 32]) {
    flip(values, &signs(seed, values.len()));
    values.chunks_mut(BLOCK).for_each(transform);
}

/// Undoes [`rotate`] up to rounding errors.
pub fn rotate_back(values: &mut [f64], seed: &[u8; 32]) {
    values.chunks_mut(BLOCK).for_each(transform);
    flip(values, &signs(seed, values.len()));
}

/// Multiplies a block by the orthonormal Hadamard matrix: its length is a power of two.
fn transform(block: &mut [f64]) {
    let length = block.len();
    let factor = 1.0 / (length as f64).sqrt();
    let mut half = 1;
    let (eights, rest) = block.as_chunks_mut::<8>();
    if rest.is_empty() {
        // Three levels and the factor while eight values are in registers.
        for eight in eights {
            let [a, b, c, d, e, f, g, h] = eight.map(|value| value * factor);
            let [a, b, c, d, e, f, g, h] = [a + b, a - b, c + d, c - d, e + f, e - f, g + h, g - h];
            let [a, b, c, d, e, f, g, h] = [a + c, b + d, a - c, b - d, e + g, f + h, e - g, f - h];
            *eight = [a + e, b + f, c + g, d + h, a - e, b - f, c - g, d - h];
        }
        half = 8;
    } else {
        block.iter_mut().for_each(|value| *value *= factor);
    }
    while 2 * half < length {
        for four in block.chunks_exact_mut(4 * half) {
            let (front, back) = four.split_at_mut(2 * half);
            let (a, b) = front.split_at_mut(half);
            let (c, d) = back.split_at_mut(half);
            for (((a, b), c), d) in a.iter_mut().zip(b).zip(c).zip(d) {
                let (ab, ba, cd, dc) = (*a + *b, *a - *b, *c + *d, *c - *d);
                (*a, *b, *c, *d) = (ab + cd, ba + dc, ab - cd, ba - dc);
            }
        }
        half *= 4;
    }
    if half < length {
        let (a, b) = block.split_at_mut(half);
        for (a, b) in a.iter_mut().zip(b) {
            (*a, *b) = (*a + *b, *a - *b);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn norm(values: &[f64]) -> f64 {
        values.iter().map(|value| value * value).sum::<f64>().sqrt()
    }

    #[test]
    fn lengths() {
        let lengths = [(1, 1), (3, 4), (28, 32), (4096, 4096), (4097, 4160), (4300, 4352), (26_010, 26_624)];
        for (dimension, expected) in lengths {
            assert_eq!(padded(dimension), expected, "{dimension}");
        }
        // A padded length is padded already, and its last block is the smallest.
        for dimension in 1..20_000 {
            let padded = padded(dimension);
            assert!(padded >= dimension && self::padded(padded) == padded, "{dimension}");
            let blocks = vec![0u8; padded];
            let last = blocks.chunks(BLOCK).next_back().unwrap().len();
            assert_eq!(smallest_block(dimension), last);
            assert!(last.is_power_of_two());
        }
    }

    /// Entry (i, j) of the matrix is the parity of the bits that i and j share.
    #[test]
    fn the_transform_is_the_hadamard_matrix() {
        for length in [1usize, 2, 4, 8, 16, 32, 64, 512, 4096] {
            for column in [0, length / 2, length / 3, length - 1] {
                let mut unit = vec![0.0; length];
                unit[column] = 1.0;
                transform(&mut unit);
                for (row, found) in unit.iter().enumerate() {
                    let sign = if (row & column).count_ones() % 2 == 0 { 1.0 } else { -1.0 };
                    assert!((found - sign / (length as f64).sqrt()).abs() < 1e-15, "{length} {row} {column}");
                }
            }
        }
    }

    /// Frozen: clients and coordinator of different versions share it.
    #[test]
    fn the_signs_are_frozen() {
        assert_eq!(signs(&[7; 32], 40), [116, 138, 251, 228, 45]);
        assert_ne!(signs(&[7; 32], 4096), signs(&[8; 32], 4096));
        let flips: u32 = signs(&[9; 32], 1 << 16).iter().map(|byte| byte.count_ones()).sum();
        assert!(flips.abs_diff(1 << 15) < 6 * 128, "{flips}");
    }

    /// One coordinate's mass is spread over its whole block.
    #[test]
    fn a_spike_is_spread() {
        let mut values = vec![0.0; padded(26_010)];
        values[5000] = 1.0;
        rotate(&mut values, &[3; 32]);
        let most = values.iter().fold(0.0f64, |most, value| most.max(value.abs()));
        assert!((most - 1.0 / 64.0).abs() < 1e-12);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn the_norm_is_kept_and_the_way_back_found(
            values in proptest::collection::vec(-1e3f64..1e3, 1..9000),
            seed: [u8; 32],
        ) {
            let mut padded = values.clone();
            padded.resize(super::padded(values.len()), 0.0);
            let before = padded.clone();
            rotate(&mut padded, &seed);
            prop_assert!((norm(&padded) / norm(&before).max(1e-300) - 1.0).abs() < 1e-12 || norm(&before) == 0.0);
            rotate_back(&mut padded, &seed);
            prop_assert!(padded.iter().zip(&before).all(|(back, before)| (back - before).abs() < 1e-9));
        }
    }
}

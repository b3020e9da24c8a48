//! One pass over a vector that keeps the magnitudes from a threshold on: portable, AVX2 and AVX-512.
#![allow(unsafe_code)]

use super::{Candidates, key};

/// Values between two looks at the room in the candidates.
const CHUNK: usize = 4096;

/// The instructions that a pass uses; the result is the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// Any processor.
    Portable,
    /// x86-64 with AVX2.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// x86-64 with AVX-512F, whose `vpcompressd` puts the kept lanes together.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Backend {
    /// The backends that this processor has, the best last.
    pub fn available() -> Vec<Self> {
        let mut backends = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") {
                backends.push(Self::Avx2);
            }
            if is_x86_feature_detected!("avx512f") {
                backends.push(Self::Avx512);
            }
        }
        backends
    }

    /// The best one that this processor has.
    pub fn best() -> Self {
        Self::available().pop().unwrap_or(Self::Portable)
    }

    /// Replaces `candidates` by all coordinates whose magnitude's bits are at least `threshold`, ascending.
    pub(super) fn keep(self, values: &[f32], threshold: u32, candidates: &mut Candidates) {
        let Candidates { indices, keys } = candidates;
        indices.clear();
        keys.clear();
        // A sign bit never counts, so that the comparisons may be signed.
        let threshold = threshold.min(i32::MAX as u32);
        for (chunk, first) in values.chunks(CHUNK).zip((0u32..).step_by(CHUNK)) {
            match self {
                // SAFETY: guarded by the detection of AVX-512F.
                #[cfg(target_arch = "x86_64")]
                Self::Avx512 if is_x86_feature_detected!("avx512f") => unsafe {
                    avx512(chunk, first, threshold, indices, keys);
                },
                // SAFETY: guarded by the detection of AVX2.
                #[cfg(target_arch = "x86_64")]
                Self::Avx2 if is_x86_feature_detected!("avx2") => unsafe {
                    avx2(chunk, first, threshold, indices, keys);
                },
                _ => portable(chunk, first, threshold, indices, keys),
            }
        }
    }
}

/// The twin of the others.
fn portable(values: &[f32], first: u32, threshold: u32, indices: &mut Vec<u32>, keys: &mut Vec<u32>) {
    for (value, index) in values.iter().zip(first..) {
        let key = key(*value);
        if key >= threshold {
            indices.push(index);
            keys.push(key);
        }
    }
}

/// Eight at a time; the lanes that are kept are found by their bits.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2(values: &[f32], first: u32, threshold: u32, indices: &mut Vec<u32>, keys: &mut Vec<u32>) {
    use std::arch::x86_64::*;

    let (eights, rest) = values.as_chunks::<8>();
    let magnitude = _mm256_set1_epi32(i32::MAX);
    let below = _mm256_set1_epi32(threshold as i32 - 1);
    let mut index = first;
    for eight in eights {
        // SAFETY: 32 bytes are read from an array of as many.
        let lanes = unsafe { _mm256_loadu_si256(eight.as_ptr().cast()) };
        let kept = _mm256_cmpgt_epi32(_mm256_and_si256(lanes, magnitude), below);
        let mut mask = _mm256_movemask_ps(_mm256_castsi256_ps(kept)) as u32;
        while mask != 0 {
            let lane = mask.trailing_zeros();
            indices.push(index.wrapping_add(lane));
            keys.push(key(eight.get(lane as usize).copied().unwrap_or(0.0)));
            mask &= mask - 1;
        }
        index = index.wrapping_add(8);
    }
    portable(rest, index, threshold, indices, keys);
}

/// Sixteen at a time, put together in a register and written whole: the next ones overwrite what was too much.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,popcnt")]
fn avx512(values: &[f32], first: u32, threshold: u32, indices: &mut Vec<u32>, keys: &mut Vec<u32>) {
    use std::arch::x86_64::*;

    let (sixteens, rest) = values.as_chunks::<16>();
    let magnitude = _mm512_set1_epi32(i32::MAX);
    let least = _mm512_set1_epi32(threshold as i32);
    let mut lane_indices = _mm512_add_epi32(
        _mm512_set1_epi32(first as i32),
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
    );
    let start = indices.len().min(keys.len());
    indices.reserve(values.len() + 16);
    keys.reserve(values.len() + 16);
    let mut kept = start;
    for sixteen in sixteens {
        // SAFETY: 64 bytes are read from an array of as many.
        let lanes = unsafe { _mm512_loadu_si512(sixteen.as_ptr().cast()) };
        let lanes = _mm512_and_si512(lanes, magnitude);
        let mask = _mm512_cmpge_epi32_mask(lanes, least);
        if mask != 0 {
            // SAFETY: `kept` exceeds the old length by at most the values before this sixteen, and room for all values
            // and 16 more is reserved, so both writes of 16 words are within their vectors.
            unsafe {
                let at = indices.as_mut_ptr().add(kept);
                _mm512_storeu_si512(at.cast(), _mm512_maskz_compress_epi32(mask, lane_indices));
                let at = keys.as_mut_ptr().add(kept);
                _mm512_storeu_si512(at.cast(), _mm512_maskz_compress_epi32(mask, lanes));
            }
            kept += mask.count_ones() as usize;
        }
        lane_indices = _mm512_add_epi32(lane_indices, _mm512_set1_epi32(16));
    }
    // SAFETY: the words up to `kept` were written above, and capacity was reserved for them.
    unsafe {
        indices.set_len(kept);
        keys.set_len(kept);
    }
    portable(rest, first.wrapping_add(16 * sixteens.len() as u32), threshold, indices, keys);
}

//! The k coordinates of largest magnitude, exactly, with ties to the lowest index.
//!
//! A sample of the magnitudes tells a threshold that a few more than k reach, one pass keeps those, and the exact
//! selection is among them. The result never depends on the sample or on the processor, only the time does.

mod kernel;

pub use self::kernel::Backend;

use super::container::SPARSE_PARAMETERS;

/// Most magnitudes in a sample.
const SAMPLE: usize = 1 << 15;
/// One coordinate in so many is sampled from a shorter vector.
const SAMPLED_ONE_IN: usize = 16;
/// Below this length everything is a candidate.
const SHORT: usize = 1 << 12;
/// Neighbours that are sampled together.
const NEIGHBOURS: usize = 8;
/// How far the sampled thresholds are from the k-th largest, in standard deviations of a rank in the sample.
const MARGIN_DEVIATIONS: f64 = 5.0;
/// A bit pattern from here on is infinite or NaN, its sign removed.
const INFINITY: u32 = 0x7f80_0000;

/// Why nothing is selected.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("coordinate {index} is {value}; an update must be finite (lower the learning rate?)")]
pub struct NotFinite {
    /// Position in the flat vector.
    pub index: usize,
    /// The value found.
    pub value: f32,
}

/// Coordinates and their magnitudes as bits: they order like the magnitudes, so that integers do for numbers.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Candidates {
    indices: Vec<u32>,
    keys: Vec<u32>,
}

/// A magnitude's bits.
fn key(value: f32) -> u32 {
    value.to_bits() & 0x7fff_ffff
}

/// The indices of the `k` largest magnitudes, ascending; of equal magnitudes the lowest indices. All, if `k` is larger.
///
/// -0 equals 0, and denormal numbers count. The values are a flat vector of at most `u32::MAX` coordinates; what is
/// beyond is never selected.
///
/// # Errors
/// [`NotFinite`] names the first NaN or infinity.
pub fn top_k(values: &[f32], k: usize) -> Result<Vec<u32>, NotFinite> {
    top_k_with(Backend::best(), values, k)
}

/// [`top_k`] with the instructions of `backend`: the same result, to be compared and timed.
///
/// # Errors
/// As [`top_k`].
pub fn top_k_with(backend: Backend, values: &[f32], k: usize) -> Result<Vec<u32>, NotFinite> {
    let values = values.get(..SPARSE_PARAMETERS).unwrap_or(values);
    let refuse = |index: usize| NotFinite { index, value: values.get(index).copied().unwrap_or(f32::NAN) };
    if k == 0 || k >= values.len() {
        return match values.iter().position(|value| !value.is_finite()) {
            Some(index) => Err(refuse(index)),
            None => Ok((0..values.len().min(k) as u32).collect()),
        };
    }
    let mut deviations = MARGIN_DEVIATIONS;
    // Room for what the threshold keeps, most likely, so that it is not moved while it grows.
    let room = (k + k / 2 + 8 * SHORT).min(values.len() + SHORT);
    let mut candidates = Candidates { indices: Vec::with_capacity(room), keys: Vec::with_capacity(room) };
    let surely = loop {
        let (low, high) = thresholds(values, k, deviations);
        backend.keep(values, low, &mut candidates);
        if candidates.keys.len() >= k {
            break high;
        }
        // The sample misled: with a wide enough margin everything is kept.
        deviations *= 8.0;
    };
    // Nothing is larger than a NaN's bits, so that all of them are candidates.
    if candidates.keys.iter().fold(0, |largest, key| largest.max(*key)) >= INFINITY {
        let unfit = candidates.indices.iter().zip(&candidates.keys).find(|(_, key)| **key >= INFINITY);
        return Err(refuse(unfit.map_or(0, |(index, _)| *index as usize)));
    }
    Ok(exact(candidates, k, surely))
}

/// A threshold that at least `k` magnitudes most likely reach, and one that fewer than `k` most likely exceed.
fn thresholds(values: &[f32], k: usize, deviations: f64) -> (u32, u32) {
    if values.len() < SHORT {
        return (0, u32::MAX);
    }
    let mut sample = sample(values);
    let share = k as f64 / values.len() as f64;
    let rank = sample.len() as f64 * share;
    let margin = deviations * (rank * (1.0 - share)).sqrt() + 1.0;
    // The threshold of rank n is the n-th largest of the sample.
    let place = |rank: f64| (rank.ceil() as usize).checked_sub(1).filter(|_| rank >= 1.0);
    let Some(low) = place(rank + margin).filter(|low| *low < sample.len()) else { return (0, u32::MAX) };
    let (larger, low_key, _) = sample.select_nth_unstable_by(low, |a, b| b.cmp(a));
    let high_key = match place(rank - margin).filter(|high| *high < larger.len()) {
        Some(high) => *larger.select_nth_unstable_by(high, |a, b| b.cmp(a)).1,
        None => u32::MAX,
    };
    (*low_key, high_key)
}

/// Magnitudes from all over a vector, that of layers alike: eight neighbours at a hashed place in each of many equal parts.
fn sample(values: &[f32]) -> Vec<u32> {
    // Neighbours share a miss of the cache, which is most of a sample's cost; what they have in common, the margin pays.
    let parts = (values.len() / SAMPLED_ONE_IN).min(SAMPLE) / NEIGHBOURS;
    let start = |part: usize| part * values.len() / parts;
    let mut sample = Vec::with_capacity(parts * NEIGHBOURS);
    for part in 0..parts {
        let room = start(part + 1) - start(part) - NEIGHBOURS;
        let hash = (part as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let place = start(part) + ((hash * room as u64) >> 32) as usize;
        sample.extend(values.iter().skip(place).take(NEIGHBOURS).map(|value| key(*value)));
    }
    sample
}

/// The `k` largest of at least `k` candidates, of which fewer than `k` are most likely above `surely`.
fn exact(candidates: Candidates, k: usize, surely: u32) -> Vec<u32> {
    let Candidates { mut indices, keys } = candidates;
    let above = |threshold: u32| keys.iter().filter(|key| **key > threshold).count();
    // What is surely among the k largest need not be ordered.
    let sure = above(surely);
    let (sure, bound) = if sure < k { (sure, surely) } else { (0, u32::MAX) };
    let mut open = vec![0; keys.len() - sure];
    let mut filled = 0;
    for key in &keys {
        // Written whatever it is, and overwritten if it was not wanted: no branch to guess wrong.
        if let Some(place) = open.get_mut(filled) {
            *place = *key;
        }
        filled += usize::from(*key <= bound);
    }
    let place = k - sure - 1;
    if place >= open.len() {
        return indices;
    }
    let smallest = *open.select_nth_unstable_by(place, |a, b| b.cmp(a)).1;
    let mut ties = k - above(smallest);
    let mut kept = 0;
    for (at, key) in keys.iter().enumerate() {
        let index = indices.get(at).copied().unwrap_or(0);
        if let Some(place) = indices.get_mut(kept) {
            *place = index;
        }
        let tie = usize::from(*key == smallest) & usize::from(ties > 0);
        ties -= tie;
        kept += usize::from(*key > smallest) | tie;
    }
    indices.truncate(kept);
    indices
}

#[cfg(test)]
mod tests;

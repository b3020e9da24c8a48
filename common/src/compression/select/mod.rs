//! The k coordinates of largest magnitude, exactly, with ties to the lowest index.
//!
//! A sample of the magnitudes tells a threshold that a few more than k reach, one pass keeps those, and the exact
//! selection is among them. The result never depends on the sample or on the processor, only the time does.

mod kernel;

pub use self::kernel::Backend;

use super::container::SPARSE_PARAMETERS;

/// Most magnitudes in a sample.
const SAMPLE: usize = 1 << 16;
/// One coordinate in so many is sampled from a shorter vector.
const SAMPLED_ONE_IN: usize = 16;
/// Below this length everything is a candidate.
const SHORT: usize = 1 << 12;
/// How far the sampled thresholds are from the k-th largest, in standard deviations of a rank in the sample.
const MARGIN_DEVIATIONS: f64 = 3.0;
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
    let mut candidates = Candidates::default();
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
    let size = (values.len() / SAMPLED_ONE_IN).min(SAMPLE);
    // One at a hashed place in each of as many equal parts: layers are sampled alike, periods are not met.
    let place = |part: usize| {
        let (start, end) = (part * values.len() / size, (part + 1) * values.len() / size);
        let hash = (part as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        start + ((hash * (end - start) as u64) >> 32) as usize
    };
    let mut sample: Vec<u32> =
        (0..size).filter_map(|part| values.get(place(part))).map(|value| key(*value)).collect();
    let share = k as f64 / values.len() as f64;
    let rank = size as f64 * share;
    let margin = deviations * (rank * (1.0 - share)).sqrt() + 1.0;
    // The threshold of rank n is the n-th largest of the sample.
    let mut ranked = |rank: f64| match (rank.ceil() as usize).checked_sub(1) {
        Some(place) if rank >= 1.0 && place < sample.len() => {
            *sample.select_nth_unstable_by(place, |a, b| b.cmp(a)).1
        }
        _ if rank < 1.0 => u32::MAX,
        _ => 0,
    };
    (ranked(rank + margin), ranked(rank - margin))
}

/// The `k` largest of at least `k` candidates, of which fewer than `k` are most likely above `surely`.
fn exact(candidates: Candidates, k: usize, surely: u32) -> Vec<u32> {
    let Candidates { mut indices, keys } = candidates;
    let above = |threshold: u32| keys.iter().filter(|key| **key > threshold).count();
    // What is surely among the k largest need not be ordered.
    let sure = Some(above(surely)).filter(|sure| *sure < k);
    let mut open: Vec<u32> = match sure {
        Some(_) => keys.iter().copied().filter(|key| *key <= surely).collect(),
        None => keys.clone(),
    };
    let place = k - sure.unwrap_or(0) - 1;
    if place >= open.len() {
        return indices;
    }
    let smallest = *open.select_nth_unstable_by(place, |a, b| b.cmp(a)).1;
    let mut ties = k - above(smallest);
    let mut keys = keys.iter();
    indices.retain(|_| {
        let key = keys.next().copied().unwrap_or(0);
        let tie = key == smallest && ties > 0;
        ties -= usize::from(tie);
        key > smallest || tie
    });
    indices
}

#[cfg(test)]
mod tests;

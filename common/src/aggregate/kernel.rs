//! The loops of the exact sum, over plain slices, written so that the compiler makes vectors of them.

use super::sum::FRACTION_BITS;

/// 1.5 · 2^52: adding it to an `x` with |x| ≤ 2^51 leaves the integer nearest to `x`, ties to even, in the mantissa.
///
/// No call and no conversion instruction, which baseline x86-64 lacks for vectors of 64-bit integers.
const MAGIC: f64 = 6_755_399_441_055_744.0;
/// What one unit of a coordinate is in fixed point.
const ONE: f64 = (1u64 << FRACTION_BITS) as f64;
/// Independent maxima of [`largest`]: one would make every step wait for the last.
const STRIPES: usize = 16;

/// The integer nearest to `x`, ties to even, for |x| ≤ 2^51.
fn nearest(x: f64) -> i64 {
    ((x + MAGIC).to_bits() as i64).wrapping_sub(MAGIC.to_bits() as i64)
}

/// `round(value · 2^32)`, ties to even, for an admitted coordinate; the product is exact in `f64`.
pub(super) fn fixed_point(value: f32) -> i64 {
    nearest(f64::from(value) * ONE)
}

/// The largest magnitude; `None` if a value is NaN or infinite.
pub(super) fn largest(values: &[f32]) -> Option<f32> {
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    let (mut maxima, mut zeros) = ([0f32; STRIPES], [0f32; STRIPES]);
    let (stripes, rest) = values.as_chunks::<STRIPES>();
    for stripe in stripes {
        for ((maximum, zero), value) in maxima.iter_mut().zip(&mut zeros).zip(stripe) {
            *maximum = larger(value.abs(), *maximum);
            // Zero for every number, NaN for the rest, and NaN stays.
            *zero += value * 0.0;
        }
    }
    let rest_finite = rest.iter().all(|value| value.is_finite());
    let largest = maxima.into_iter().chain(rest.iter().map(|value| value.abs())).fold(0.0, larger);
    (rest_finite && !zeros.iter().any(|zero| zero.is_nan())).then_some(largest)
}

/// Adds one update to `lanes`, where the largest product of weight and coordinate is at most 2^51 in fixed point.
pub(super) fn add_light(lanes: &mut [i64], delta: &[f32], weight: f64) {
    for (lane, value) in lanes.iter_mut().zip(delta) {
        *lane = lane.wrapping_add(nearest(product(*value, weight)));
    }
}

/// Adds four such updates, where the sum of their largest products is at most 2^51: `lanes` are read and written once.
pub(super) fn add_four_light(lanes: &mut [i64], deltas: [&[f32]; 4], weights: [f64; 4]) {
    let [first, second, third, fourth] = deltas;
    let values = first.iter().zip(second).zip(third).zip(fourth);
    for (lane, (((first, second), third), fourth)) in lanes.iter_mut().zip(values) {
        let pair = product(*first, weights[0]) + product(*second, weights[1]);
        let other = product(*third, weights[2]) + product(*fourth, weights[3]);
        *lane = lane.wrapping_add(nearest(pair + other));
    }
}

/// Adds one update to `lanes`, where no product of weight and coordinate is beyond `i64`.
pub(super) fn add_heavy(lanes: &mut [i64], delta: &[f32], weight: i64) {
    for (lane, value) in lanes.iter_mut().zip(delta) {
        *lane = lane.wrapping_add(fixed_point(*value).wrapping_mul(weight));
    }
}

/// Weight times coordinate in fixed point: a whole number, exact up to 2^53.
fn product(value: f32, weight: f64) -> f64 {
    ((f64::from(value) * ONE + MAGIC) - MAGIC) * weight
}

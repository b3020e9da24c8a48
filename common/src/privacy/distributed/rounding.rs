//! Stochastic rounding to integers, with and without a bound on the result.
//!
//! A value is rounded up or down so that its mean stays (Kairouz, Liu and Steinke 2021, arXiv 2102.06387, section 4.2).
//! With the same coins two vectors that differ by g are rounded to two that differ by a stochastic rounding of g: value
//! z becomes ⌈z − v⌉ with v uniform, and ⌈a − v⌉ − ⌈b − v⌉ is a − b rounded up or down with the right mean. The bound
//! of that paper's Theorem 1 therefore holds for what one example changes in a sum, as long as the coins do not depend
//! on the data and nobody who sees the result knows them.
//!
//! A coin has 32 bits, so a mean is off by up to 2⁻³² of a step. In the bound that is less than the part of 10⁻⁶ by
//! which vectors are clipped below the clip norm.

use rand::Rng;

use crate::privacy::noise::SecretRng;

/// How often a rounding that must stay within a bound is tried. Each attempt succeeds with probability 0.39 or more.
const ATTEMPTS: u32 = 1000;
/// Coins that are drawn at a time.
const COINS: usize = 256;

/// Rounds `values`, all within ±2⁵², to integers.
pub fn round(rng: &mut SecretRng, values: &[f64], into: &mut Vec<i64>) {
    into.clear();
    into.reserve(values.len());
    let mut bytes = [0u8; 4 * COINS];
    for part in values.chunks(COINS) {
        let (coins, _) = bytes.as_chunks_mut::<4>();
        if let Some(coins) = coins.get_mut(..part.len()) {
            rng.fill_bytes(coins.as_flattened_mut());
        }
        let rounded = |(value, coin): (&f64, &mut [u8; 4])| {
            let below = floor(*value);
            // Exact: the difference of a float and its floor, times a power of two.
            let threshold = ((*value - below as f64) * 4_294_967_296.0) as u64;
            below + i64::from(u64::from(u32::from_le_bytes(*coin)) < threshold)
        };
        into.extend(part.iter().zip(coins).map(rounded));
    }
}

/// ⌊`value`⌋ without the library's function, which most targets call out of line.
#[inline]
fn floor(value: f64) -> i64 {
    let towards_zero = value as i64;
    towards_zero - i64::from(towards_zero as f64 > value)
}

/// Rounds `values` until the result's squared norm is at most `bound`; false if it never is.
///
/// The bound is checked in integers, so what is returned keeps it without any argument about the coins.
#[must_use]
pub fn round_within(rng: &mut SecretRng, values: &[f64], bound: u128, into: &mut Vec<i64>) -> bool {
    for _ in 0..ATTEMPTS {
        round(rng, values, into);
        if square(into) <= bound {
            return true;
        }
    }
    false
}

/// The squared norm.
pub fn square(values: &[i64]) -> u128 {
    values.iter().map(|value| u128::from(value.unsigned_abs()).pow(2)).fold(0, u128::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::privacy::accounting::distributed::rounded_norm;
    use rand::RngExt;

    #[test]
    fn a_value_goes_to_a_neighbour_and_its_mean_stays() {
        let mut rng = SecretRng::seeded(1);
        let values = [0.0, 0.25, -0.25, 3.5, -3.5, 1e-3, -7.999, 5.0, -5.0, 123_456.75, -4e9 - 0.5];
        let mut sums = [0i64; 11];
        let (mut rounded, draws) = (Vec::new(), 100_000);
        for _ in 0..draws {
            round(&mut rng, &values, &mut rounded);
            for ((sum, value), found) in sums.iter_mut().zip(values).zip(&rounded) {
                assert!((*found as f64 - value).abs() < 1.0, "{value}: {found}");
                *sum += found - value.floor() as i64;
            }
        }
        for (sum, value) in sums.iter().zip(values) {
            let part = value - value.floor();
            let error = 5.5 * (part * (1.0 - part) / f64::from(draws)).sqrt();
            assert!((*sum as f64 / f64::from(draws) - part).abs() <= error, "{value}");
        }
    }

    /// The vector whose rounding grows most: every coordinate lies between two integers.
    fn vectors(dimension: usize, norm: f64, rng: &mut SecretRng) -> Vec<Vec<f64>> {
        let flat = vec![norm / (dimension as f64).sqrt(); dimension];
        let random: Vec<f64> = (0..dimension).map(|_| rng.random_range(-1.0..1.0)).collect();
        let length = random.iter().map(|v| v * v).sum::<f64>().sqrt();
        vec![flat, random.iter().map(|v| v * norm / length).collect()]
    }

    /// Client level: what leaves is within the bound, always, and means are close to right.
    #[test]
    fn a_bounded_rounding_is_bounded() {
        let mut rng = SecretRng::seeded(2);
        let mut retried = 0;
        for (dimension, norm) in [(64, 4.0), (256, 100.0), (1024, 16.0)] {
            let most = rounded_norm(norm, dimension, Some((-0.5f64).exp()));
            let bound = (most * most) as u128;
            for values in vectors(dimension, norm, &mut rng) {
                let mut rounded = Vec::new();
                for _ in 0..2000 {
                    assert!(round_within(&mut rng, &values, bound, &mut rounded));
                    assert!(square(&rounded) <= bound && rounded.len() == dimension);
                    round(&mut rng, &values, &mut rounded);
                    retried += u32::from(square(&rounded) > bound);
                }
            }
        }
        // The bound is one that a rounding can miss: without the retry this test would fail.
        assert!(retried > 0);
        let (mut rounded, values) = (Vec::new(), [2.0, 0.0]);
        assert!(!round_within(&mut rng, &values, 3, &mut rounded));
    }

    /// Example level: same coins, with and without one example's vector.
    #[test]
    fn what_one_example_changes_is_bounded() {
        let mut rng = SecretRng::seeded(3);
        let mut largest = 0f64;
        for (dimension, norm) in [(64, 4.0), (1024, 52.0), (4096, 103.0)] {
            let most = rounded_norm(norm, dimension, Some(2f64.powi(-40)));
            for example in vectors(dimension, norm, &mut rng) {
                for draw in 0..1000 {
                    let others: Vec<f64> = (0..dimension).map(|_| rng.random_range(-90.0..90.0)).collect();
                    let with: Vec<f64> = others.iter().zip(&example).map(|(a, b)| a + b).collect();
                    let (mut a, mut b) = (Vec::new(), Vec::new());
                    round(&mut SecretRng::seeded(draw), &others, &mut a);
                    round(&mut SecretRng::seeded(draw), &with, &mut b);
                    let difference: Vec<i64> = b.iter().zip(&a).map(|(b, a)| b - a).collect();
                    for (found, value) in difference.iter().zip(&example) {
                        assert!((*found as f64 - value).abs() < 1.0 + 1e-9);
                    }
                    let found = (square(&difference) as f64).sqrt();
                    assert!(found <= most, "{dimension} {norm}: {found} {most}");
                    largest = largest.max(found / norm);
                }
            }
        }
        // Rounding does add to the norm: a bound of the norm alone would be wrong.
        assert!(largest > 1.2, "{largest}");
    }
}

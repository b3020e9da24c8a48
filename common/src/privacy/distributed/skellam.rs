//! A share of Skellam noise: the table sampler and how far it is from exact.
//!
//! The Skellam distribution of variance μ, of the difference of two Poisson variates of mean μ/2, has the probabilities
//! p(k) = e^−μ·I_k(μ). Sums of such variates are Skellam again with the sum of the variances, so shares add up exactly,
//! and a wide one is drawn as the sum of some from a narrower table.
//!
//! The table is exact to about 2⁻¹¹², not to f64's 2⁻⁵³: the probabilities come from Miller's backward recurrence
//! I_(k−1) = I_(k+1) + (2k/μ)·I_k (Abramowitz and Stegun 9.12, example 1) in integers of 384 bits, where
//! p(0) + 2Σp(k) = 1 is the normalisation, and are rounded to multiples of 2⁻¹²⁷ that sum to one. The alias method
//! (Walker 1977) is set up in such integers too. A draw takes one word of 64 bits, and a second one only if the first
//! ties with a threshold, about once in 2⁵⁰ draws. [`Skellam::distance`] is the bound that is charged.
//!
//! Timing: no branch depends on the drawn value but that tie; which line of the table is read does, so an observer of
//! the cache could learn magnitudes of noise. Observers of the client's own machine are outside of what noise protects
//! from.

use rand::Rng;

use crate::privacy::noise::{NoiseError, SecretRng};

/// Variances are multiples of 2 to the minus this.
const FRACTION_BITS: i32 = 16;
/// Largest variance of one table: a standard deviation of 2¹².
const TABLE_VARIANCE: f64 = (1 << 24) as f64;
/// Most variates of a table that make up one share.
const MOST_PARTS: u32 = 1024;
/// A table leaves out magnitudes that are rarer than 2 to the minus this.
const TAIL_BITS: f64 = 144.0;
/// Magnitudes' probabilities are integers out of 2 to this.
const WEIGHT_BITS: u32 = 127;
/// Words that are drawn at a time.
const WORDS: usize = 256;

/// A bound on ln P(X ≥ `reach`) for a Skellam variable of this `variance`: Chernoff's, by cosh.
///
/// ln E e^(θX) = μ(cosh θ − 1), least less θt at sinh θ = t/μ: −t·asinh(t/μ) + t²/(μ + √(μ² + t²)).
pub fn ln_tail(variance: f64, reach: f64) -> f64 {
    if reach <= 0.0 {
        return 0.0;
    }
    if variance <= 0.0 {
        return f64::NEG_INFINITY;
    }
    let root = reach.hypot(variance);
    (reach * reach / (variance + root) - reach * (reach / variance).asinh()).min(0.0)
}

/// The least whole number that a Skellam variable of this variance reaches with a probability of at most e^`ln`.
pub(super) fn reach(variance: f64, ln: f64) -> f64 {
    let (mut low, mut high) = (0.0f64, 1.0f64);
    while ln_tail(variance, high) > ln && high < 1e18 {
        low = high;
        high *= 2.0;
    }
    while high - low > 1.0 {
        let middle = (0.5 * (low + high)).floor();
        if ln_tail(variance, middle) > ln { low = middle } else { high = middle }
    }
    high
}

/// The smallest variance that a sampler can have and that is at least `variance`; `None` beyond the largest.
pub fn variance_at_least(variance: f64) -> Option<f64> {
    let parts = parts(variance)?;
    let unit = f64::from(parts) * 2f64.powi(-FRACTION_BITS);
    let rounded = (variance / unit).ceil().max(1.0) * unit;
    // Rounding up may have passed the table's limit.
    if self::parts(rounded)? == parts { Some(rounded) } else { variance_at_least(rounded) }
}

/// Variates of one table that make up a share of `variance`: a power of two.
fn parts(variance: f64) -> Option<u32> {
    if !(variance > 0.0 && variance <= TABLE_VARIANCE * f64::from(MOST_PARTS)) {
        return None;
    }
    Some(((variance / TABLE_VARIANCE).ceil().max(1.0) as u32).next_power_of_two())
}

/// Skellam noise of one variance.
#[derive(Clone)]
pub struct Skellam {
    variance: f64,
    parts: u32,
    /// log₂ of the number of cells.
    index_bits: u32,
    /// Per cell: below its threshold a draw has the cell's own magnitude, else the other one, which the low
    /// `index_bits` are. The high bits are the threshold's first.
    cells: Vec<u64>,
    /// The next 64 bits of each threshold.
    rest: Vec<u64>,
    distance: f64,
}

impl std::fmt::Debug for Skellam {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Skellam({})", self.variance)
    }
}

impl Skellam {
    /// Noise of `variance`, which must be one of [`variance_at_least`].
    ///
    /// # Errors
    /// [`NoiseError::StandardDeviation`] for any other.
    pub fn new(variance: f64) -> Result<Self, NoiseError> {
        let impossible = NoiseError::StandardDeviation(variance.max(0.0).sqrt());
        if variance_at_least(variance) != Some(variance) {
            return Err(impossible);
        }
        let parts = parts(variance).ok_or(impossible.clone())?;
        let units = (variance / f64::from(parts) * 2f64.powi(FRACTION_BITS)) as u64;
        let (weights, distance) = weights(units).ok_or(impossible)?;
        let index_bits = weights.len().next_power_of_two().trailing_zeros();
        let (cells, rest) = alias(weights, index_bits);
        Ok(Self { variance, parts, index_bits, cells, rest, distance: f64::from(parts) * distance })
    }

    /// Its variance.
    pub fn variance(&self) -> f64 {
        self.variance
    }

    /// A bound on the total variation distance between one variate and exact noise.
    pub fn distance(&self) -> f64 {
        self.distance
    }

    /// Adds a variate to every value.
    pub fn add(&self, rng: &mut SecretRng, values: &mut [i64]) {
        let mut bytes = [0u8; 8 * WORDS];
        for part in values.chunks_mut(WORDS) {
            for _ in 0..self.parts {
                let (words, _) = bytes.as_chunks_mut::<8>();
                if let Some(words) = words.get_mut(..part.len()) {
                    rng.fill_bytes(words.as_flattened_mut());
                }
                for (value, word) in part.iter_mut().zip(words) {
                    *value = value.wrapping_add(self.variate(u64::from_le_bytes(*word), rng));
                }
            }
        }
    }

    /// The variate of a random word: a sign, a cell, and the first bits to compare with its threshold.
    #[inline]
    fn variate(&self, word: u64, rng: &mut SecretRng) -> i64 {
        let mask = (1u64 << self.index_bits) - 1;
        let index = (word >> 1) & mask;
        let cell = self.cells.get(index as usize).copied().unwrap_or(0);
        let (drawn, threshold) = (word >> (1 + self.index_bits), cell >> self.index_bits);
        let own = drawn < threshold || (drawn == threshold && self.tie(index, rng));
        let magnitude = if own { index } else { cell & mask } as i64;
        let sign = -((word & 1) as i64);
        (magnitude ^ sign) - sign
    }

    /// Whether a draw that equals the first bits of a cell's threshold is below the whole of it.
    #[cold]
    fn tie(&self, index: u64, rng: &mut SecretRng) -> bool {
        rng.next_u64() < self.rest.get(index as usize).copied().unwrap_or(0)
    }
}

/// The weights, out of 2¹²⁷, of the magnitudes 0, 1, … of Skellam noise of variance `units`/2¹⁶, and a bound on the total
/// variation distance from the exact ones; `None` if an integer is too small for them.
///
/// Let N be the last magnitude and t ≤ 2⁻¹⁴⁴ the mass beyond. What bounds the distance:
/// - The recurrence starts with I_(N+1) = 0 in place of its value. The solution is then off by a multiple of the
///   other one, K_k, which grows with k: by at most p(N+1) ≤ t at each magnitude. Both signs, and the mass left out:
///   2(N + 2)·t.
/// - Each of at most N + 1 steps rounds down by less than 1 where the value is at least 2¹²⁸, and errors pass on by the same
///   positive recurrence as the values: (N + 1)·2⁻¹²⁸ relative, twice for the normalisation.
/// - Weights are rounded down, and what is missing from 2¹²⁷ is given to magnitude 0.
fn weights(units: u64) -> Option<(Vec<u128>, f64)> {
    let variance = units as f64 * 2f64.powi(-FRACTION_BITS);
    let last = reach(variance, -TAIL_BITS * std::f64::consts::LN_2) as u64;
    let mut beyond = Wide::default();
    let mut here = Wide::power(128);
    let mut values = vec![here.leading()];
    let mut sum = here;
    for k in (1..=last).rev() {
        // I_(k−1) = I_(k+1) + 2k·2¹⁶/units·I_k.
        let before = here.times((2 * k) << FRACTION_BITS)?.over(units).plus(&beyond)?;
        (beyond, here) = (here, before);
        values.push(here.leading());
        if k > 1 {
            sum = sum.plus(&here)?;
        }
    }
    // I_0 + 2·(I_1 + … + I_N); with N = 0 there would be no noise, and the reach is never below 1.
    let total = sum.plus(&sum)?.plus(&here)?.leading().rounded_up();
    let inverse = inverse(total.bits);
    let mut weights: Vec<u128> = Vec::with_capacity(values.len());
    for (magnitude, value) in values.iter().rev().enumerate() {
        // (value/total)·2^127, twice for the two signs: value.bits·inverse/2^254, and the exponents.
        let signs = i32::from(magnitude > 0);
        let shift = total.exponent - value.exponent - 1 - signs;
        let product = high_product(value.bits, inverse);
        weights.push(match u32::try_from(shift) {
            Ok(shift) => product.checked_shr(shift).unwrap_or(0),
            Err(_) => product.checked_mul(1 << shift.unsigned_abs())?,
        });
    }
    let given = weights.iter().try_fold(0u128, |sum, weight| sum.checked_add(*weight))?;
    let missing = (1u128 << WEIGHT_BITS).checked_sub(given)?;
    *weights.first_mut()? += missing;
    let (entries, tail) = (last as f64 + 2.0, 2f64.powf(-TAIL_BITS));
    let distance = 2.0 * entries * tail
        + 2.0 * entries * 2f64.powi(-128)
        + missing as f64 * 2f64.powi(-(WEIGHT_BITS as i32));
    Some((weights, distance))
}

/// Walker's cells for `weights` out of 2¹²⁷, in integers: each holds 2^(127 − `index_bits`), its own magnitude's part below
/// the threshold, another's above. The first 63 − `index_bits` bits of the thresholds stand over the other magnitude in
/// the first list, the next 64 in the second.
fn alias(mut weights: Vec<u128>, index_bits: u32) -> (Vec<u64>, Vec<u64>) {
    let count = 1usize << index_bits;
    let full = 1u128 << (WEIGHT_BITS - index_bits);
    weights.resize(count, 0);
    let (mut small, mut large) = (Vec::new(), Vec::new());
    for (index, weight) in weights.iter().enumerate() {
        if *weight < full { small.push(index) } else { large.push(index) }
    }
    // A full cell is one whose other magnitude is its own.
    let mut cells: Vec<u64> = (0..count as u64).collect();
    let mut rest = vec![0u64; count];
    while let (Some(index), Some(giver)) = (small.pop(), large.last().copied()) {
        let own = weights.get(index).copied().unwrap_or(0);
        if let (Some(cell), Some(rest)) = (cells.get_mut(index), rest.get_mut(index)) {
            *cell = ((own >> 64) as u64) << index_bits | giver as u64;
            *rest = own as u64;
        }
        if let Some(weight) = weights.get_mut(giver) {
            *weight -= full - own;
            if *weight < full {
                large.pop();
                small.push(giver);
            }
        }
    }
    // Sums are exact, so no small cell is left without a giver.
    (cells, rest)
}

/// An unsigned integer of 384 bits, the lowest limb first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Wide([u64; 6]);

/// The first 128 bits of an integer, and by what power of two they are to be multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Leading {
    bits: u128,
    exponent: i32,
}

impl Wide {
    /// 2 to the power of `exponent` < 384.
    fn power(exponent: usize) -> Self {
        let mut limbs = [0; 6];
        if let Some(limb) = limbs.get_mut(exponent / 64) {
            *limb = 1 << (exponent % 64);
        }
        Self(limbs)
    }

    /// The sum, unless it is too large.
    fn plus(mut self, other: &Self) -> Option<Self> {
        let mut carry = false;
        for (limb, other) in self.0.iter_mut().zip(other.0) {
            let (sum, first) = limb.overflowing_add(other);
            let (sum, second) = sum.overflowing_add(u64::from(carry));
            (*limb, carry) = (sum, first || second);
        }
        (!carry).then_some(self)
    }

    /// The product, unless it is too large.
    fn times(mut self, factor: u64) -> Option<Self> {
        let mut carry = 0u128;
        for limb in &mut self.0 {
            let product = u128::from(*limb) * u128::from(factor) + carry;
            (*limb, carry) = (product as u64, product >> 64);
        }
        (carry == 0).then_some(self)
    }

    /// The quotient, rounded down; `divisor` is not 0.
    fn over(mut self, divisor: u64) -> Self {
        let mut left = 0u128;
        for limb in self.0.iter_mut().rev() {
            let part = left << 64 | u128::from(*limb);
            (*limb, left) = ((part / u128::from(divisor)) as u64, part % u128::from(divisor));
        }
        self
    }

    /// Its first 128 bits, rounded down. Of 0, all of them.
    fn leading(&self) -> Leading {
        let mut bits = 0u128;
        let mut exponent = 0;
        for (place, limb) in self.0.iter().enumerate().rev() {
            if bits == 0 {
                (bits, exponent) = (u128::from(*limb), 64 * place as i32);
                continue;
            }
            let room = bits.leading_zeros().min(64);
            if room == 0 {
                break;
            }
            bits = bits << room | u128::from(limb.checked_shr(64 - room).unwrap_or(*limb));
            exponent -= room as i32;
            if room < 64 {
                break;
            }
        }
        let room = if bits == 0 { 0 } else { bits.leading_zeros() };
        Leading { bits: bits << room, exponent: exponent - room as i32 }
    }
}

impl Leading {
    /// One more in the last of the bits: at least what they were cut from.
    fn rounded_up(self) -> Self {
        match self.bits.checked_add(1) {
            Some(bits) => Self { bits, ..self },
            None => Self { bits: 1 << 127, exponent: self.exponent + 1 },
        }
    }
}

/// ⌊2²⁵⁴/`divisor`⌋ for a divisor from 2¹²⁷.
fn inverse(divisor: u128) -> u128 {
    // Long division of 2^254 bit by bit; the quotient is at most 2^127. The first 127 bits leave 2^126 < divisor.
    let (mut quotient, mut left) = (0u128, 1u128 << 126);
    for _ in 0..128 {
        let carry = left >> 127 == 1;
        left <<= 1;
        quotient <<= 1;
        if carry || left >= divisor {
            left = left.wrapping_sub(divisor);
            quotient |= 1;
        }
    }
    quotient
}

/// ⌊a·b/2¹²⁸⌋.
fn high_product(a: u128, b: u128) -> u128 {
    let low = |x: u128| x & u128::from(u64::MAX);
    let (ah, al, bh, bl) = (a >> 64, low(a), b >> 64, low(b));
    let (hl, lh) = (ah * bl, al * bh);
    let middle = ((al * bl) >> 64) + low(hl) + low(lh);
    ah * bh + (hl >> 64) + (lh >> 64) + (middle >> 64)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// What the table's cells come to, per magnitude out of 2¹²⁷.
    fn masses(noise: &Skellam) -> Vec<u128> {
        let (mask, bits) = ((1u64 << noise.index_bits) - 1, noise.index_bits);
        let full = 1u128 << (WEIGHT_BITS - bits);
        let mut masses = vec![0u128; noise.cells.len()];
        for (index, (cell, rest)) in noise.cells.iter().zip(&noise.rest).enumerate() {
            let own = u128::from(cell >> bits) << 64 | u128::from(*rest);
            masses[index] += own;
            masses[(cell & mask) as usize] += full - own;
        }
        masses
    }

    /// Against 60 digits of e^−μ·I_k(μ), from mpmath: ⌊p·2¹²⁷⌋, twice for the two signs.
    #[test]
    fn the_table_has_the_exact_probabilities_to_a_hundred_bits() {
        let small = 2f64.powi(-16);
        for (variance, magnitude, expected) in [
            (5.25, 0, 30_427_749_431_851_391_043_112_278_037_313_075_609u128),
            (5.25, 1, 54_701_479_847_814_193_356_722_118_751_931_991_215),
            (5.25, 2, 40_016_839_874_059_279_855_092_320_359_604_440_279),
            (5.25, 7, 693_792_796_326_029_613_548_490_269_778_087_288),
            (5.25, 20, 245_309_765_624_249_996_970_020_219),
            (5.25, 40, 150_717),
            (small, 0, 170_138_587_341_750_273_402_857_746_642_584_119_804),
            (small, 1, 2_596_108_815_563_943_310_591_238_682_723_701),
            (small, 2, 9_903_369_199_900_656_663_207_258_591),
            (small, 3, 25_185_570_271_435_086_568_663),
            (1000.5, 0, 2_146_175_612_082_116_982_657_101_361_329_252_670),
            (1000.5, 1, 4_290_205_584_559_342_556_453_356_616_754_022_208),
            (1000.5, 31, 2_654_809_870_310_381_169_536_053_499_776_455_434),
            (1000.5, 100, 29_042_169_960_129_367_967_451_501_084_983_970),
            (1000.5, 300, 170_769_934_406_176_114),
        ] {
            let masses = masses(&Skellam::new(variance).unwrap());
            assert_eq!(masses.iter().sum::<u128>(), 1 << 127);
            let off = masses[magnitude].abs_diff(expected) as f64;
            // The promised distance, 2⁻¹¹⁶ or so for these; magnitude 0 got what the others lost.
            assert!(off < 2f64.powi(15), "{variance} {magnitude}: {off}");
        }
    }

    #[test]
    fn moments_of_every_table_are_right() {
        for variance in [2f64.powi(-16), 0.25, 1.0, 40.0, 3e4, 1e6, TABLE_VARIANCE, 3e7] {
            let variance = variance_at_least(variance).unwrap();
            let noise = Skellam::new(variance).unwrap();
            let masses = masses(&noise);
            let one = 2f64.powi(-127);
            let moment = |power| {
                let term = |(k, mass): (usize, &u128)| *mass as f64 * one * (k as f64).powi(power);
                masses.iter().enumerate().map(term).sum::<f64>()
            };
            // Of a part: Var = μ, E x⁴ = 3μ² + μ.
            let part = variance / f64::from(noise.parts);
            assert!((moment(2) / part - 1.0).abs() < 1e-12, "{variance}: {}", moment(2));
            assert!((moment(4) / (3.0 * part * part + part) - 1.0).abs() < 1e-12, "{variance}");
            assert!(noise.distance() > 0.0 && noise.distance() < f64::from(noise.parts) * 2f64.powi(-108));
        }
    }

    /// Frozen: a change of the sampler is seen.
    #[test]
    fn variates_of_a_known_stream() {
        let drawn = |variance: f64| {
            let mut values = [0i64; 8];
            Skellam::new(variance).unwrap().add(&mut SecretRng::seeded(11), &mut values);
            values
        };
        assert_eq!(
            [drawn(0.5), drawn(10_000.0), drawn(67_108_864.0)],
            [
                [0, 0, 0, 1, 1, 0, 0, 0],
                [-47, 16, -82, 30, 213, -57, -19, 18],
                [5237, -7107, -8911, 8115, 4740, -3648, -7781, 5675],
            ]
        );
    }

    #[test]
    fn drawn_variates_have_the_distribution_by_chi_square() {
        for variance in [0.25, 5.25, 1000.5] {
            let noise = Skellam::new(variance).unwrap();
            let masses = masses(&noise);
            let count = 1_000_000;
            let mut values = vec![0i64; count];
            noise.add(&mut SecretRng::seeded(12), &mut values);
            let mut counts = BTreeMap::<i64, f64>::new();
            values.iter().for_each(|value| *counts.entry(*value).or_default() += 1.0);
            let (mut chi, mut cells) = (0.0, 0.0);
            for at in -(masses.len() as i64 - 1)..masses.len() as i64 {
                let signs = if at == 0 { 1.0 } else { 2.0 };
                let mass = masses[at.unsigned_abs() as usize] as f64 * 2f64.powi(-127) / signs;
                let expected = mass * count as f64;
                if expected < 20.0 {
                    continue;
                }
                chi += (counts.get(&at).copied().unwrap_or_default() - expected).powi(2) / expected;
                cells += 1.0;
            }
            assert!((chi - cells).abs() < 6.0 * (2.0f64 * cells).sqrt(), "{variance}: {chi} {cells}");
        }
    }

    /// Also above the table's limit, where a share is a sum of several variates, and for sums of shares.
    #[test]
    fn shares_add_up_to_their_variances() {
        for (variance, shares) in [(2.0, 1), (2.0, 7), (40_000.0, 3), (1e8, 1), (1e9, 2)] {
            let variance = variance_at_least(variance).unwrap();
            let noise = Skellam::new(variance).unwrap();
            let mut rng = SecretRng::seeded(13);
            let mut sum = vec![5i64; 60_000];
            (0..shares).for_each(|_| noise.add(&mut rng, &mut sum));
            let count = sum.len() as f64;
            let mean = sum.iter().map(|value| (value - 5) as f64).sum::<f64>() / count;
            let square = sum.iter().map(|value| ((value - 5) as f64).powi(2)).sum::<f64>() / count;
            let planned = variance * f64::from(shares);
            assert!(mean.abs() < 5.5 * (planned / count).sqrt(), "{variance} {shares}: {mean}");
            let error = 5.5 * ((2.0 * planned * planned + planned) / count).sqrt();
            assert!((square - planned).abs() < error, "{variance} {shares}: {square}");
        }
    }

    #[test]
    fn variances_are_rounded_up_to_what_a_table_has() {
        for (variance, expected) in [
            (1e-9, 2f64.powi(-16)),
            (1.0, 1.0),
            (1.000_001, 1.0 + 2f64.powi(-16)),
            (16_777_216.0, 16_777_216.0),
        ] {
            assert_eq!(variance_at_least(variance), Some(expected));
        }
        for variance in [16_777_216.001, 1e8 + 0.3, 4_294_967_296.0] {
            let rounded = variance_at_least(variance).unwrap();
            assert!(rounded >= variance && rounded / variance < 1.000_001);
            assert_eq!(Skellam::new(rounded).unwrap().variance(), rounded);
        }
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e11] {
            assert_eq!(variance_at_least(bad), None);
            assert!(Skellam::new(bad).is_err());
        }
        assert!(Skellam::new(0.3).is_err());
    }

    /// Chernoff's bound against the table: never below the tail, and not far above it.
    #[test]
    fn the_tail_bound_is_a_bound() {
        for variance in [0.25, 5.25, 1000.5, 250_000.0] {
            let masses = masses(&Skellam::new(variance).unwrap());
            let mut tail = 0.0;
            for (reach, mass) in masses.iter().enumerate().skip(1).rev() {
                tail += *mass as f64 * 2f64.powi(-128);
                if tail > 1e-30 {
                    let bound = ln_tail(variance, reach as f64).exp();
                    assert!(bound >= tail, "{variance} {reach}: {bound} {tail}");
                    assert!(bound < 100.0 * tail, "{variance} {reach}: {bound} {tail}");
                }
            }
            let reached = reach(variance, -40.0);
            assert!(ln_tail(variance, reached) <= -40.0 && ln_tail(variance, reached - 1.0) > -40.0);
        }
        // Wide sums: no digits are lost to cancellation.
        let wide = ln_tail(1e18, 7e9);
        assert!((wide + 24.5).abs() < 1e-6, "{wide}");
    }
}

//! Secret randomness and the noise drawn from it: Gaussian on a public grid, and the exact discrete Gaussian.
//!
//! Noise that somebody else can predict protects nobody: everything here is drawn from [`SecretRng`], never from
//! [`crate::rng`].

use chacha20::ChaCha12Rng;
use chacha20::rand_core::{SeedableRng, TryCryptoRng, TryRng};
use rand::rngs::SysRng;
use rand::{Rng, RngExt};
use rand_distr::{Distribution, StandardNormal};

/// Why noise cannot be drawn.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum NoiseError {
    /// Without a secret key there is no privacy, so nothing is computed.
    #[error("the operating system gave no randomness: {0}")]
    Entropy(String),
    /// The noise has no scale to draw from.
    #[error("a standard deviation of {0} is not possible: a finite number between 1e-30 and 1e30 is needed")]
    StandardDeviation(f64),
    /// The clip norm is no bound.
    #[error("a clip norm of {0} is not possible: a finite number between 1e-30 and 1e30 is needed")]
    ClipNorm(f64),
}

/// A stream of secret random bits: ChaCha12 under a 256-bit key from the operating system.
///
/// Every use gets a key of its own, which is never written down, shown or repeated: a process that starts again after
/// a crash draws other noise. The key is wiped from memory when the stream is dropped.
pub struct SecretRng(ChaCha12Rng);

impl SecretRng {
    /// A stream with a new key.
    ///
    /// # Errors
    /// [`NoiseError::Entropy`] if the operating system gives none.
    pub fn new() -> Result<Self, NoiseError> {
        let rng = ChaCha12Rng::try_from_rng(&mut SysRng);
        rng.map(Self).map_err(|error| NoiseError::Entropy(error.to_string()))
    }

    /// A stream that anybody can repeat: no privacy at all.
    ///
    /// It exists to repeat an experiment bit by bit, behind the feature `seeded-noise`, which no released program has.
    /// A run with it has no epsilon: who knows the seed subtracts the noise.
    #[cfg(any(test, feature = "seeded-noise"))]
    pub fn seeded(seed: u64) -> Self {
        Self(ChaCha12Rng::seed_from_u64(seed))
    }

    /// Whether an event of probability `probability` happens; exact to 2⁻⁶⁴.
    #[inline]
    pub fn coin(&mut self, probability: f64) -> bool {
        // 2⁶⁴·p as an integer: exact, because a float is a dyadic number, but for what lies below 2⁻⁶⁴.
        let bound = (probability.clamp(0.0, 1.0) * 18_446_744_073_709_551_616.0) as u128;
        u128::from(self.0.next_u64()) < bound
    }

    /// The positions below `units` of a Poisson sample: each on its own, with `probability`. Replaces `into`.
    pub fn poisson_sample(&mut self, units: usize, probability: f64, into: &mut Vec<u32>) {
        into.clear();
        let units = u32::try_from(units).unwrap_or(u32::MAX);
        into.extend((0..units).filter(|_| self.coin(probability)));
    }
}

impl std::fmt::Debug for SecretRng {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("SecretRng")
    }
}

impl TryRng for SecretRng {
    type Error = std::convert::Infallible;

    #[inline]
    fn try_next_u32(&mut self) -> Result<u32, Self::Error> {
        self.0.try_next_u32()
    }

    #[inline]
    fn try_next_u64(&mut self) -> Result<u64, Self::Error> {
        self.0.try_next_u64()
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Self::Error> {
        self.0.try_fill_bytes(bytes)
    }
}

impl TryCryptoRng for SecretRng {}

/// Scales for which grids and squares stay within the range of f64 and f32.
fn is_possible(scale: f64) -> bool {
    scale.is_finite() && (1e-30..=1e30).contains(&scale)
}

/// 2 to the power of ⌊log₂ `scale`⌋ + `shift`.
fn power_of_two(scale: f64, shift: i32) -> f64 {
    let mut exponent = scale.log2().floor() as i32;
    // The logarithm is rounded; the comparison is exact.
    if 2f64.powi(exponent) > scale {
        exponent -= 1;
    }
    2f64.powi(exponent + shift)
}

/// Gaussian noise whose sums lie on a public grid: the default.
///
/// A sum and its noise are added in f64 and the *result* is rounded to a multiple of [`Gaussian::grid`], a power of two
/// that is 256 to 512 times smaller than the standard deviation and depends on nothing else.
///
/// What it is for: the bits of a floating-point normal variate are not those of a real number, so `sum + noise` can
/// tell the sum: some results are impossible for one of two neighbouring sums (Mironov 2012; Jin et al. 2022 invert
/// the sampler). Here every grid point is possible for every sum, with nearly the right probability. The ziggurat draws
/// a point of a grid of 2⁻⁵¹ times its layer's width, at most 3.92 standard deviations, so at least 2⁴⁰ of its points
/// fall into each cell of ours, and rounding shifts a cell's border by at most 2⁻⁵² of the larger of sum and noise. The
/// probability of each result within 8 standard deviations is that of the ideal rounded Gaussian, which is
/// post-processing of the real one, times 1 ± 2⁻³⁹ (for sums up to 16 standard deviations; ± doubles with the sum
/// beyond). Over `n` released coordinates this adds at most `n·2⁻³⁸` to ε, 5·10⁻⁵ for 480 steps of 26,010 parameters, and
/// far less where errors do not all point the same way. Beyond 8 standard deviations, which happens with probability
/// 1.3·10⁻¹⁵ per coordinate, the bound is not claimed: this is what δ would have to grow by, per coordinate.
///
/// What it does not do: it is an argument about one generator's resolution and takes ChaCha12 for random, not a proof of
/// exactness as for [`DiscreteGaussian`]; it does not look at how the sum itself was rounded, whose errors in f32 the
/// clip factor's margin is for; and its time depends on the noise (one draw in 80 takes longer), though never on the
/// sum.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gaussian {
    standard_deviation: f64,
    grid: f64,
    /// Adding and subtracting it rounds to the grid: at this size f64 has no finer numbers.
    rounding: f64,
}

impl Gaussian {
    /// Noise of `standard_deviation`.
    ///
    /// # Errors
    /// [`NoiseError::StandardDeviation`] for one that is not within 1e-30 to 1e30.
    pub fn new(standard_deviation: f64) -> Result<Self, NoiseError> {
        if !is_possible(standard_deviation) {
            return Err(NoiseError::StandardDeviation(standard_deviation));
        }
        let grid = power_of_two(standard_deviation, -8);
        Ok(Self { standard_deviation, grid, rounding: grid * 6_755_399_441_055_744.0 })
    }

    /// Standard deviation of the noise; the rounding adds less than two parts in a million.
    pub fn standard_deviation(&self) -> f64 {
        self.standard_deviation
    }

    /// What every noised value is a multiple of.
    pub fn grid(&self) -> f64 {
        self.grid
    }

    /// `value` with noise, on the grid; brought within ±2⁵⁰ grid units, 2⁴¹ standard deviations and more.
    #[inline]
    pub fn noised(&self, rng: &mut SecretRng, value: f64) -> f64 {
        let normal: f64 = StandardNormal.sample(&mut rng.0);
        let most = self.rounding / 6.0;
        let sum = (value + self.standard_deviation * normal).clamp(-most, most);
        (sum + self.rounding) - self.rounding
    }

    /// Noises every value. What does not fit f32 exactly is rounded after it lies on the grid.
    pub fn add(&self, rng: &mut SecretRng, values: &mut [f32]) {
        for value in values {
            *value = self.noised(rng, f64::from(*value)) as f32;
        }
    }
}

/// Other ways to a normal variate, to be measured against: nothing else uses them.
pub mod alternatives {
    use super::{Distribution, SecretRng, StandardNormal};

    /// Adds normal variates as they come, in f32: open to attacks on floating-point numbers.
    pub fn plain(rng: &mut SecretRng, standard_deviation: f64, values: &mut [f32]) {
        for value in values {
            let normal: f64 = StandardNormal.sample(&mut rng.0);
            *value += (standard_deviation * normal) as f32;
        }
    }

    /// Adds half the sum of four normal variates (Holohan and Braghin 2021), in f32.
    pub fn four_summed(rng: &mut SecretRng, standard_deviation: f64, values: &mut [f32]) {
        for value in values {
            let mut normal = || -> f64 { StandardNormal.sample(&mut rng.0) };
            let sum = normal() + normal() + normal() + normal();
            *value += (standard_deviation * 0.5 * sum) as f32;
        }
    }
}

/// The exact discrete Gaussian on the integers, P(x) ∝ exp(−x²/(2σ²)) (Canonne, Kamath and Steinke 2020).
///
/// Every step is a comparison of integers with uniform integers, so the distribution is exact given a uniform
/// generator. Time depends on the noise drawn, not on what it is added to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiscreteGaussian {
    /// σ².
    variance: u64,
    /// ⌊σ⌋ + 1, the scale of the discrete Laplace proposal.
    scale: u64,
}

impl DiscreteGaussian {
    /// Largest σ²: the sampler's fractions then fit 128 bits.
    pub const MAXIMUM_VARIANCE: u64 = 1 << 56;

    /// Noise with parameter σ² = `variance`; at least 1, at most [`DiscreteGaussian::MAXIMUM_VARIANCE`].
    ///
    /// # Errors
    /// [`NoiseError::StandardDeviation`] outside of it.
    pub fn new(variance: u64) -> Result<Self, NoiseError> {
        if !(1..=Self::MAXIMUM_VARIANCE).contains(&variance) {
            return Err(NoiseError::StandardDeviation((variance as f64).sqrt()));
        }
        Ok(Self { variance, scale: variance.isqrt() + 1 })
    }

    /// σ².
    pub fn variance(&self) -> u64 {
        self.variance
    }

    /// One variate (algorithm 3).
    pub fn sample(&self, rng: &mut SecretRng) -> i64 {
        loop {
            let magnitude = self.laplace(rng);
            // (|x| − σ²/t)² / (2σ²) as a fraction of integers. A proposal for which it does not fit 128 bits is some
            // 2⁹ standard deviations away and would be taken with probability below e⁻¹⁰⁰⁰⁰⁰.
            let (scale, variance) = (u128::from(self.scale), u128::from(self.variance));
            let along = u128::from(magnitude.unsigned_abs()) * scale;
            let Some(numerator) = along.abs_diff(variance).checked_pow(2) else { continue };
            if exponential(rng, numerator, 2 * variance * scale * scale) {
                return magnitude;
            }
        }
    }

    /// Adds a variate to every value.
    pub fn add(&self, rng: &mut SecretRng, values: &mut [i64]) {
        for value in values {
            *value = value.saturating_add(self.sample(rng));
        }
    }

    /// The discrete Laplace distribution, P(x) ∝ exp(−|x|/t) (algorithm 2).
    fn laplace(&self, rng: &mut SecretRng) -> i64 {
        loop {
            let within = below(rng, u128::from(self.scale)) as u64;
            if !exponential(rng, u128::from(within), u128::from(self.scale)) {
                continue;
            }
            let mut whole = 0u64;
            while exponential(rng, 1, 1) {
                whole += 1;
            }
            let Some(magnitude) = whole.checked_mul(self.scale).and_then(|x| x.checked_add(within)) else {
                continue;
            };
            let negative = rng.next_u64() >> 63 == 1;
            match i64::try_from(magnitude) {
                // Zero has one sign.
                Ok(0) if negative => {}
                Ok(magnitude) => return if negative { -magnitude } else { magnitude },
                Err(_) => {}
            }
        }
    }
}

/// True with probability exp(−`numerator`/`denominator`) (algorithm 1).
fn exponential(rng: &mut SecretRng, mut numerator: u128, denominator: u128) -> bool {
    while numerator > denominator {
        if !exponential_of_fraction(rng, 1, 1) {
            return false;
        }
        numerator -= denominator;
    }
    exponential_of_fraction(rng, numerator, denominator)
}

/// The same for a fraction of at most one: the first k at which a coin of probability γ/k fails is odd.
fn exponential_of_fraction(rng: &mut SecretRng, numerator: u128, denominator: u128) -> bool {
    let mut k = 1;
    while below(rng, denominator.saturating_mul(k)) < numerator {
        k += 1;
    }
    k % 2 == 1
}

/// A uniform integer below `bound`, which is at least 1 (Lemire 2019 where 64 bits do, masks beyond).
#[inline]
fn below(rng: &mut SecretRng, bound: u128) -> u128 {
    match u64::try_from(bound) {
        Ok(bound) => u128::from(rng.random_range(0..bound.max(1))),
        Err(_) => {
            let mask = u128::MAX >> bound.leading_zeros();
            loop {
                let drawn = (u128::from(rng.next_u64()) | u128::from(rng.next_u64()) << 64) & mask;
                if drawn < bound {
                    return drawn;
                }
            }
        }
    }
}

/// The integers that clipped gradients are rounded to, so that sums and sensitivity are exact and the noise is the
/// discrete Gaussian.
///
/// The unit is a power of two tied to the noise: σ is 2²⁰ to 2²¹ units.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lattice {
    unit: f64,
    sensitivity: u64,
    noise: DiscreteGaussian,
}

impl Lattice {
    /// For gradients of norm at most `clip_norm` and noise of `noise_multiplier` times that.
    ///
    /// # Errors
    /// [`NoiseError`] where the two are out of range; a noise multiplier is at least 2⁻²⁰ here.
    pub fn new(clip_norm: f64, noise_multiplier: f64) -> Result<Self, NoiseError> {
        if !is_possible(clip_norm) {
            return Err(NoiseError::ClipNorm(clip_norm));
        }
        let deviation = clip_norm * noise_multiplier;
        if !is_possible(deviation) || noise_multiplier < 2f64.powi(-20) {
            return Err(NoiseError::StandardDeviation(deviation));
        }
        let unit = power_of_two(deviation, -20);
        // Rounded up, and one more for the product's own rounding: never less noise than asked for.
        let variance = ((deviation / unit).powi(2).ceil() as u64).saturating_add(1);
        Ok(Self { unit, sensitivity: (clip_norm / unit) as u64, noise: DiscreteGaussian::new(variance)? })
    }

    /// What one integer stands for.
    pub fn unit(&self) -> f64 {
        self.unit
    }

    /// Largest Euclidean norm of one rounded gradient, in units. At most the clip norm's: the noise multiplier that
    /// was asked for is kept or exceeded.
    pub fn sensitivity(&self) -> u64 {
        self.sensitivity
    }

    /// The noise, in units.
    pub fn noise(&self) -> DiscreteGaussian {
        self.noise
    }

    /// Adds `factor · gradient`, rounded towards zero, to `sum`: the rounding makes no vector longer. Adds nothing,
    /// and returns false, where the rounded vector's norm is not at most the sensitivity, as with a factor too large
    /// or a value that is no number.
    pub fn add(&self, gradient: &[f32], factor: f64, sum: &mut [i64]) -> bool {
        let scale = factor / self.unit;
        let bound = u128::from(self.sensitivity).pow(2);
        let rounded = |value: &f32| (f64::from(*value) * scale) as i64;
        let mut square = 0u128;
        let mut finite = true;
        for value in gradient {
            finite &= (f64::from(*value) * scale).is_finite();
            square = square.saturating_add(u128::from(rounded(value).unsigned_abs()).pow(2));
        }
        let fits = finite && square <= bound;
        for (sum, value) in sum.iter_mut().zip(gradient) {
            *sum = sum.saturating_add(if fits { rounded(value) } else { 0 });
        }
        fits
    }
}

/// Adds independent [`Gaussian`] noise of a standard deviation to each value, from a generator of its own.
///
/// # Errors
/// One line: a standard deviation that is none, or no random bytes from the operating system.
pub fn add_gaussian(values: &mut [f64], standard_deviation: f64) -> Result<(), String> {
    let noise = Gaussian::new(standard_deviation).map_err(|error| error.to_string())?;
    let mut rng = SecretRng::new().map_err(|error| error.to_string())?;
    for value in values {
        *value = noise.noised(&mut rng, *value);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn noise(seed: u64, deviation: f64, count: usize) -> Vec<f64> {
        let (gaussian, mut rng) = (Gaussian::new(deviation).unwrap(), SecretRng::seeded(seed));
        (0..count).map(|_| gaussian.noised(&mut rng, 0.0)).collect()
    }

    /// Φ by its complementary error function's continued fraction and series (Abramowitz and Stegun 26.2.10, 26.2.14).
    fn normal_cdf(x: f64) -> f64 {
        let density = (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
        if x.abs() < 3.0 {
            let (mut term, mut sum) = (x, x);
            for k in 1..200 {
                term *= x * x / f64::from(2 * k + 1);
                sum += term;
            }
            return 0.5 + density * sum;
        }
        let fraction = (1..100).rev().fold(x.abs(), |tail, k| x.abs() + f64::from(k) / tail);
        if x > 0.0 { 1.0 - density / fraction } else { density / fraction }
    }

    #[test]
    fn moments_are_those_of_the_normal_distribution() {
        let count = 1_000_000;
        let values = noise(1, 3.0, count);
        let moment = |power: i32| values.iter().map(|v| (v / 3.0).powi(power)).sum::<f64>() / count as f64;
        // Six standard errors of each.
        let error = |variance: f64| 6.0 * (variance / count as f64).sqrt();
        assert!(moment(1).abs() < error(1.0));
        assert!((moment(2) - 1.0).abs() < error(2.0));
        assert!(moment(3).abs() < error(15.0));
        assert!((moment(4) - 3.0).abs() < error(96.0));
    }

    #[test]
    fn the_distribution_is_normal_by_kolmogorov_and_smirnov_and_in_its_tails() {
        let count = 200_000;
        let mut values = noise(2, 0.7, count);
        values.sort_unstable_by(f64::total_cmp);
        let distance = values
            .iter()
            .enumerate()
            .map(|(rank, value)| ((rank as f64 + 0.5) / count as f64 - normal_cdf(value / 0.7)).abs())
            .fold(0.0, f64::max);
        // Probability 1e-6; the grid itself makes for half a cell's mass, 0.0008.
        assert!(distance < 2.7 / (count as f64).sqrt() + 0.0008, "{distance}");
        let beyond = values.iter().filter(|value| value.abs() > 3.7 * 0.7).count() as f64;
        let expected = 2.0 * normal_cdf(-3.7) * count as f64;
        assert!((beyond - expected).abs() < 6.0 * expected.sqrt(), "{beyond} {expected}");
    }

    /// Chi-square over the cells of the grid itself: a sum that is not on the grid is noised to the rounded Gaussian.
    #[test]
    fn cells_have_the_probability_of_the_rounded_gaussian_whatever_the_sum() {
        let gaussian = Gaussian::new(1.0).unwrap();
        let cell = gaussian.grid();
        assert_eq!(cell, 1.0 / 256.0);
        for value in [0.0, 0.3 * cell, 0.123_456_789] {
            let mut rng = SecretRng::seeded(3);
            let mut counts = BTreeMap::<i64, u32>::new();
            let count = 2_000_000;
            for _ in 0..count {
                *counts.entry((gaussian.noised(&mut rng, value) / cell) as i64).or_default() += 1;
            }
            let (mut chi, mut cells) = (0.0, 0.0);
            for at in -500i64..500 {
                let edge = |by: f64| normal_cdf((at as f64 + by) * cell - value);
                let expected = (edge(0.5) - edge(-0.5)) * f64::from(count);
                let found = f64::from(counts.get(&at).copied().unwrap_or_default());
                chi += (found - expected).powi(2) / expected;
                cells += 1.0;
            }
            assert!((chi - cells).abs() < 6.0 * (2.0f64 * cells).sqrt(), "{value}: {chi} {cells}");
        }
    }

    #[test]
    fn every_noised_value_lies_on_the_grid_and_a_huge_one_is_bounded() {
        for (deviation, cell) in [(1.0, 2f64.powi(-8)), (1.9, 2f64.powi(-8)), (0.3, 2f64.powi(-10))] {
            let gaussian = Gaussian::new(deviation).unwrap();
            assert_eq!(gaussian.grid(), cell);
            let mut rng = SecretRng::seeded(4);
            for value in [0.0, 1e-9, 1.0 / 3.0, -77.77, 1e6, -1e11, 1e18, -1e300, f64::INFINITY] {
                let most = cell * 2f64.powi(50);
                for _ in 0..1000 {
                    let noised = gaussian.noised(&mut rng, value);
                    assert_eq!((noised / cell).fract(), 0.0, "{deviation} {value}");
                    let kept = value.clamp(-most, most);
                    // One part in 2⁵² is what f64 holds of it.
                    assert!((noised - kept).abs() < 9.0 * deviation + kept.abs() * 1e-15, "{value}");
                }
            }
        }
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-31] {
            Gaussian::new(bad).unwrap_err();
        }
    }

    /// pitfall 11: no key is used twice, after a restart neither.
    #[test]
    fn no_two_streams_are_equal_and_none_shows_its_key() {
        let first = || SecretRng::new().unwrap().next_u64();
        let drawn: std::collections::BTreeSet<u64> = (0..1000).map(|_| first()).collect();
        assert_eq!(drawn.len(), 1000);
        assert_eq!(format!("{:?}", SecretRng::new().unwrap()), "SecretRng");
        let noised = || {
            let mut values = [0.5f32; 8];
            Gaussian::new(1.0).unwrap().add(&mut SecretRng::new().unwrap(), &mut values);
            values
        };
        assert_ne!(noised(), noised());
    }

    #[test]
    fn a_poisson_sample_takes_each_unit_with_its_probability() {
        let mut rng = SecretRng::seeded(5);
        let (units, draws, rate) = (50, 20_000, 0.13);
        let (mut sample, mut taken, mut sizes) = (Vec::new(), vec![0u32; units], Vec::new());
        for _ in 0..draws {
            rng.poisson_sample(units, rate, &mut sample);
            sample.iter().for_each(|unit| taken[*unit as usize] += 1);
            sizes.push(sample.len() as f64);
        }
        let spread = (f64::from(draws) * rate * (1.0 - rate)).sqrt();
        assert!(taken.iter().all(|taken| (f64::from(*taken) - f64::from(draws) * rate).abs() < 5.5 * spread));
        let mean = sizes.iter().sum::<f64>() / f64::from(draws);
        let variance = sizes.iter().map(|size| (size - mean).powi(2)).sum::<f64>() / f64::from(draws);
        let expected = units as f64 * rate * (1.0 - rate);
        assert!((variance / expected - 1.0).abs() < 0.06, "{variance} {expected}");
        for (rate, length) in [(0.0, 0), (1.0, units), (f64::NAN, 0)] {
            rng.poisson_sample(units, rate, &mut sample);
            assert_eq!(sample.len(), length);
        }
    }

    #[test]
    fn the_discrete_gaussian_has_its_exact_probabilities() {
        for variance in [1, 2, 9, 50, 1000] {
            let (gaussian, mut rng) = (DiscreteGaussian::new(variance).unwrap(), SecretRng::seeded(variance));
            let count = 200_000;
            let mut counts = BTreeMap::<i64, f64>::new();
            for _ in 0..count {
                *counts.entry(gaussian.sample(&mut rng)).or_default() += 1.0;
            }
            let weight = |x: i64| (-(x * x) as f64 / (2 * variance) as f64).exp();
            let total: f64 = (-1000..=1000).map(weight).sum();
            let (mut chi, mut cells) = (0.0, 0.0);
            for at in -200i64..=200 {
                let expected = weight(at) / total * f64::from(count);
                if expected < 20.0 {
                    continue;
                }
                chi += (counts.get(&at).copied().unwrap_or_default() - expected).powi(2) / expected;
                cells += 1.0;
            }
            assert!((chi - cells).abs() < 6.0 * (2.0f64 * cells).sqrt(), "{variance}: {chi} {cells}");
        }
    }

    #[test]
    fn the_discrete_gaussian_is_as_wide_as_asked_at_any_scale() {
        for variance in [1 << 40, (1 << 42) - 1, DiscreteGaussian::MAXIMUM_VARIANCE] {
            let (gaussian, mut rng) = (DiscreteGaussian::new(variance).unwrap(), SecretRng::seeded(6));
            let mut values = vec![7i64; 50_000];
            gaussian.add(&mut rng, &mut values);
            let squares: f64 = values.iter().map(|value| (value - 7) as f64).map(|v| v * v).sum();
            let ratio = squares / 50_000.0 / variance as f64;
            assert!((ratio - 1.0).abs() < 6.0 * (2.0f64 / 50_000.0).sqrt(), "{variance}: {ratio}");
        }
        DiscreteGaussian::new(0).unwrap_err();
        DiscreteGaussian::new(DiscreteGaussian::MAXIMUM_VARIANCE + 1).unwrap_err();
    }

    #[test]
    fn a_lattice_keeps_the_declared_sensitivity_and_noise() {
        let mut rng = SecretRng::seeded(7);
        for (clip, multiplier) in [(1.0, 1.1), (0.37, 0.4), (5.0, 30.0), (1e-6, 2.0), (1e6, 2e-6)] {
            let lattice = Lattice::new(clip, multiplier).unwrap();
            assert!(lattice.sensitivity() as f64 * lattice.unit() <= clip);
            let deviation = (lattice.noise().variance() as f64).sqrt() * lattice.unit();
            assert!(deviation >= clip * multiplier && deviation < clip * multiplier * 1.000_01);
            assert!(deviation / (lattice.sensitivity() as f64 * lattice.unit()) >= multiplier);
            let gradient: Vec<f32> = (0..1000).map(|_| rng.sample::<f32, _>(StandardNormal)).collect();
            let norm = gradient.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            let mut sum = vec![0i64; 1000];
            assert!(lattice.add(&gradient, clip * (1.0 - 1e-6) / norm, &mut sum));
            let square: u128 = sum.iter().map(|v| u128::from(v.unsigned_abs()).pow(2)).sum();
            assert!(square <= u128::from(lattice.sensitivity()).pow(2));
            // What is too long, or no number, adds nothing at all.
            let before = sum.clone();
            assert!(!lattice.add(&gradient, clip * 1.1 / norm, &mut sum) || lattice.sensitivity() < 40_000);
            let mut poisoned = gradient.clone();
            poisoned[3] = f32::NAN;
            if lattice.sensitivity() >= 40_000 {
                assert_eq!(sum, before);
            }
            let before = sum.clone();
            assert!(!lattice.add(&poisoned, clip * 0.5 / norm, &mut sum));
            assert_eq!(sum, before);
        }
        Lattice::new(1.0, 1e-7).unwrap_err();
        Lattice::new(f64::NAN, 1.0).unwrap_err();
    }
}

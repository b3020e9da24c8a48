//! The words of a privacy claim: whom it protects, from which neighbours, by which noise.

use serde::{Deserialize, Serialize};

/// Whose presence in the data a guarantee hides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    /// One row. A person with m rows has about m times the epsilon.
    Example,
    /// All rows with one value of the data's `group` column: a patient, say.
    Group,
    /// Everything that one client holds.
    Client,
}

/// Which pairs of data sets a guarantee cannot tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Adjacency {
    /// One has a unit more than the other.
    AddOrRemoveOne,
    /// One unit's contribution is zero in the other; that it took part is public.
    ZeroOut,
}

impl Unit {
    /// The neighbours that this project's mechanisms hide for the unit: rows and groups are added or removed, a
    /// client's presence in a round is published and its content protected.
    pub fn adjacency(self) -> Adjacency {
        match self {
            Unit::Example | Unit::Group => Adjacency::AddOrRemoveOne,
            Unit::Client => Adjacency::ZeroOut,
        }
    }
}

/// How noise is distributed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Noise {
    /// A normal variate per coordinate.
    Gaussian,
    /// The discrete Gaussian on the integers, per coordinate (Canonne, Kamath and Steinke 2020).
    DiscreteGaussian,
    /// Differences of two Poisson variates per coordinate, added in shares on an integer grid; the event's sensitivity
    /// and standard deviation are in grid steps (Agarwal, Kairouz and Liu 2021, arXiv 2110.04995).
    Skellam(SkellamShares),
}

/// Noise in shares, as the numbers that its accountant and an auditor start from. Lengths are in grid steps unless they say
/// otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SkellamShares {
    /// Fewest survivors with which a sum is released.
    pub survivors: u32,
    /// How many of them may be dishonest, fewer than all: their shares do not count.
    pub colluders: u32,
    /// Variance of one share per coordinate. The event's standard deviation is the root of it times the shares that count.
    pub share_variance: f64,
    /// Coordinates, padding included. The sum of magnitudes that one unit adds follows from it and the sensitivity.
    pub dimension: u32,
    /// Grid steps per unit of the vector.
    pub scale: f64,
    /// Clip norm before rounding, in the vector's unit. `scale` times it is at most the event's sensitivity.
    pub clip_norm: f64,
    /// Probability, each time, that rounding exceeds the event's sensitivity: it is paid into delta.
    pub rounding_failure: f64,
    /// Total variation distance, each time, of all noise in the sum from exact noise: (1 + e^ε) times it is paid into delta.
    pub sampler_distance: f64,
}

/// A noised sum over a Poisson sample, `count` times with the same parameters: what a ledger records and an
/// accountant reads. Everything in it is public.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Event {
    /// The noise's distribution.
    pub noise: Noise,
    /// Probability with which each unit is in the sample, above 0 and at most 1; 1 means everybody.
    pub sampling_rate: f64,
    /// Largest Euclidean norm that one unit adds to the sum, in the unit of the noise.
    pub sensitivity: f64,
    /// Standard deviation of the noise per coordinate of the sum.
    pub noise_standard_deviation: f64,
    /// How often.
    pub count: u64,
}

impl SkellamShares {
    /// Shares that count: those of honest survivors.
    pub fn honest(&self) -> u32 {
        self.survivors.saturating_sub(self.colluders)
    }
}

impl Event {
    /// Gaussian noise of `noise_multiplier` times a sensitivity of one.
    pub fn gaussian(sampling_rate: f64, noise_multiplier: f64, count: u64) -> Self {
        let noise = Noise::Gaussian;
        Self { noise, sampling_rate, sensitivity: 1.0, noise_standard_deviation: noise_multiplier, count }
    }

    /// The noise's standard deviation per sensitivity.
    pub fn noise_multiplier(&self) -> f64 {
        self.noise_standard_deviation / self.sensitivity
    }

    /// The same event for a unit whose own share is all that protects it, everybody else being dishonest; noise that one
    /// party adds is the same whoever is dishonest.
    pub fn alone(self) -> Self {
        let Noise::Skellam(shares) = self.noise else { return self };
        Self {
            noise: Noise::Skellam(SkellamShares { colluders: shares.survivors.saturating_sub(1), ..shares }),
            noise_standard_deviation: shares.share_variance.sqrt(),
            ..self
        }
    }

    /// The same mechanism, `count` times.
    pub fn times(self, count: u64) -> Self {
        Self { count, ..self }
    }
}

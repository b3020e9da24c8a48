//! The plan of a round with noise in shares: grid, share, box and width, from public numbers alone.

use serde::{Deserialize, Serialize};

use crate::privacy::Event;

/// Whose influence on the sum is bounded.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// A client's whole vector, clipped to the clip norm here.
    Client,
    /// One example's, clipped by the trainer: a client's vector is the sum over its Poisson batch.
    Example {
        /// The Euclidean norm that a batch's sum is expected to stay within, in clip norms: the expected batch and six
        /// of its deviations, say. It only places the box; what lies outside is cut, which costs accuracy, never privacy.
        batch_norm: f64,
    },
}

/// How fine the grid is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scale {
    /// Grid steps per unit of the vector.
    Steps(f64),
    /// The coarsest grid on which rounding makes the sensitivity no larger than this part of itself (0.01, say).
    Inflation(f64),
    /// The finest grid whose sums fit this many bits.
    Width(u32),
}

/// What a job asks for.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Requirements {
    /// Whose influence is bounded.
    pub level: Level,
    /// Standard deviation z of the noise that counts, per clip norm, above 0.
    pub noise_multiplier: f64,
    /// Clip norm C, above 0.
    pub clip_norm: f64,
    /// Coordinates of the vector, from 1.
    pub dimension: usize,
    /// Fewest survivors with which a sum is released.
    pub fewest_survivors: u32,
    /// How many of them may be dishonest: fewer than all.
    pub colluders: u32,
    /// Most clients in a sum.
    pub most_clients: u32,
    /// How fine the grid is.
    pub scale: Scale,
}

/// A round's grid, share and width. Lengths are in grid steps unless they say otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Plan {
    /// What was asked for.
    pub requirements: Requirements,
    /// Grid steps per unit of the vector.
    pub scale: f64,
    /// Coordinates that are sent: those of the vector, padded for the rotation.
    pub padded: usize,
    /// Variance of one share per coordinate, a multiple of 2⁻¹⁶.
    pub share_variance: f64,
    /// Largest Euclidean norm by which one unit changes the sum.
    pub sensitivity: f64,
    /// Largest sum of magnitudes by which it does.
    pub absolute_sensitivity: f64,
    /// Largest magnitude Q of a coordinate of one client before its noise.
    pub box_bound: u32,
    /// Bits b of the ring: sums are taken modulo 2ᵇ.
    pub width: u32,
    /// Probability, per round, that noise takes any coordinate of the sum out of the ring: at most 2⁻⁴⁰.
    pub wrap_probability: f64,
    /// Probability, per round, that rounding exceeds the sensitivity; paid into delta.
    pub rounding_failure: f64,
    /// Total variation distance of all noise of a round from what is accounted for; (1 + e^ε) times it is paid into delta.
    pub sampler_distance: f64,
}

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PlanError {
    /// A number is out of its range.
    #[error("noise in shares: {0}")]
    Requirement(String),
    /// The sums do not fit.
    #[error(
        "noise in shares: sums of {clients} clients need more than {bits} bits; use a coarser scale, less noise or fewer clients"
    )]
    Width {
        /// Most clients in a sum.
        clients: u32,
        /// Bits that there are.
        bits: u32,
    },
}

impl Plan {
    /// The plan for `requirements`.
    ///
    /// # Errors
    /// [`PlanError`].
    pub fn new(requirements: &Requirements) -> Result<Self, PlanError> {
        let _ = requirements;
        unimplemented!()
    }

    /// What `count` rounds do to one unit, each over a Poisson sample of rate `sampling_rate` (client level: 1).
    pub fn event(&self, sampling_rate: f64, count: u64) -> Event {
        let _ = (sampling_rate, count);
        unimplemented!()
    }
}

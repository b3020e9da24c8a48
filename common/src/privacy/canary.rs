//! What an audit run records: canaries with their scores, and the noise that was really added.
//!
//! A canary is an example whose gradient is a known direction, clipped to the clipping norm. Each takes part by a fair
//! secret coin and is then sampled like data. After a step its projection is read from the released sum less the sum of
//! the real examples, which the adversary of differential privacy may know. The auditor guesses the coins from the
//! scores (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846).

use serde::{Deserialize, Serialize};

use super::Event;
use super::accounting::sampled_gaussian::SampledGaussian;

/// What one step of `event` adds to a canary's score: the ln of the likelihood ratio of "takes part" to "does not",
/// ln(1 − q + q·exp((2y − 1)/(2σ²))), where σ is the claimed noise multiplier.
///
/// `projection` y is in units of the sensitivity: of mean 1 in a step that sampled the canary, else 0. None where the
/// event is no mechanism, or the projection not a number.
pub fn step_score(event: &Event, projection: f64) -> Option<f64> {
    let step = SampledGaussian::new(event.sampling_rate, event.noise_multiplier())?;
    Some(step.ln_ratio(projection)).filter(|score| !score.is_nan())
}

/// The record of an audit run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditRun {
    /// What is tested.
    pub claim: AuditClaim,
    /// All canaries, those that took part and those that did not.
    pub canaries: Vec<Canary>,
    /// How many of the highest scores are guessed to have taken part, and as many of the lowest not to have: fixed before
    /// the run, about a tenth of the canaries.
    pub guesses_per_side: usize,
    /// The noise of each step, or of several together.
    pub noise: Vec<NoiseRecord>,
    /// Client-level cosines, where the run had canary clients.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_shot: Option<OneShot>,
}

/// The claim that an audit run tests.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditClaim {
    /// The mechanism, as it was claimed.
    pub events: Vec<Event>,
    /// The delta of the claim.
    pub delta: f64,
    /// Whom it protects.
    pub unit: super::Unit,
}

/// One canary.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Canary {
    /// What its coin said.
    pub included: bool,
    /// Its score: the sum over steps of [`step_score`].
    pub score: f64,
}

/// Noise that was added, read before it was.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NoiseRecord {
    /// The standard deviation per coordinate that was declared.
    pub declared_standard_deviation: f64,
    /// Coordinates it was added to.
    pub coordinates: u64,
    /// Sum of the squares of what was added.
    pub sum_of_squares: f64,
}

/// Cosines between canary clients' directions and the change of the model (Andrew et al. 2024, arXiv 2302.03098).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OneShot {
    /// Coordinates of the model.
    pub dimension: u64,
    /// One per canary client that took part.
    pub cosines: Vec<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_score_is_the_likelihood_ratio() {
        let event = Event { sensitivity: 2.0, ..Event::gaussian(0.25, 3.0, 1) };
        let sigma = 1.5f64;
        for y in [-4.0, 0.0, 0.5, 1.0, 6.0] {
            let expected = (0.75 + 0.25 * ((2.0 * y - 1.0) / (2.0 * sigma * sigma)).exp()).ln();
            let found = step_score(&event, y).unwrap();
            assert!((found - expected).abs() < 1e-12, "{y}: {found} {expected}");
        }
        assert_eq!(step_score(&event, f64::NAN), None);
        assert_eq!(step_score(&Event::gaussian(0.1, 0.0, 1), 1.0), None);
    }
}

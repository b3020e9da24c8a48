//! What mechanisms cost: epsilon and delta from the events of a run, and the noise that a budget asks for.
//!
//! Two accountants bound epsilon from above: [`pld`] composes privacy losses and is the tighter, [`rdp`] adds Rényi
//! divergences and covers discrete noise too. [`lower`] bounds it from below, for an auditor. [`filter`] is the account
//! that jobs chosen one after another share, [`distributed`] counts noise that is added in shares. Approximations that are no bounds (a central limit, say) are not offered.
//!
//! A figure holds for events that were all fixed beforehand; what is chosen after seeing earlier outputs is charged to a
//! filter. Every question is a function of its arguments and takes milliseconds, so nothing is cached: ask again.

pub mod distributed;
pub mod filter;
pub mod lower;
pub mod normal;
pub mod pld;
pub mod rdp;
pub(super) mod sampled_gaussian;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use super::{Adjacency, Event, Unit};

/// Largest number of steps of all events together.
pub const MAX_STEPS: u64 = 1 << 40;
/// Relative precision of [`noise_multiplier_for`].
const NOISE_PRECISION: f64 = 1e-5;
/// The noise multipliers that it considers.
const NOISE_RANGE: (f64, f64) = (1e-2, 1e8);

/// Why there is no figure.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum AccountingError {
    /// Not a probability that units can be sampled with.
    #[error("sampling rate {0} is not above 0 and at most 1")]
    SamplingRate(f64),
    /// Noise or sensitivity are not what they can be.
    #[error(
        "noise of {noise} with sensitivity {sensitivity}: both must be finite, noise at least 0, sensitivity above 0"
    )]
    Noise {
        /// Standard deviation.
        noise: f64,
        /// Sensitivity.
        sensitivity: f64,
    },
    /// Not a delta that a guarantee can have.
    #[error("delta {0} is not between 0 and 1")]
    Delta(f64),
    /// Not an epsilon that can be aimed at.
    #[error("a target epsilon of {0} is not possible; it must be above 0 and finite")]
    Target(f64),
    /// More steps than are composed.
    #[error("more than {MAX_STEPS} steps in all")]
    Steps,
    /// Who took part is published, so sampling hides nobody.
    #[error(
        "a client's participation is public, so no sampling rate below 1 counts at client level (found {0})"
    )]
    PublicParticipation(f64),
    /// The accountant that was asked for does not cover the events.
    #[error(
        "privacy losses are composed for continuous Gaussian noise of at most 600 nats a step; ask for rdp or best"
    )]
    NotComposed,
    /// No noise multiplier in the range that is searched.
    #[error("no noise multiplier from {low} to {high} gives epsilon {0}", low = NOISE_RANGE.0, high = NOISE_RANGE.1)]
    OutOfReach(f64),
}

/// Who is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accountant {
    /// Privacy loss distributions ([`pld`]).
    Pld,
    /// Rényi divergences ([`rdp`]).
    Rdp,
    /// The smaller of the two.
    Best,
}

/// What a figure rests on, so that it can be recomputed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "accountant", rename_all = "kebab-case")]
pub enum Basis {
    /// Privacy loss distributions.
    Pld {
        /// Spacing of the losses, in nats.
        grid_step: f64,
    },
    /// Rényi divergences.
    Rdp {
        /// The order α.
        order: f64,
    },
}

/// An (epsilon, delta) guarantee with everything that it means nothing without.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Guarantee {
    /// Bound on the ln of the ratio of probabilities; infinite where there is none (`null` in JSON).
    pub epsilon: f64,
    /// Probability that the bound fails.
    pub delta: f64,
    /// Who is protected.
    pub unit: Unit,
    /// The neighbouring data that cannot be told apart.
    pub adjacency: Adjacency,
    /// The accountant, and its order or grid.
    #[serde(flatten)]
    pub basis: Basis,
}

/// The epsilon of `events` at `delta`.
///
/// The same numbers hold for one unit more or less under Poisson sampling, and for a unit whose contribution is zero in
/// the neighbour when everybody takes part. No noise at all gives infinity.
///
/// # Errors
/// Parameters out of range, or events that `accountant` does not cover.
pub fn epsilon(
    events: &[Event],
    delta: f64,
    unit: Unit,
    accountant: Accountant,
) -> Result<Guarantee, AccountingError> {
    check(events, delta, unit)?;
    let guarantee = |epsilon, basis| Guarantee { epsilon, delta, unit, adjacency: unit.adjacency(), basis };
    let by_rdp = || {
        let bound = rdp::epsilon(events, delta);
        guarantee(bound.value, Basis::Rdp { order: bound.order })
    };
    let by_pld = || {
        if events.iter().any(|event| event.count > 0 && event.noise_standard_deviation == 0.0) {
            return Some(guarantee(f64::INFINITY, Basis::Pld { grid_step: 0.0 }));
        }
        let bound = pld::epsilon(events, delta)?;
        Some(guarantee(bound.value, Basis::Pld { grid_step: bound.grid_step }))
    };
    match accountant {
        Accountant::Rdp => Ok(by_rdp()),
        Accountant::Pld => by_pld().ok_or(AccountingError::NotComposed),
        Accountant::Best => {
            let rdp = by_rdp();
            Ok(by_pld().filter(|pld| pld.epsilon <= rdp.epsilon).unwrap_or(rdp))
        }
    }
}

/// What a correct claim for some events lies between.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bracket {
    /// No correct epsilon is below ([`lower`]).
    pub lower: f64,
    /// The privacy-loss accountant's, where it covers the events.
    pub pld: Option<pld::Bound>,
    /// The Rényi accountant's: no careful claim need be above.
    pub rdp: rdp::Bound,
}

/// The epsilons at `delta` between which a claim for `events` must lie.
///
/// # Errors
/// Parameters out of range.
pub fn bracket(events: &[Event], delta: f64, unit: Unit) -> Result<Bracket, AccountingError> {
    check(events, delta, unit)?;
    let rdp = rdp::epsilon(events, delta);
    let silent = events.iter().any(|event| event.count > 0 && event.noise_standard_deviation == 0.0);
    let lower = if silent { f64::INFINITY } else { lower::epsilon(events, delta) };
    Ok(Bracket { lower, pld: pld::epsilon(events, delta), rdp })
}

/// The smallest noise multiplier, to 1e−5 of itself and from above, with which `steps` steps at `sampling_rate` have an
/// epsilon of at most `target` at `delta`.
///
/// # Errors
/// Parameters out of range, or no noise multiplier from 0.01 to 1e8 gives the target.
pub fn noise_multiplier_for(
    target: f64,
    delta: f64,
    sampling_rate: f64,
    steps: u64,
    unit: Unit,
    accountant: Accountant,
) -> Result<f64, AccountingError> {
    if !(target > 0.0 && target.is_finite()) {
        return Err(AccountingError::Target(target));
    }
    let event = |noise: f64| [Event::gaussian(sampling_rate, noise, steps)];
    check(&event(1.0), delta, unit)?;
    let by_rdp = |noise: f64| rdp::epsilon(&event(noise), delta).value;
    let enough = least(NOISE_RANGE, target, by_rdp).ok_or(AccountingError::OutOfReach(target))?;
    if accountant == Accountant::Rdp {
        return Ok(enough);
    }
    let by_pld = |noise: f64| pld::epsilon(&event(noise), delta).map_or(f64::INFINITY, |bound| bound.value);
    let range = (NOISE_RANGE.0.max(enough / 8.0), enough * (1.0 + NOISE_PRECISION));
    match (least(range, target, by_pld), accountant) {
        (Some(found), _) => Ok(found.min(enough)),
        (None, Accountant::Best) => Ok(enough),
        (None, _) => Err(AccountingError::OutOfReach(target)),
    }
}

/// The smallest noise in `range`, to [`NOISE_PRECISION`] and from above, whose figure is at most `target`; `at` falls.
///
/// Regula falsi (Illinois) in ln of both, kept inside by bisection.
pub(super) fn least(range: (f64, f64), target: f64, at: impl Fn(f64) -> f64) -> Option<f64> {
    let height = |noise: f64| at(noise).clamp(1e-12, 1e12).ln() - target.ln();
    let (mut low, mut high) = (range.0.ln(), range.1.ln());
    let mut at_low = height(range.0);
    let mut at_high = height(range.1);
    if at_high > 0.0 {
        return None;
    }
    if at_low <= 0.0 {
        return Some(range.0);
    }
    let mut side = 0i32;
    let mut round = 0;
    while high - low > NOISE_PRECISION {
        // Every third step halves, so that a curve with a flat end cannot hold the other end for long.
        let part = at_low / (at_low - at_high);
        let middle = if round % 3 == 2 {
            0.5 * (low + high)
        } else {
            let margin = 0.4 * NOISE_PRECISION;
            (low + part * (high - low)).clamp(low + margin, high - margin)
        };
        let here = height(middle.exp());
        if here > 0.0 {
            (low, at_low) = (middle, here);
            if side == 1 {
                at_high *= 0.5;
            }
            side = 1;
        } else {
            (high, at_high) = (middle, here);
            if side == -1 {
                at_low *= 0.5;
            }
            side = -1;
        }
        round += 1;
    }
    Some(high.exp())
}

fn check(events: &[Event], delta: f64, unit: Unit) -> Result<(), AccountingError> {
    if !(delta > 0.0 && delta < 1.0) {
        return Err(AccountingError::Delta(delta));
    }
    let mut total = 0u64;
    for event in events {
        let rate = event.sampling_rate;
        if !(rate > 0.0 && rate <= 1.0) {
            return Err(AccountingError::SamplingRate(rate));
        }
        if unit == Unit::Client && rate < 1.0 {
            return Err(AccountingError::PublicParticipation(rate));
        }
        let (noise, sensitivity) = (event.noise_standard_deviation, event.sensitivity);
        let possible = noise >= 0.0 && noise.is_finite() && sensitivity > 0.0 && sensitivity.is_finite();
        if !possible {
            return Err(AccountingError::Noise { noise, sensitivity });
        }
        total = total.checked_add(event.count).ok_or(AccountingError::Steps)?;
    }
    if total > MAX_STEPS { Err(AccountingError::Steps) } else { Ok(()) }
}

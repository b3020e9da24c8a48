//! Noise that clients add in shares before their vectors are masked, so that only a noised sum is ever seen.
//!
//! [`plan`] turns a job's numbers into a grid, shares and a width; [`encode`](mod@encode) is what a client does to its vector and
//! what a coordinator does to the sum: [`rotation`], the grid's box, [`rounding`], a [`skellam`] share, and back.
//! What the noised sum is worth is in [`accounting::distributed`].

pub mod encode;
pub mod plan;
pub mod rotation;
pub mod rounding;
pub mod skellam;

pub use encode::{EncodeError, decode, encode};
pub use plan::{Level, Plan, PlanError, Requirements, Scale};

use super::accounting::{self, Accountant, AccountingError, Guarantee, rdp};
use super::{Event, Noise, Unit};

/// The largest noise multiplier that [`noise_multiplier_for`] considers.
const MOST_NOISE: f64 = 1e4;

/// What `events` promise at `delta`, twice: with at most the colluders that the events were planned for, and if every other
/// participant is dishonest, so that a unit's own share is all that protects it. The two are one where no noise is in shares.
///
/// # Errors
/// Parameters out of range.
pub fn guarantees(
    events: &[Event],
    delta: f64,
    unit: Unit,
) -> Result<(Guarantee, Guarantee), AccountingError> {
    let planned = accounting::epsilon(events, delta, unit, Accountant::Best)?;
    if !are_in_shares(events) {
        return Ok((planned, planned));
    }
    let alone: Vec<Event> = events.iter().map(|event| event.alone()).collect();
    Ok((planned, accounting::epsilon(&alone, delta, unit, Accountant::Best)?))
}

/// Whether any of the events' noise is in shares, so that what it is worth depends on who is honest.
pub fn are_in_shares(events: &[Event]) -> bool {
    events.iter().any(|event| matches!(event.noise, Noise::Skellam(_)))
}

/// The smallest noise multiplier, to 1e−5 of itself and from above, with which `rounds` rounds of the plan for
/// `requirements`, whose own multiplier does not matter, have an epsilon of at most `target` at `delta`.
///
/// # Errors
/// One line: no plan, or no noise multiplier up to 10⁴ gives the target.
pub fn noise_multiplier_for(
    target: f64,
    delta: f64,
    sampling_rate: f64,
    rounds: u64,
    requirements: &Requirements,
) -> Result<f64, PlanError> {
    let with = |noise_multiplier| Plan::new(&Requirements { noise_multiplier, ..*requirements });
    let epsilon = |noise_multiplier: f64| {
        with(noise_multiplier)
            .map_or(f64::INFINITY, |plan| rdp::epsilon(&[plan.event(sampling_rate, rounds)], delta).value)
    };
    let mut high = 1e-2;
    while epsilon(high).partial_cmp(&target).is_none_or(std::cmp::Ordering::is_gt) {
        if high > MOST_NOISE {
            with(1.0)?;
            return Err(PlanError::OutOfReach { target });
        }
        high *= 2.0;
    }
    Ok(accounting::least((0.5 * high, high), target, epsilon).unwrap_or(high))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_noise_for_a_target_is_found() {
        let requirements = Requirements {
            level: Level::Example { batch_norm: 400.0 },
            noise_multiplier: 1.0,
            clip_norm: 1.0,
            dimension: 26_010,
            fewest_survivors: 10,
            colluders: 1,
            most_clients: 10,
            scale: Scale::Inflation(0.01),
        };
        let rate = 256.0 / 6000.0;
        let found = noise_multiplier_for(3.0, 1e-5, rate, 480, &requirements).unwrap();
        let cost = |noise_multiplier: f64| {
            let plan = Plan::new(&Requirements { noise_multiplier, ..requirements }).unwrap();
            let events = [plan.event(rate, 480)];
            accounting::epsilon(&events, 1e-5, Unit::Example, Accountant::Best).unwrap().epsilon
        };
        println!("epsilon 3 at noise multiplier {found:.4}");
        assert!(cost(found) <= 3.0 && cost(found * 0.9999) > 3.0, "{}", cost(found));
        // The Gaussian's for the same target by the same accountant, less what the grid costs.
        assert!(found > 1.6 && found < 1.7);
        // The failures of 480 rounds alone are more than such a delta.
        let none = noise_multiplier_for(3.0, 1e-10, rate, 480, &requirements).unwrap_err();
        assert_eq!(none, PlanError::OutOfReach { target: 3.0 });
        let bad = Requirements { colluders: 10, ..requirements };
        let none = noise_multiplier_for(3.0, 1e-5, rate, 480, &bad).unwrap_err();
        assert!(none.to_string().contains("colluders"), "{none}");
    }

    #[test]
    fn noise_of_one_party_has_one_figure() {
        let events = [Event::gaussian(0.05, 1.6, 300)];
        let (planned, alone) = guarantees(&events, 1e-5, Unit::Example).unwrap();
        assert_eq!(planned, alone);
        assert!(!are_in_shares(&events));
    }
}

//! Noise that clients add in shares before their vectors are masked, so that only a noised sum is ever seen.
//!
//! [`plan`] turns a job's numbers into a grid, shares and a width; [`encode`] is what a client does to its vector and
//! what a coordinator does to the sum: [`rotation`], the grid's box, [`rounding`], a [`skellam`] share, and back.
//! What the noised sum is worth is in [`accounting::distributed`](super::accounting::distributed).

pub mod encode;
pub mod plan;
pub mod rotation;
pub mod rounding;
pub mod skellam;

pub use encode::{EncodeError, decode, encode};
pub use plan::{Level, Plan, PlanError, Requirements, Scale};

use super::accounting::{self, Accountant, AccountingError, Guarantee};
use super::{Event, Unit};

/// What `events` promise at `delta`, twice: with at most the colluders that the events were planned for, and if every other
/// participant is dishonest, so that a unit's own share is all that protects it.
///
/// # Errors
/// Parameters out of range.
pub fn guarantees(
    events: &[Event],
    delta: f64,
    unit: Unit,
) -> Result<(Guarantee, Guarantee), AccountingError> {
    let planned = accounting::epsilon(events, delta, unit, Accountant::Best)?;
    let alone: Vec<Event> = events.iter().map(|event| event.alone()).collect();
    Ok((planned, accounting::epsilon(&alone, delta, unit, Accountant::Best)?))
}

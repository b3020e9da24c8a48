//! Differential privacy: what a mechanism is and what it costs. No clock, no file, no secret of its own.
//!
//! [`mechanism`] names what is done to data, [`accounting`] says what it costs.

pub mod accounting;
pub mod mechanism;

pub use mechanism::{Adjacency, Event, Noise, Unit};

//! Differential privacy: what a mechanism is and what it costs. No clock, no file, no secret of its own.
//!
//! [`mechanism`] names what is done to data, the accountants say what it costs.

pub mod mechanism;

pub use mechanism::{Adjacency, Event, Noise, Unit};

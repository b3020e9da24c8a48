//! Differential privacy: what a mechanism is and what it costs. No clock, no file, no secret of its own.
//!
//! [`mechanism`] names what is done to data, [`accounting`] says what it costs, [`canary`] what
//! an audit run records to test it.

pub mod accounting;
pub mod canary;
pub mod mechanism;

pub use mechanism::{Adjacency, Event, Noise, Unit};

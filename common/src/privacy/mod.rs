//! Differential privacy: what a mechanism is, what it costs and the noise it adds. No clock and no file.
//!
//! [`mechanism`] names what is done to data, the accountants say what it costs, [`noise`] draws from secret bits.

pub mod mechanism;
pub mod noise;

pub use mechanism::{Adjacency, Event, Noise, Unit};

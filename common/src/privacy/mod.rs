//! Differential privacy: what a mechanism is, what it costs and the noise it adds. No clock and no file.
//!
//! [`mechanism`] names what is done to data, [`accounting`] says what it costs, [`release`] lists what leaves a node.

pub mod accounting;
pub mod counts;
pub mod mechanism;
pub mod noise;
pub mod release;

pub use mechanism::{Adjacency, Event, Noise, Unit};

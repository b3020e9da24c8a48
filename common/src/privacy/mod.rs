//! Differential privacy: what a mechanism is, what it costs and the noise it adds. No clock and no file.
//!
//! [`mechanism`] names what is done to data, [`accounting`] says what it costs, [`noise`] draws it from secret bits,
//! [`distributed`] adds it in shares under masks,
//! [`release`] lists what leaves a node, [`counts`] noises metrics, [`canary`] is what an audit records and how it scores.

pub mod accounting;
pub mod canary;
pub mod counts;
pub mod distributed;
pub mod mechanism;
pub mod noise;
pub mod release;

pub use mechanism::{Adjacency, Event, Noise, SkellamShares, Unit};

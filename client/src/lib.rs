//! A node of a federation: reads its own data, trains on it, and sends only what its policy allows.

pub mod account;
pub mod cli;
pub mod config;
pub mod data;
pub mod encoding;
pub mod enrol;
pub mod machine;
pub mod masking;
pub mod node;
pub mod participant;
pub mod partition;
pub mod policy;
pub mod shard;
pub mod store;
pub mod trainer;
pub mod transport;

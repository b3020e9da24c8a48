//! A node of a federation: reads its own data, trains on it, and sends only what its policy allows.

pub mod data;
pub mod shard;
pub mod trainer;

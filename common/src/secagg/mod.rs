//! Secure aggregation: the coordinator learns the sum of the survivors' updates and no update.
//!
//! Protocol core: `client` and `server`, the two sides of a session, and what they stand on. Arithmetic: `ring`
//! (integers modulo 2^b, their packing) and `mask` (the key stream that hides them).

pub mod abort;
pub mod bitmap;
pub mod client;
pub mod context;
pub mod graph;
mod group;
pub mod journal;
pub mod keys;
pub mod mask;
pub mod messages;
pub mod parameters;
pub mod peers;
pub mod ring;
pub mod roster;
pub mod server;
mod shamir;
pub mod sum;
#[cfg(test)]
pub(crate) mod tests;

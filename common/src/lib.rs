//! Tributary's pure library: what a job is, how a model is laid out and summed, where randomness comes from.
//!
//! No clock, no socket, no runtime, no libtorch: everything here is a function of its arguments, so the
//! coordinator, a node and the simulator compute the same bits. The one exception is a ledger's file
//! ([`ledger::file`]), which node, coordinator and auditor share.
// `unsafe` is denied in the whole workspace (Cargo.toml); the named modules of SIMD kernels allow it for themselves.

pub mod aggregate;
pub mod compression;
pub mod digest;
pub mod document;
pub mod exchange;
pub mod ids;
pub mod job;
pub mod ledger;
pub mod limits;
pub mod model;
pub mod privacy;
pub mod progress;
pub mod record;
pub mod rng;
pub mod secagg;
pub mod time;
pub mod token;

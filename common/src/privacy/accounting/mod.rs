//! What mechanisms cost: epsilon and delta from the events of a run.
//!
//! [`rdp`] adds Rényi divergences; [`filter`] is the account that jobs chosen one after another share.

pub mod filter;
#[allow(dead_code)] // until the loss-distribution accountant stands on it
mod normal;
pub mod rdp;
#[allow(dead_code)] // likewise
mod sampled_gaussian;
#[cfg(test)]
mod tests;

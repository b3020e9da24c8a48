//! What mechanisms cost: epsilon and delta from the events of a run.
//!
//! [`rdp`] adds Rényi divergences and [`pld`] composes privacy losses; [`filter`] is the account that jobs chosen one after another share.

pub mod filter;
mod normal;
pub mod pld;
pub mod rdp;
mod sampled_gaussian;
#[cfg(test)]
mod tests;

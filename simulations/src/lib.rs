//! The simulator: the production cores of coordinator and node, over memory, with a virtual clock.
//!
//! [`scenario`] says what is simulated, [`engine`] runs it, [`report`] tells of it. There is no second
//! implementation of a round here: [`engine`] performs the effects of `tributary_server::run::Run` and of one
//! `tributary_client::machine::NodeMachine` per client.

pub mod cli;
pub mod devices;
pub mod engine;
pub mod faults;
pub mod plan;
pub mod population;
pub mod replay;
pub mod report;
pub mod scenario;
pub mod sweep;
pub mod workers;

mod follow;
mod session;
#[cfg(test)]
mod tests;
mod wire;

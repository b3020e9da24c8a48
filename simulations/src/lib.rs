//! The simulator: the production cores of coordinator and node, over memory, with a virtual clock.
//!
//! [`scenario`] says what is simulated, [`engine`] runs it, [`report`] tells of it. There is no second
//! implementation of a round here: [`engine`] performs the effects of `tributary_server::run::Run` and of one
//! `tributary_client::machine::NodeMachine` per client.
//!
//! Research has four places of its own, each with a program in `simulations/examples` and described in
//! `docs/research.md`:
//!
//! - a rule that makes the next model of the updates: [`engine::Settings::rule`]
//!   ([`AggregationRule`](tributary_common::aggregate::AggregationRule); `aggregation_rule.rs`);
//! - a client-side objective: [`engine::Settings::trainer`]
//!   ([`Objective`](tributary_client::trainer::Objective); `objective.rs`);
//! - a partition: [`scenario::Federation`] built by hand (`partition.rs`);
//! - an architecture: layers as data ([`LayerSpec`](tributary_common::model::LayerSpec); `architecture.rs`).

pub mod attacks;
pub mod canary;
pub mod cli;
pub mod devices;
pub mod engine;
pub mod faults;
pub mod plan;
pub mod population;
pub mod privacy_plan;
pub mod replay;
pub mod report;
pub mod scenario;
pub mod sweep;
pub mod transfer_plan;
pub mod workers;
pub mod world;

mod follow;
mod session;
#[cfg(test)]
mod tests;
mod wire;

//! The coordinator: runs rounds over clients that train on their own data, and never sees the data.
//!
//! [`round`] and [`run`] are the synchronous core, which the simulator runs too; the other modules are the
//! edges that perform their effects.

pub mod admin;
pub mod authority;
pub mod backup;
pub mod cli;
pub mod config;
pub mod driver;
pub mod enrolment;
pub mod grpc;
pub mod identity;
pub mod ledger;
pub mod rate;
pub mod round;
pub mod run;
pub mod serve;
pub mod store;
pub mod tls;
pub mod transfer;

//! The coordinator: runs rounds over clients that train on their own data, and never sees the data.
//!
//! [`round`] and [`run`] are the synchronous core, which the simulator runs too; the other modules are the
//! edges that perform their effects.

pub mod round;
pub mod run;
pub mod store;

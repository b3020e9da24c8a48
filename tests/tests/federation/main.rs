//! The promises of a federation that only whole processes can keep.
#![allow(clippy::expect_used, clippy::unwrap_used)] // a broken expectation is a failed test

mod bad_input;
mod capture;
mod crash;
mod identity;
mod masked;
mod operators_day;
mod privacy;
mod same_bits;

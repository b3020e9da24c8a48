//! The promises of a federation that only whole processes can keep.

mod bad_input;
mod identity;
mod same_bits;

//! The privacy ledger: an append-only log of what was promised and spent, which others can hold its owner to.

pub mod head;
pub mod hex;
pub mod merkle;
pub mod record;

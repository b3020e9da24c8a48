//! The auditor: recomputes what a privacy claim follows from, offline, from recorded parameters alone.
//!
//! [`cli`] is the command line, [`canary`] the statistics of an audit run, [`verify`](mod@verify), [`report`]
//! and [`compare`](mod@compare) read ledgers. The mathematics of accounting is `tributary_common`'s, which
//! the writers of claims use too; what stands against a mistake in it is a second method (the lower bound),
//! not a second implementation.
#![forbid(unsafe_code)]

pub mod canary;
pub mod cli;
pub mod compare;
pub mod report;
pub mod verify;

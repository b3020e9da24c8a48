//! The privacy ledger: an append-only log of what was promised and spent, which others can hold its owner to.
//!
//! A node has one for all coordinators, a coordinator has one per run. [`book`] is what a program uses;
//! [`account`] and [`run`] are the cores behind it, functions of the records alone. [`record`] and [`log`]
//! chain the records, [`merkle`] and [`head`] bind their owner to them, and [`file`](mod@file) keeps them.
//! [`verify`](mod@verify) lists what is wrong with an export.
//!
//! What a ledger shows: what was promised, what was charged for it, and whether anything was changed since a
//! head that somebody else holds. What it cannot show: that noise was really added; a rewrite of records that
//! no head covers which somebody else holds; an older copy put back whole, if no other party honestly shows a
//! later head.

pub mod account;
pub mod book;
pub mod file;
pub mod head;
pub mod hex;
pub mod log;
pub mod merkle;
pub mod record;
pub mod run;
pub mod verify;

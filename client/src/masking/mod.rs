//! This node's part in masked rounds: its session with the other nodes, what it remembers, and whom it knows.

pub mod journal;
pub mod peers;

//! Secure aggregation: the coordinator learns the sum of the survivors' updates and no update.
//!
//! Protocol core: `session` and what it stands on. Arithmetic: `ring` (integers modulo 2^b, their packing) and `mask`
//! (the key stream that hides them).

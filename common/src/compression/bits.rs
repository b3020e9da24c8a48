//! Bits in and out of bytes, the lowest first.

//! What an update becomes on its way to the coordinator: fewer coordinates, fewer bits.
//!
//! [`Scheme`] is the one entry point for an update that is not masked: it encodes, and decodes what strangers send.
//! [`residual`] keeps what was not sent until it may be sent again (error feedback). [`support`] chooses the
//! coordinates that every client of a masked round shares. `docs/compression.md` has the formats byte by byte.

mod bits;
mod container;
mod positions;
pub mod residual;
mod sealed;
pub mod select;
pub mod support;
mod values;

pub use self::container::{
    DecodeError, EncodeError, Encoded, SPARSE_PARAMETERS, Scheme, SchemeError, Sparse,
};
pub use self::values::ValueCodec;

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;

//! The versioned container of an encoded update, and the schemes that a job can ask for.

use rand::Rng;

use super::values::ValueCodec;
use crate::aggregate::AggregateError;

/// Most parameters of a model whose updates may be sparse: positions are 32 bits wide.
pub const SPARSE_PARAMETERS: usize = u32::MAX as usize;

/// How a job's updates are encoded. Every member of a cohort uses the job's scheme.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scheme {
    /// Every coordinate as `f32`: 32 bits each, exact.
    Dense,
    /// The coordinates of largest magnitude and where they are; the rest is zero at the receiver.
    TopK {
        /// The share of all coordinates that is sent, above 0 and at most 1.
        density: f64,
        /// How the sent values are written.
        values: ValueCodec,
    },
    /// Every coordinate in 8 bits, rounded at random without bias, 256 coordinates to a scale.
    Int8,
    /// Every coordinate as one of 2·`levels` + 1 values, rounded at random without bias (QSGD).
    Qsgd {
        /// Steps between zero and the largest magnitude of 256 coordinates, 1 to 32,767.
        levels: u16,
    },
}

/// An encoded update.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoded {
    /// What is sent.
    pub bytes: Vec<u8>,
    /// The update that the receiver will decode from `bytes`, bit for bit, in the order of the job's layout.
    pub received: Vec<f32>,
}

/// A decoded update that is zero but at a few coordinates.
#[derive(Debug, Clone, PartialEq)]
pub struct Sparse {
    /// Length of the flat vector that it stands for.
    pub parameters: usize,
    /// Coordinates, ascending, each below `parameters`.
    pub indices: Vec<u32>,
    /// Their values, as many as indices.
    pub values: Vec<f32>,
}

/// A scheme that no update can be encoded with.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum SchemeError {
    /// The density is no share.
    #[error("compression: a density of {0} is not possible; above 0 and at most 1 is")]
    Density(f64),
    /// Too few or too many levels.
    #[error("compression: {0} levels are not possible; 1 to 32767 are")]
    Levels(u16),
    /// The model is too large for sparse updates.
    #[error("compression: top-k of {0} parameters is not possible; up to {SPARSE_PARAMETERS} are")]
    Parameters(usize),
}

/// Why an update is not encoded.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum EncodeError {
    /// The scheme is impossible.
    #[error(transparent)]
    Scheme(#[from] SchemeError),
    /// The update is one that the coordinator would refuse.
    #[error("this update cannot be encoded: {0}")]
    Update(#[from] AggregateError),
}

/// Why bytes are no encoded update.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum DecodeError {
    /// The scheme is impossible.
    #[error(transparent)]
    Scheme(#[from] SchemeError),
    /// Too few or too many bytes.
    #[error("the encoded {what} has {found} bytes, but {expected} are needed")]
    Length {
        /// Which part.
        what: &'static str,
        /// Bytes that are there.
        found: usize,
        /// Bytes that there should be.
        expected: usize,
    },
    /// The bytes begin like something else.
    #[error("these bytes do not begin like {0}")]
    Magic(&'static str),
    /// A version that this program does not read.
    #[error(
        "encoded in version {found} of the format; this program reads version {expected} (update the older side)"
    )]
    Version {
        /// The version found.
        found: u8,
        /// The version known.
        expected: u8,
    },
    /// A field of the header is not what job and model make it.
    #[error("the header says {field} = {found}; this job's is {expected}")]
    Header {
        /// The field's name.
        field: &'static str,
        /// Its value.
        found: u64,
        /// What it should be.
        expected: u64,
    },
    /// The coded positions are damaged or a lie.
    #[error("positions, block {block}: {reason}")]
    Positions {
        /// Which block of coordinates, from 0.
        block: usize,
        /// What is wrong.
        reason: &'static str,
    },
    /// A coded value is damaged or a lie.
    #[error("value {at}: {reason}")]
    Value {
        /// Which value, from 0.
        at: usize,
        /// What is wrong.
        reason: &'static str,
    },
    /// The digest at the end does not fit what is before it.
    #[error("the {0} is damaged: its digest does not fit")]
    Damaged(&'static str),
}

impl Scheme {
    /// Refuses a scheme that is impossible for a model of `parameters` parameters.
    ///
    /// # Errors
    /// [`SchemeError`].
    pub fn check(&self, _parameters: usize) -> Result<(), SchemeError> {
        unimplemented!()
    }

    /// How many coordinates of `parameters` are sent: all, or round(density · parameters) and at least one.
    pub fn kept(&self, _parameters: usize) -> usize {
        unimplemented!()
    }

    /// The bytes of every encoded update where that is one number: all schemes but top-k, whose positions take more
    /// or fewer bits.
    pub fn exact_bytes(&self, _parameters: usize) -> Option<usize> {
        unimplemented!()
    }

    /// The most bytes that an update of `parameters` coordinates can take; what is longer can be refused unread.
    pub fn most_bytes(&self, _parameters: usize) -> usize {
        unimplemented!()
    }

    /// Encodes `update`, which must be finite and within what an aggregate admits.
    ///
    /// `rng` rounds: a named stream without differential privacy, `SecretRng` with it. How much is drawn from it
    /// depends on scheme and length alone.
    ///
    /// # Errors
    /// [`EncodeError`].
    pub fn encode<R: Rng + ?Sized>(&self, _update: &[f32], _rng: &mut R) -> Result<Encoded, EncodeError> {
        unimplemented!()
    }

    /// Decodes an update of `parameters` coordinates.
    ///
    /// Safe on any bytes: nothing is allocated beyond a few vectors of `parameters` or of the job's number of sent
    /// coordinates, and every value is finite.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(&self, _bytes: &[u8], _parameters: usize) -> Result<Vec<f32>, DecodeError> {
        unimplemented!()
    }

    /// Decodes an update without filling in zeros; with a dense scheme every coordinate is listed.
    ///
    /// # Errors
    /// [`DecodeError`], and with a dense scheme [`SchemeError::Parameters`] beyond [`SPARSE_PARAMETERS`].
    pub fn decode_sparse(&self, _bytes: &[u8], _parameters: usize) -> Result<Sparse, DecodeError> {
        unimplemented!()
    }
}

impl Sparse {
    /// Adds it to a flat vector; coordinates beyond the vector's end are left out.
    pub fn add_to(&self, _vector: &mut [f32]) {
        unimplemented!()
    }
}
